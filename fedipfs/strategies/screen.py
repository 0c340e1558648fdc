"""Which replies may be combined; the rest are named with their reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message

from fedipfs.errors import BadUpdate, RunFailed
from fedipfs.exchange import check_examples


def screen(
    replies: Iterable[Message], weighted_by_key: str, *, arrays: bool = True
) -> tuple[list[Message], dict[int, str]]:
    """Split replies into usable ones, by node id, and the reasons against the others.

    A usable reply has one array record (unless `arrays` is False, as for evaluation), one metric
    record with the same keys as most others', and a positive, finite weight under
    `weighted_by_key`.
    """
    answered, reasons = [], {}
    for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
        if reply.has_error():
            reasons[reply.metadata.src_node_id] = reply.error.reason or "error without a reason"
        else:
            answered.append(reply)
    usual = Counter(map(_keys, answered)).most_common(1)[0][0] if answered else ()
    good = []
    for reply in answered:
        try:
            _check(reply, usual, weighted_by_key, arrays)
        except BadUpdate as error:
            reasons[reply.metadata.src_node_id] = str(error)
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


def _keys(reply: Message) -> tuple[str, ...]:
    records = list(reply.content.metric_records.values())
    return tuple(sorted(records[0])) if len(records) == 1 else ()


def _check(reply: Message, usual: tuple[str, ...], weighted_by_key: str, arrays: bool) -> None:
    content = reply.content
    if arrays and len(content.array_records) != 1:
        raise BadUpdate(f"it holds {len(content.array_records)} array records instead of one")
    if len(content.metric_records) != 1:
        raise BadUpdate(f"it holds {len(content.metric_records)} metric records instead of one")
    (metrics,) = content.metric_records.values()
    check_examples(metrics.get(weighted_by_key))
    if _keys(reply) != usual:
        raise BadUpdate(f"its metrics are {list(_keys(reply))}, the others' {list(usual)}")
