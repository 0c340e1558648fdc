"""A party: whom it deals with, as its trust list says now."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from fedipfs.errors import (
    SignatureMissing,
    SignatureWrong,
    SignerExpired,
    SignerRevoked,
    SignerUnknown,
    TrustListError,
)
from fedipfs.ipld import CID
from fedipfs.trust import Identity, Member, Statement, TrustList
from fedipfs.trust.party import Party

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
ACME, ALPHA, BETA = (Identity.new(name) for name in ("acme", "alpha", "beta"))
LISTED = [
    Member(ACME.public, "coordinator"),
    Member(ALPHA.public, "participant"),
    Member(BETA.public, "participant"),
]
SAID = Statement(CID.of(b"x"), "run", 1, "update")


@pytest.fixture
def path(tmp_path):
    TrustList(LISTED).save(tmp_path / "trust.toml")
    return tmp_path / "trust.toml"


def coordinator(path) -> Party:
    return Party(ACME, "coordinator", path)


def said_by(identity: Identity) -> bytes:
    return Party(identity, "participant", TrustList()).sign(SAID)


def test_the_two_sides_of_a_run(path):
    here, there = coordinator(path), Party(ALPHA, "participant", path)
    assert (here.name, here.others) == ("acme", "participant")
    assert (there.name, there.others) == ("alpha", "coordinator")
    assert here.audience() == [ACME.public, ALPHA.public, BETA.public]
    assert there.audience() == [ACME.public]
    assert there.verify("acme", SAID, here.sign(SAID)).identity == ACME.public
    assert here.verify("alpha", SAID, there.sign(SAID)).identity == ALPHA.public


def test_each_side_checks_the_other_not_its_own(path):
    here, there = coordinator(path), Party(ALPHA, "participant", path)
    with pytest.raises(SignerUnknown, match="as coordinator"):
        there.verify("beta", SAID, said_by(BETA))
    with pytest.raises(SignerUnknown, match="as participant"):
        here.verify("acme", SAID, here.sign(SAID))
    with pytest.raises(SignatureMissing, match="alpha"):
        here.verify("alpha", SAID, None)
    with pytest.raises(SignatureWrong):
        here.verify("alpha", SAID, said_by(BETA))


@pytest.mark.parametrize(
    ("dates", "error"),
    [
        ({"revoked": NOW - HOUR}, SignerRevoked),
        ({"valid_to": NOW - HOUR}, SignerExpired),
        ({"valid_from": NOW + 24 * HOUR}, SignerExpired),
    ],
)
def test_a_changed_list_counts_at_once_for_signatures_and_recipients(path, dates, error):
    party = coordinator(path)
    assert party.verify("beta", SAID, said_by(BETA)).identity == BETA.public
    TrustList([*LISTED[:2], replace(LISTED[2], **dates)]).save(path)
    with pytest.raises(error, match="beta"):
        party.verify("beta", SAID, said_by(BETA))
    assert party.audience() == [ACME.public, ALPHA.public]
    TrustList(LISTED).save(path)
    assert party.audience() == [ACME.public, ALPHA.public, BETA.public]


def test_a_list_given_as_such_stays_as_it_is():
    party = Party(ACME, "coordinator", TrustList(LISTED))
    assert party.audience() == [ACME.public, ALPHA.public, BETA.public]
    assert party.trusted is party.trusted


def test_an_unchanged_list_is_not_read_again(path):
    party = coordinator(path)
    assert party.trusted is party.trusted


def test_a_list_rewritten_in_place_to_the_same_size_is_read_again(path):
    party = coordinator(path)
    assert len(party.trusted.members) == 3
    text = path.read_text()
    changed = text.replace('role = "coordinator"', 'role = "participant"')
    assert len(changed) == len(text)
    path.write_text(changed)
    assert {one.role for one in party.trusted.members} == {"participant"}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "No such file or directory; `fedipfs keys trust` makes one"),
        (lambda path: path.write_text("nonsense"), "is not TOML"),
        (lambda path: os.chmod(path, 0o666) or os.utime(path), "can be changed by other users"),
    ],
)
def test_a_list_that_is_lost_or_spoilt_trusts_nobody(path, spoil, says):
    party = coordinator(path)
    assert party.audience()
    spoil(path)
    for _ in range(2):
        with pytest.raises(TrustListError, match=says):
            party.verify("alpha", SAID, said_by(ALPHA))
        with pytest.raises(TrustListError, match=says):
            party.audience()
    path.unlink(missing_ok=True)
    TrustList(LISTED).save(path)
    assert party.verify("alpha", SAID, said_by(ALPHA)).identity == ALPHA.public


def test_two_keys_of_an_organization_both_count_while_they_overlap(path):
    party, newer = coordinator(path), Identity.new("alpha")
    TrustList([*LISTED, Member(newer.public, "participant")]).save(path)
    for keys in (ALPHA, newer):
        assert party.verify("alpha", SAID, said_by(keys)).identity == keys.public
        assert keys.public in party.audience()
    TrustList(
        [
            LISTED[0],
            replace(LISTED[1], valid_to=NOW - HOUR),
            LISTED[2],
            Member(newer.public, "participant"),
        ]
    ).save(path)
    with pytest.raises(SignerExpired):
        party.verify("alpha", SAID, said_by(ALPHA))
    assert party.verify("alpha", SAID, said_by(newer)).identity == newer.public


def test_its_own_signature_counts_and_that_of_other_coordinators_it_trusts(path):
    other, stranger = Identity.new("umbrella"), Identity.new("stranger")
    TrustList([*LISTED, Member(other.public, "coordinator")]).save(path)
    party = coordinator(path)
    party.verify_own("acme", SAID, party.sign(SAID))
    party.verify_own("umbrella", SAID, Party(other, "coordinator", TrustList()).sign(SAID))
    with pytest.raises(SignerUnknown):
        party.verify_own("stranger", SAID, Party(stranger, "coordinator", TrustList()).sign(SAID))
    with pytest.raises(SignerUnknown):
        party.verify_own("alpha", SAID, said_by(ALPHA))
    with pytest.raises(SignatureWrong):
        party.verify_own("acme", SAID, Party(other, "coordinator", TrustList()).sign(SAID))
    with pytest.raises(SignatureMissing):
        party.verify_own("acme", SAID, None)


@pytest.mark.parametrize(
    ("dates", "error"),
    [({"revoked": NOW - HOUR}, SignerRevoked), ({"valid_to": NOW - HOUR}, SignerExpired)],
)
def test_its_own_signature_does_not_count_against_its_own_list(path, dates, error):
    party = coordinator(path)
    TrustList([replace(LISTED[0], **dates), *LISTED[1:]]).save(path)
    with pytest.raises(error):
        party.verify_own("acme", SAID, party.sign(SAID))
    TrustList(LISTED[1:]).save(path)
    party.verify_own("acme", SAID, party.sign(SAID))


def test_what_is_for_one_organization_is_not_for_the_others(path):
    rival = Identity.new("rival")
    TrustList([*LISTED, Member(rival.public, "coordinator")]).save(path)
    there = Party(ALPHA, "participant", path)
    assert there.audience() == [ACME.public, rival.public]
    assert there.audience("acme") == [ACME.public]
    assert there.audience("nobody") == []
    assert coordinator(path).audience("beta") == [ACME.public, BETA.public]


def test_a_party_shows_no_key():
    party = Party(ACME, "coordinator", TrustList(LISTED))
    assert "PRIVATE" not in f"{party!r} {vars(party)!r}"
