"""Whoever lies is refused by name: the coordinator, a participant, somebody between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedipfs.errors import (
    BelowFloor,
    BothShares,
    NotInCohort,
    OutOfTurn,
    SecAggFailed,
    SecondAnswer,
    SignatureMissing,
    SignatureWrong,
    SignerUnknown,
    SurvivorsDiffer,
    TooLate,
    WrongKeys,
    WrongShare,
    WrongVector,
)
from fedipfs.secagg import (
    Advertise,
    Confirm,
    Floors,
    Masked,
    Parameters,
    Request,
    Roster,
    Server,
    Survivors,
    keys,
)

# A coordinator who lies about the terms


@pytest.mark.parametrize(
    ("floors", "message"),
    [
        (Floors(clients=6), "clients=5: this site demands at least 6"),
        (Floors(threshold=5), "threshold=4: this site demands at least 5"),
        (Floors(neighbours=5), "neighbours=4: this site demands at least 5"),
        (Floors(colluders=3), "colluders=2: this site demands at least 3"),
        (Floors(clip=(1.5, 2.0)), "clip=1.0: this site demands 1.5 to 2.0"),
        (Floors(clip=(0.1, 0.5)), "clip=1.0: this site demands 0.1 to 0.5"),
        (Floors(bits=(21, 24)), "bits=20: this site demands 21 to 24"),
        (Floors(parameters=bytes(32)), "this site has pinned 000000"),
    ],
)
def test_terms_below_the_floors_of_a_site(world, floors, message):
    asked = world()
    with pytest.raises(BelowFloor, match=message):
        asked.client("a00", floors=floors)
    assert not asked.folder.exists()  # it was not even looked at


def test_terms_at_the_floors_are_accepted(world):
    asked = world()
    pinned = asked.session.parameters.digest()
    floors = Floors(5, 4, 4, 2, (1.0, 1.0), (20, 20), pinned)
    asked.client("a00", floors=floors).advertise()


def test_a_threshold_that_two_sets_of_survivors_could_reach_cannot_be_announced(world):
    announced = world(clients=10).session.parameters.plain()
    for unsafe in ({"threshold": 5}, {"threshold": 5, "quorum": 5}, {"quorum": 6}):
        with pytest.raises(BelowFloor, match="parameters that no site should accept"):
            Parameters.of({**announced, **unsafe})


def test_a_round_is_not_announced_again_on_other_terms(world):
    asked = world()
    asked.client("a00").advertise()
    lowered = replace(asked.session, parameters=Parameters.choose(5, 40, clip=0.5))
    with pytest.raises(SecondAnswer, match="round 1 of run was announced on other terms before"):
        asked.client("a00", session=lowered).advertise()


def test_terms_that_one_client_was_told_differently(world):
    # Its signature covers the hash of what it was told.
    asked = world()
    other = replace(asked.session, parameters=replace(asked.session.parameters, clip=9.0))
    with pytest.raises(SignatureWrong):
        asked.server.take(asked.client("a00", session=other).advertise())


# Keys


def test_swapped_keys(world):
    asked = world().until("share")
    first, second, *rest = asked.roster.clients
    swapped = [
        replace(first, mask_key=second.mask_key, seal_key=second.seal_key),
        replace(second, mask_key=first.mask_key, seal_key=first.seal_key),
    ]
    with pytest.raises(SignatureWrong):
        asked.client("a04").share(Roster((*swapped, *rest)))
    with pytest.raises(WrongKeys, match="has other keys of a00"):
        asked.client("a00").share(Roster((*swapped, *rest)))


def test_keys_of_the_coordinators_own(world):
    asked = world().until("share")
    own = [keys.public_of(bytes([number] * 32)) for number in (1, 2)]
    forged = replace(asked.roster.clients[0], mask_key=own[0], seal_key=own[1])
    with pytest.raises(SignatureWrong):
        asked.client("a04").share(Roster((forged, *asked.roster.clients[1:])))


def test_keys_replayed_from_another_round_or_attempt(world):
    asked, before = world().until("share"), world(round=0).until("share")
    replayed = Roster((before.roster.clients[0], *asked.roster.clients[1:]))
    with pytest.raises(SignatureWrong):
        asked.client("a04").share(replayed)
    again = Server(replace(asked.session, attempt=1), asked.verify)
    with pytest.raises(SignatureWrong):
        again.take(asked.roster.clients[0])


def advertised(asked, name: str, mask_key: bytes, seal_key: bytes) -> Advertise:
    message = Advertise(name, mask_key, seal_key)
    return message.signed(asked.session, message.keys, asked.sign(name))


def test_copied_keys(world):
    asked = world().until("share")
    copied = advertised(asked, "a00", *asked.roster.clients[1].keys)
    with pytest.raises(WrongKeys, match="a00 and a01 show the same key"):
        asked.client("a04").share(Roster((copied, *asked.roster.clients[1:])))
    server = Server(asked.session, asked.verify)
    server.take(asked.roster.clients[1])
    with pytest.raises(WrongKeys, match="a00 shows a key of round 1 of run that is there already"):
        server.take(copied)
    with pytest.raises(WrongKeys):
        server.take(advertised(asked, "a02", bytes(31) + b"\1", bytes(31) + b"\1"))


@pytest.mark.parametrize("which", [0, 1])
def test_a_key_with_which_everybody_agrees(world, which):
    asked = world()
    fine = keys.public_of(bytes(range(32)))
    weak = advertised(asked, "a00", *((bytes(32), fine) if which == 0 else (fine, bytes(32))))
    with pytest.raises(WrongKeys, match="the key of a00 is a point of small order"):
        asked.server.take(weak)
    asked.advertise(without=["a00"])
    roster = Roster((weak, *asked.roster.clients))
    with pytest.raises(WrongKeys, match="the key of a00 is a point of small order"):
        asked.client("a04").share(roster)


def test_a_roster_for_each_client_opens_nothing(world):
    asked = world(clients=7).until("share")
    mine = Roster(asked.roster.clients[:6])
    sealed = asked.client("a00").share(asked.roster).sealed
    asked.client("a04").share(mine)
    asked.share(without=["a04"])
    others = asked.deliveries["a01"].sharers[:5]
    delivery = replace(asked.deliveries["a00"], to="a04", sharers=(*others[:4], "a04", "a05"))
    shown = tuple(sealed[3:4] * 5)
    with pytest.raises(WrongShare, match="what a00 sealed does not open"):
        asked.client("a04").mask(replace(delivery, sealed=shown), asked.vectors["a04"], asked.put)


# Participants who are none


def test_unsigned(world):
    asked = world().until("share")
    unsigned = replace(asked.roster.clients[0], signature=b"")
    with pytest.raises(SignatureMissing, match="a00 did not sign what it says at advertise"):
        asked.client("a04").share(Roster((unsigned, *asked.roster.clients[1:])))
    with pytest.raises(SignatureMissing):
        Server(asked.session, asked.verify).take(unsigned)


def test_unknown_participant(world):
    asked = world(clients=6)
    asked.listed = type(asked.listed)(asked.listed.members[:5])  # the sixth is nobody
    for name in asked.names[:5]:
        asked.server.take(asked.client(name).advertise())
    nobody = asked.client("a05").advertise()
    with pytest.raises(SignerUnknown, match="'a05' is not in the trust list"):
        asked.server.take(nobody)
    roster = Roster((*asked.server.close_advertise().clients, nobody))
    with pytest.raises(SignerUnknown):
        asked.client("a00").share(roster)


def test_not_in_the_cohort(world):
    asked, larger = world(), world(clients=6)
    stranger = larger.client("a05").advertise()
    with pytest.raises(NotInCohort, match="'a05' is not in the cohort of round 1 of run"):
        asked.server.take(stranger)
    asked.advertise()
    with pytest.raises(NotInCohort):
        asked.client("a00").share(Roster((*asked.roster.clients, stranger)))
    with pytest.raises(NotInCohort):
        larger.client("a05", session=asked.session)


def test_one_participant_in_anothers_name(world):
    asked = world().until("share")
    said = asked.client("a00").share(asked.roster)
    with pytest.raises(SignatureWrong):
        asked.server.take(replace(said, by="a01"))


# Shares


def test_shares_that_were_altered_moved_or_left_out(world):
    asked = world().until("mask")
    good = asked.deliveries["a02"]
    flipped = bytes([good.sealed[0][0] ^ 1]) + good.sealed[0][1:]
    for sealed, message in (
        ((flipped, *good.sealed[1:]), "what a00 sealed does not open"),
        ((*good.sealed[:2], good.sealed[3], good.sealed[2]), "what a03 sealed does not open"),
        (asked.deliveries["a03"].sealed, "what a00 sealed does not open"),
        (good.sealed[:3], "3 sealed shares came to a02 from 4 neighbours"),
    ):
        with pytest.raises(WrongShare, match=message):
            bad = replace(good, sealed=sealed)
            asked.client("a02").mask(bad, asked.vectors["a02"].copy(), asked.put)
    with pytest.raises(WrongShare, match="shares for a03 were sent to a02"):
        asked.client("a02").mask(asked.deliveries["a03"], asked.vectors["a02"], asked.put)
    assert not asked.store


def test_too_few_or_unknown_sharers(world):
    asked = world().until("mask")
    good = asked.deliveries["a02"]
    for sharers, kind in (
        (("a00", "a02", "a04"), SecAggFailed),
        (("a00", "a01", "a03", "a04"), TooLate),
        (("a00", "a01", "a02", "zz"), NotInCohort),
    ):
        with pytest.raises(kind):
            bad = replace(good, sharers=sharers)
            asked.client("a02").mask(bad, asked.vectors["a02"].copy(), asked.put)
    assert not asked.store


# Vectors


def test_a_vector_is_masked_once(world):
    asked = world().until("mask")
    with pytest.raises(RuntimeError, match="no space"):
        asked.client("a02").mask(asked.deliveries["a02"], asked.vectors["a02"].copy(), fails)
    with pytest.raises(SecondAnswer, match="a vector of a02 may have left"):
        asked.client("a02").mask(asked.deliveries["a02"], asked.vectors["a02"].copy(), asked.put)
    assert not asked.store


def fails(vector: np.ndarray) -> str:
    raise RuntimeError("no space")


def test_a_second_masked_in_a_round(world):
    asked = world().until("mask")
    first = asked.client("a02").mask(asked.deliveries["a02"], asked.vectors["a02"], asked.put)
    other = np.zeros_like(asked.vectors["a02"])
    assert asked.client("a02").masked(asked.deliveries["a02"]) == first
    assert asked.client("a02").mask(asked.deliveries["a02"], other, asked.put) == first
    assert not other.any() and len(asked.store) == 1
    fewer = replace(asked.deliveries["a02"], sharers=("a00", "a01", "a02", "a03"))
    with pytest.raises(SecondAnswer, match="masked of round 1 of run is answered already"):
        asked.client("a02").mask(fewer, other, asked.put)
    asked.server.take(first, asked.store[first.vector])
    other_vector = replace(first, vector="another").signed(
        asked.session, asked.roster.clients[2].keys, asked.sign("a02")
    )
    with pytest.raises(SecondAnswer, match="a02 answers masked of round 1 of run twice"):
        asked.server.take(other_vector, other)


def test_a_forged_or_substituted_cid(world):
    asked = world().until("confirm")
    survivors = asked.survivors.clients
    forged = Survivors((replace(survivors[0], vector="forged"), *survivors[1:]))
    with pytest.raises(WrongVector, match="forged is not the vector that a00 sent"):
        asked.client("a00").confirm(forged)
    with pytest.raises(SignatureWrong):
        asked.client("a01").confirm(forged)
    own = asked.roster.clients[0].keys
    copied = replace(survivors[0], vector=survivors[1].vector)
    copied = copied.signed(asked.session, own, asked.sign("a00"))
    with pytest.raises(WrongVector, match="a00 and a01 name one vector"):
        asked.client("a02").confirm(Survivors((copied, *survivors[1:])))


def test_a_vector_that_is_anothers_or_no_vector(world):
    asked = world().until("mask")
    first = asked.client("a00").mask(asked.deliveries["a00"], asked.vectors["a00"], asked.put)
    asked.server.take(first, asked.store[first.vector])
    second = asked.client("a01").mask(asked.deliveries["a01"], asked.vectors["a01"], asked.put)
    vector = asked.store[second.vector]
    for bad in (None, vector[:-1], vector.astype(np.int64), vector.reshape(2, -1)):
        with pytest.raises(WrongVector, match="the vector of a01 is not one of 40 uint32"):
            asked.server.take(second, bad)
    same = replace(second, vector=first.vector)
    same = same.signed(asked.session, asked.roster.clients[1].keys, asked.sign("a01"))
    with pytest.raises(WrongVector, match="a01 names a vector that is another's"):
        asked.server.take(same, vector)
    with pytest.raises(WrongVector, match="40 uint32 expected, not float32"):
        bad = np.zeros(40, np.float32)
        asked.client("a02").mask(asked.deliveries["a02"], bad, asked.put)
    fixed = np.zeros(40, np.uint32)
    fixed.flags.writeable = False
    for bad in (fixed, np.zeros(80, np.uint32)[::2]):
        with pytest.raises(WrongVector, match="must be contiguous and writable"):
            asked.client("a02").mask(asked.deliveries["a02"], bad, asked.put)


def test_a_late_vector(world):
    asked = world().until("mask")
    late = asked.client("a00").mask(asked.deliveries["a00"], asked.vectors["a00"], asked.put)
    asked.mask(without=["a00"])
    for _ in range(2):  # for ever
        with pytest.raises(TooLate):
            asked.server.take(late, asked.store[late.vector])
        asked.confirm() if asked.server.stage == "confirm" else asked.unmask()


# Survivors


def test_other_survivors_for_other_clients(world):
    # With 7 of 10 as the threshold no two sets can both be confirmed, and mixing them is seen.
    asked = world(clients=10).until("confirm")
    all_of_them = asked.survivors
    fewer = Survivors(all_of_them.clients[:8])
    one = [asked.client(name).confirm(all_of_them) for name in asked.names[5:]]
    two = [asked.client(name).confirm(fewer) for name in asked.names[:5]]
    told = Request(asked.names, (), tuple(sorted(one + two, key=lambda each: each.by)))
    with pytest.raises(SurvivorsDiffer, match="a00 has confirmed other survivors"):
        asked.client("a05").unmask(told)
    with pytest.raises(SecAggFailed, match=r"5 clients confirmed the survivors .* 7 are needed"):
        asked.client("a05").unmask(Request(asked.names, (), tuple(one)))
    with pytest.raises(SecAggFailed, match="5 clients confirmed"):
        asked.client("a00").unmask(Request(asked.names[:8], asked.names[8:], tuple(two)))
    with pytest.raises(SurvivorsDiffer, match="a00 confirms other survivors"):
        asked.server.take(two[0])
    with pytest.raises(SurvivorsDiffer, match="a00 has confirmed other survivors"):
        asked.client("a00").confirm(all_of_them)


def test_other_sharers_for_other_clients(world):
    asked = world().until("mask")
    told = asked.deliveries["a00"]
    fewer = replace(told, sharers=told.sharers[:4], sealed=told.sealed[:3])
    message = asked.client("a00").mask(fewer, asked.vectors["a00"], asked.put)
    with pytest.raises(SurvivorsDiffer, match="a00 masked among other sharers"):
        asked.server.take(message, asked.store[message.vector])
    asked.mask(without=["a00"])
    mixed = Survivors((message, *asked.survivors.clients))
    with pytest.raises(SurvivorsDiffer, match="a00 was shown other sharers"):
        asked.client("a01").confirm(mixed)


def test_too_few_or_unknown_survivors(world):
    asked = world().until("mask", share=["a04"])
    asked.mask()
    few = Survivors(asked.survivors.clients[:3])
    with pytest.raises(SecAggFailed, match="3 clients sent vectors in round 1 of run: 4"):
        asked.client("a00").confirm(few)
    with pytest.raises(TooLate, match="a03 does not count as a survivor"):
        asked.client("a03").confirm(few)
    never = Masked("a04", asked.survivors.clients[0].sharers, "nothing", bytes(64))
    with pytest.raises(NotInCohort, match="a04 has not shared secrets"):
        asked.client("a00").confirm(Survivors((*asked.survivors.clients, never)))


def test_forged_confirmations(world):
    asked = world(clients=7).until("unmask", mask=["a06"], confirm=["a05"])
    request = asked.request
    assert len(request.confirmations) == 5
    digest = asked.survivors.digest
    client = asked.client("a00")
    four = request.confirmations[:4]
    for name, kind in (("a05", SignatureWrong), ("a06", NotInCohort)):
        with pytest.raises(kind):
            client.unmask(replace(request, confirmations=(*four, Confirm(name, digest, bytes(64)))))
    with pytest.raises(SignatureMissing):
        client.unmask(replace(request, confirmations=(*four, Confirm("a05", digest))))
    with pytest.raises(SecAggFailed, match="4 clients confirmed"):
        client.unmask(replace(request, confirmations=four))
    client.unmask(request)


# Unmasking


def test_both_shares_of_one_peer(world):
    asked = world().until("unmask", mask=["a04"])
    both = replace(asked.request, dropped=("a03", "a04"))
    with pytest.raises(BothShares, match="asked for both shares of a03 in round 1 of run"):
        asked.client("a00").unmask(both)
    # Nor one of another kind than the survivors call for, nor none.
    for survivors, dropped in (
        (("a00", "a01", "a02"), ("a03", "a04")),
        (asked.request.survivors, ()),
        (asked.request.survivors, ("a04", "zz")),
        (asked.names, ()),
    ):
        with pytest.raises(SurvivorsDiffer):
            told = replace(asked.request, survivors=survivors, dropped=dropped)
            asked.client("a00").unmask(told)


def test_two_answers_to_unmask(world):
    asked = world(clients=7).until("unmask")
    first = asked.client("a00").unmask(asked.request)
    assert asked.client("a00").unmask(asked.request) == first
    other = replace(asked.request, confirmations=asked.request.confirmations[:4])
    with pytest.raises(SecondAnswer, match="unmask of round 1 of run is answered already"):
        asked.client("a00").unmask(other)


def test_the_other_share_in_another_attempt(world):
    asked = world().until("mask")
    again = replace(asked.session, attempt=1)
    asked.mask()
    for play in (asked.confirm, asked.unmask):
        with pytest.raises(SecondAnswer, match="a vector of round 1 may have left in another"):
            asked.client("a00", session=again).advertise()
        play()
    with pytest.raises(SecondAnswer, match="a vector of round 1 may have left in another"):
        asked.client("a00", session=again).advertise()
    with pytest.raises(TooLate, match="has ended here"):
        asked.client("a00").share(asked.roster)


def test_an_attempt_ends_the_one_before(world):
    asked = world().until("mask")
    again = replace(asked.session, attempt=1)
    asked.client("a00", session=again).advertise()
    client, delivery = asked.client("a00"), asked.deliveries["a00"]
    for ask in (client.advertise, lambda: client.mask(delivery, asked.vectors["a00"], asked.put)):
        with pytest.raises(TooLate, match="has ended here: round 1 has begun"):
            ask()
    assert not asked.store


@pytest.mark.parametrize("stage", ["share", "mask", "confirm", "unmask"])
def test_other_terms_halfway(world, stage):
    # A lower quorum, say, that only the last message tells of.
    asked = world(clients=10, threshold=8).until(stage)
    terms = replace(asked.session.parameters, quorum=8, threshold=7, dropouts=1)
    lowered = asked.client("a00", session=replace(asked.session, parameters=terms))
    ask = {
        "share": lambda: lowered.share(asked.roster),
        "mask": lambda: lowered.mask(asked.deliveries["a00"], asked.vectors["a00"], asked.put),
        "confirm": lambda: lowered.confirm(asked.survivors),
        "unmask": lambda: lowered.unmask(asked.request),
    }
    with pytest.raises(SecondAnswer, match="was announced on other terms before"):
        ask[stage]()


def test_a_round_ends_the_ones_before(world):
    asked = world(round=4).until("unmask")
    later = replace(asked.session, round=5)
    asked.client("a00", session=later).advertise()
    with pytest.raises(TooLate, match="round 5 has begun"):
        asked.client("a00").advertise()


def test_stages_out_of_turn(world):
    asked = world().until("mask")
    client = asked.client("a00")
    with pytest.raises(OutOfTurn, match="masked of round 1 of run has not been answered here"):
        client.confirm(Survivors(()))
    with pytest.raises(OutOfTurn, match="confirm of round 1 of run has not been"):
        client.unmask(Request((), (), ()))
    with pytest.raises(OutOfTurn, match="a00 answers confirm before it is asked"):
        asked.server.take(Confirm("a00", bytes(32), bytes(64)))
    with pytest.raises(TooLate, match="a00 answers advertise after it was closed"):
        asked.server.take(asked.roster.clients[0])
    for close in (asked.server.close_advertise, asked.server.close_confirm):
        with pytest.raises(OutOfTurn):
            close()
    with pytest.raises(OutOfTurn, match="cannot be unmasked yet"):
        asked.server.result()


def test_wrong_shares_give_no_sum(world):
    asked = world().until("unmask", mask=["a04"])
    for name in asked.server.missing():
        answer = asked.client(name).unmask(asked.request)
        if name == "a01":
            shares = (answer.shares[0], bytes(33), *answer.shares[2:])
            answer = replace(answer, shares=shares)
            answer = answer.signed(asked.session, asked.roster.clients[1].keys, asked.sign(name))
        asked.server.take(answer)
    with pytest.raises(SecAggFailed, match=r"a01.* there is no sum|a secret of a01 is lost"):
        asked.server.result()


def test_shares_that_were_not_asked_for(world):
    asked = world().until("unmask")
    answer = asked.client("a00").unmask(asked.request)
    shown = asked.roster.clients[0].keys
    for shares, kind in (
        (answer.shares[:-1], WrongShare),
        ((*answer.shares[:-1], b"\xff" * 33), WrongShare),
    ):
        bad = replace(answer, shares=shares).signed(asked.session, shown, asked.sign("a00"))
        with pytest.raises(kind):
            asked.server.take(bad)
    bad = replace(answer, request=bytes(32)).signed(asked.session, shown, asked.sign("a00"))
    with pytest.raises(SurvivorsDiffer, match="a00 unmasks another sum"):
        asked.server.take(bad)
    asked.server.take(answer)
