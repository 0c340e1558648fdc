"""Which replies may be combined; the rest are named with their reason."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message, MetricRecord

from fedipfs.errors import BadUpdate, RunFailed, one_line
from fedipfs.exchange import check_examples


def screen(
    replies: Iterable[Message],
    weighted_by_key: str,
    *,
    arrays: bool = True,
    loss_key: str | None = None,
) -> tuple[list[Message], dict[int, str]]:
    """Split replies into usable ones, by node id, and the reasons against the others.

    A usable reply has one array record (unless `arrays` is False, as for evaluation) and one
    metric record, named as most others' and with the same metrics of the same kinds; a positive,
    finite weight under `weighted_by_key`; and, for strategies that weigh by a loss (`loss_key`),
    a finite one that is not negative. Flower's strategies fail as a whole on anything else.
    """
    answered, reasons = [], {}
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
        if reply.has_error():
            reason = one_line(reply.error.reason or "error without a reason")
            reasons[reply.metadata.src_node_id] = reason
        else:
            answered.append(reply)
    usual = Counter(map(_form, answered)).most_common(1)[0][0] if answered else ()
    good = []
    for reply in answered:
        try:
            metrics = _metrics(reply, arrays)
            check_examples(metrics.get(weighted_by_key))
            if loss_key is not None:
                _check_loss(metrics.get(loss_key), loss_key)
            if (form := _form(reply)) != usual:
                raise BadUpdate(f"its records are {list(form)}, the others' {list(usual)}")
        except BadUpdate as error:
            reasons[reply.metadata.src_node_id] = one_line(error)
        else:
            good.append(reply)
    return good, reasons


def require(min_successes: int, good: int, reasons: Mapping[Any, str], name: str) -> None:
    """RunFailed, with the reasons, if fewer than `min_successes` replies of round `name` serve."""
    if good >= min_successes:
        return
    shown = "; ".join(f"{node}: {reason}" for node, reason in list(reasons.items())[:3])
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    raise RunFailed(
        f"{name}: {good} usable updates, min_successes is {min_successes} ({shown}{more}); "
        "mend the clients or lower clients.min_successes"
    )


def _metrics(reply: Message, arrays: bool) -> MetricRecord:
    content = reply.content
    if arrays and len(content.array_records) != 1:
        raise BadUpdate(f"it holds {len(content.array_records)} array records instead of one")
    if len(content.metric_records) != 1:
        raise BadUpdate(f"it holds {len(content.metric_records)} metric records instead of one")
    (metrics,) = content.metric_records.values()
    return metrics


def _form(reply: Message) -> tuple[str, ...]:
    """Names of the array and metric records and of all metrics, lists with their lengths."""
    content = reply.content
    form = [*content.array_records]
    for key, metrics in content.metric_records.items():
        for name, value in sorted(metrics.items()):
            length = f"[{len(value)}]" if isinstance(value, list) else ""
            form.append(f"{key}.{name}{length}")
    return tuple(form)


def _check_loss(value: object, key: str) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadUpdate(f"its {key} is {value!r}, not a finite number of at least 0")
