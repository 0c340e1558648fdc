"""Which replies may be combined; the rest are named with their reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedipfs.errors import BadUpdate, Diverged, RunFailed, one_line
from fedipfs.exchange import NOT_FINITE, check_examples


def screen(
    replies: Iterable[Message],
    weighted_by_key: str,
    *,
    arrays: int = 1,
    loss_key: str | None = None,
) -> tuple[list[Message], dict[int, str]]:
    """Split replies into usable ones, by node id, and the reasons against the others.

    A usable reply has `arrays` array records (0 for an evaluation) and one metric record, named as
    most others' and with the same metrics of the same kinds; a positive, finite weight under
    `weighted_by_key`; in an evaluation nothing that is not finite; and, for strategies that weigh
    by a loss (`loss_key`), a finite one that is not negative. Flower's strategies fail as a whole
    on anything else.
    """
    answered, reasons = [], {}
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
        if reply.has_error():
            reason = one_line(reply.error.reason or "error without a reason")
            reasons[reply.metadata.src_node_id] = reason
        else:
            answered.append(reply)
    sound = []
    for reply in answered:
        try:
            metrics = _metrics(reply, arrays)
            check_examples(metrics.get(weighted_by_key))
            if not arrays:
                _check_finite(metrics)
            if loss_key is not None:
                _check_loss(metrics.get(loss_key), loss_key)
        except BadUpdate as error:
            reasons[reply.metadata.src_node_id] = one_line(error)
        else:
            sound.append((reply, _form(reply)))
    # What is unsound anyway has no say in what is usual.
    usual = Counter(form for _, form in sound).most_common(1)[0][0] if sound else ()
    for reply, form in sound:
        if form != usual:
            reasons[reply.metadata.src_node_id] = one_line(
                f"its records are {list(form)}, the others' {list(usual)}"
            )
    return [reply for reply, form in sound if form == usual], reasons


def parts(reply: Message) -> tuple[dict[str, ArrayRecord], list[MetricRecord]]:
    """The array and metric records of a reply (Flower's own properties copy them each time)."""
    records = dict(reply.content.items())
    return (
        {key: record for key, record in records.items() if isinstance(record, ArrayRecord)},
        [record for record in records.values() if isinstance(record, MetricRecord)],
    )


def update_in(reply: Message, extra: Sequence[str] = ()) -> ArrayRecord | None:
    """The update that a reply to training brought: the array record whose key is none of `extra`.

    None for an error, or where there is not just one; a client may send them in any order.
    """
    arrays = {} if reply.has_error() else parts(reply)[0]
    found = [record for key, record in arrays.items() if key not in extra]
    return found[0] if len(found) == 1 else None


def require(min_successes: int, good: int, reasons: Mapping[Any, str], name: str) -> None:
    """RunFailed, with the reasons, if fewer than `min_successes` replies of round `name` serve.

    Diverged if more are not finite than serve.
    """
    if good >= min_successes:
        return
    shown = "; ".join(f"{node}: {reason}" for node, reason in list(reasons.items())[:3])
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    infinite = sum(NOT_FINITE in reason for reason in reasons.values())
    raise (Diverged if infinite > good else RunFailed)(
        f"{name}: {good} usable updates, min_successes is {min_successes} ({shown}{more}); "
        "mend the clients or lower clients.min_successes"
    )


def _metrics(reply: Message, arrays: int) -> MetricRecord:
    array_records, metric_records = parts(reply)
    if arrays and len(array_records) != arrays:
        raise BadUpdate(f"it holds {len(array_records)} array records instead of {arrays}")
    if len(metric_records) != 1:
        raise BadUpdate(f"it holds {len(metric_records)} metric records instead of one")
    return metric_records[0]


def _form(reply: Message) -> tuple[str, ...]:
    """Names of the array and metric records and of all metrics, lists with their lengths."""
    form = []
    for key, record in reply.content.items():
        if isinstance(record, ArrayRecord):
            form.append(key)
        elif isinstance(record, MetricRecord):
            for name, value in sorted(record.items()):
                length = f"[{len(value)}]" if isinstance(value, list) else ""
                form.append(f"{key}.{name}{length}")
    return tuple(sorted(form))


def _check_finite(metrics: MetricRecord) -> None:
    for name, value in metrics.items():
        if not np.isfinite(value).all():
            raise BadUpdate(f"its {name[:80]} is {value!r:.80}, not finite")


def _check_loss(value: object, key: str) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadUpdate(f"its {key} is {value!r}, not a finite number of at least 0")
