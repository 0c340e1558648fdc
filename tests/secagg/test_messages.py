"""Messages: what they are as bytes, and that nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import BadMessage, BelowFloor, FedIPFSError, FormatError
from fedipfs.ipld import CID, dagcbor
from fedipfs.secagg import (
    Advertise,
    Confirm,
    Delivery,
    Masked,
    Parameters,
    Record,
    Request,
    Roster,
    Session,
    Share,
    Survivors,
    Unmask,
)

HASH, KEY, SIGNATURE = bytes(32), b"\1" * 32, bytes(64)
ADVERTISE = Advertise("a", KEY, HASH, SIGNATURE)
SHARE = Share("a", HASH, KEY, (bytes(82), bytes(82)), SIGNATURE)
MASKED = Masked("a", HASH, "bafy", SIGNATURE)
CONFIRM = Confirm("a", HASH, SIGNATURE)
MESSAGES = [
    ADVERTISE,
    Roster((ADVERTISE, replace(ADVERTISE, by="b"))),
    SHARE,
    Delivery("a", ("a", "b"), (bytes(82),)),
    MASKED,
    Survivors((MASKED, replace(MASKED, by="b"))),
    CONFIRM,
    Request(("a", "b"), ("c",), (CONFIRM,)),
    Unmask("a", HASH, (bytes(33), bytes(33)), SIGNATURE),
]
NAMES = [type(each).__name__ for each in MESSAGES]


@pytest.mark.parametrize("message", MESSAGES, ids=NAMES)
def test_to_bytes_and_back(message):
    block = message.to_bytes()
    found = type(message).from_bytes(block)
    assert found == message and found.digest == message.digest
    assert found.to_bytes() == block


@pytest.mark.parametrize("message", MESSAGES, ids=NAMES)
def test_no_kind_is_taken_for_another(message):
    for other in MESSAGES:
        if other is not message:
            with pytest.raises(BadMessage, match="expected a message of the kind"):
                type(other).from_bytes(message.to_bytes())


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.text(max_size=70),
    st.binary(max_size=90),
    st.lists(st.binary(max_size=90), max_size=3),
    st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=2),
    st.just(CID.of(b"x")),
)


@settings(max_examples=300)
@given(st.sampled_from(MESSAGES), st.data())
def test_other_values_are_refused_or_kept(message, data):
    found = dagcbor.decode(message.to_bytes())
    name = data.draw(st.sampled_from(sorted(found)))
    found[name] = data.draw(VALUES)
    try:
        taken = type(message).from_bytes(dagcbor.encode(found))
    except BadMessage:
        return
    assert taken.to_bytes() == dagcbor.encode(found)


@settings(max_examples=300)
@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_bytes_are_refused_or_kept(message, data):
    block = bytearray(message.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    block = block[: data.draw(st.integers(0, len(block)))]
    for kind in (type(message), Session, Record):
        try:
            taken = kind.from_bytes(bytes(block))
        except (FormatError, BelowFloor):
            continue
        assert taken.to_bytes() == bytes(block)


def test_missing_and_further_fields_are_refused():
    for message in MESSAGES:
        found = dagcbor.decode(message.to_bytes())
        for changed in (
            {**found, "more": 1},
            {name: found[name] for name in found if name != "kind"},
            *({n: found[n] for n in found if n != name} for name in found),
            list(found),
            None,
        ):
            with pytest.raises(BadMessage):
                type(message).from_bytes(dagcbor.encode(changed))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Roster((ADVERTISE, ADVERTISE)),
        lambda: Roster((replace(ADVERTISE, by="b"), ADVERTISE)),
        lambda: Survivors((replace(MASKED, by="b"), MASKED)),
        lambda: Request(("b", "a"), (), ()),
        lambda: Request((), ("a", "a"), ()),
        lambda: Request((), (), (CONFIRM, CONFIRM)),
        lambda: Delivery("a", ("b", "a"), ()),
        lambda: Delivery("a", ["a"], ()),
        lambda: Delivery("", (), ()),
        lambda: Delivery("a", (), (bytes(81),)),
        lambda: Advertise("a", KEY, HASH[:31], SIGNATURE),
        lambda: Advertise("a" * 65, KEY, HASH, SIGNATURE),
        lambda: Advertise("a", KEY, HASH, SIGNATURE[:63]),
        lambda: Masked("a", HASH, "", SIGNATURE),
        lambda: Masked("a", HASH, "x" * 257, SIGNATURE),
        lambda: Share("a", HASH, KEY, (bytes(83),), SIGNATURE),
        lambda: Unmask("a", HASH, (bytes(32),), SIGNATURE),
        lambda: Roster((CONFIRM,)),
    ],
)
def test_what_cannot_be_is_not_made(make):
    with pytest.raises(BadMessage):
        make()


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "fedipfs-secagg/v2"},
        {"cohort": ["b", "a", "c"]},
        {"cohort": "abc"},
        {"cohort": ["a", "b"]},
        {"round": -1},
        {"round": "1"},
        {"run": ""},
        {"attempt": None},
        {"parameters": {}},
        {"parameters": None},
        {"more": 0},
    ],
)
def test_sessions_that_cannot_be(change):
    session = Session("run", 1, ("a", "b", "c"), Parameters.choose(3, 1))
    found = {**dagcbor.decode(session.to_bytes()), **change}
    with pytest.raises((FormatError, BelowFloor)):
        Session.from_bytes(dagcbor.encode(found))


def test_shares_are_not_shown():
    assert "x00" not in repr(replace(MESSAGES[-1], request=b"r" * 32, signature=b"s" * 64))


def test_sizes(world):
    # What the README of the protocol says a client uploads, for a cohort of ten.
    played = world(clients=10).until("unmask")
    names = played.names
    answers = [
        (played.roster.clients[0], 300),
        (played.server._taken["share"][names[0]], 82 * 9 + 300),
        (played.survivors.clients[0], 300),
        (played.request.confirmations[0], 200),
        (played.client(names[0]).unmask(played.request), 33 * 10 + 200),
    ]
    for answer, limit in answers:
        assert len(answer.to_bytes()) <= limit


# Records


CHANGES = {
    "another vector": lambda r: {
        "survivors": (replace(r.survivors[0], vector="x"), *r.survivors[1:])
    },
    "a survivor less": lambda r: {"survivors": r.survivors[1:], "seeds": r.seeds[1:]},
    "seeds swapped": lambda r: {"seeds": r.seeds[::-1]},
    "another seed": lambda r: {"seeds": (bytes(32), *r.seeds[1:])},
    "another mask key": lambda r: {"mask_keys": (bytes(32),)},
    "another commitment": lambda r: {
        "commitments": (replace(r.commitments[0], commitment=bytes(32)), *r.commitments[1:])
    },
    "other sealed shares": lambda r: {
        "commitments": (replace(r.commitments[0], sealed_hash=bytes(32)), *r.commitments[1:])
    },
    "another roster": lambda r: {
        "commitments": (replace(r.commitments[0], roster=bytes(32)), *r.commitments[1:])
    },
    "fewer confirmations": lambda r: {"confirmations": r.confirmations[1:]},
    "a client less": lambda r: {"clients": r.clients[1:]},
    "another session": lambda r: {"session": r.session.replace(b"\x63run", b"\x63nur")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_that_was_changed_is_refused(world, change):
    played = world(clients=7)
    record = played.play(mask=["a03"]).record
    assert record.dropped == ("a03",)
    with pytest.raises(FedIPFSError):
        replace(record, **CHANGES[change](record)).audit(played.verify, played.store.__getitem__)


def test_a_record_is_checked_for_its_shape(world):
    record = world().play().record
    for change in ({"seeds": record.seeds[1:]}, {"mask_keys": (bytes(32),)}, {"total": 3}):
        with pytest.raises(BadMessage):
            replace(record, **change)
