"""The client's skin: a Flower mod that swaps CIDs for arrays and back."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

from flwr.app import Context, Message, RecordDict

from fedipfs.exchange.compressing import Answers, asked_of
from fedipfs.exchange.default import default_vault
from fedipfs.exchange.heart import Exchange
from fedipfs.exchange.signing import Stamp, address, attempt_of, check, signer_of, stamp_of
from fedipfs.trust import PublicIdentity

PREFETCH = "query.prefetch"  # the type of a message that announces the next model


class Asked(NamedTuple):
    """What the message that a client is answering was signed for, and by which coordinator.

    `sender` are the keys that it was signed with; `attempt` grows each time that the coordinator
    begins anew on the run.
    """

    stamp: Stamp
    by: str
    sender: PublicIdentity
    attempt: int


_asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


def answering() -> Asked | None:
    """For an app behind `cid_mod`; None where there are no keys."""
    return _asked.get()


def cid_mod(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Use as the first (outermost) mod: `ClientApp(mods=[cid_mod])` or on train and evaluate.

    The app sees array records as if they had been sent; they are fetched from the store that
    $FEDIPFS_STORE names, verified, on access. A model that is only announced (CidGrid.announce) is
    fetched, and the app is not asked. The reply's arrays go into the store and only
    their CIDs travel; compressed, if the message asks for it (see compressing.py). With keys
    ($FEDIPFS_IDENTITY, see default.py) what came must be signed by a
    coordinator for this node, and the reply is signed, and sealed for that coordinator alone.
    Raises what `Exchange` raises, and CompressionError; Flower turns that into an error reply.
    """
    exchange = Exchange(default_vault("participant"))
    stamp, reader = stamp_of(message.content), signer_of(message.content)
    # The node's own number: that in the message is of whoever carried it.
    expected = stamp and stamp._replace(to=address(message, context.node_id))
    crossed = message.content
    message.content = exchange.swap_in(crossed, expected=expected)
    answers = Answers(asked_of(crossed), message.content, context)
    signed = None
    if stamp and reader and exchange.vault.party is not None:
        sender = check(exchange.vault, crossed, expected).identity
        signed = Asked(stamp, reader, sender, attempt_of(crossed))
    token = _asked.set(signed)
    try:
        if message.metadata.message_type == PREFETCH:
            reply = Message(RecordDict(), reply_to=message)
        else:
            reply = call_next(message, context)
    finally:
        _asked.reset(token)
    if reply.has_content():
        reply.content = exchange.swap_out(reply.content, stamp, reader=reader, put=answers.put)
    return reply
