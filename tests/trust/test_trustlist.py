"""Trust lists: whose keys count when, and every list that is refused."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import (
    SignatureRefused,
    SignerExpired,
    SignerRevoked,
    SignerUnknown,
    TrustListError,
)
from fedipfs.trust import Identity, Member, PublicIdentity, TrustList

KEYS = [Identity.new(f"org-{number}").public for number in range(4)]
DAY = timedelta(days=1)
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def rotated(public: PublicIdentity) -> PublicIdentity:
    return Identity.new(public.organization).public


def organizations(members: list[Member]) -> list[str]:
    return [member.identity.organization for member in members]


# ---- who counts


def test_current_is_valid_in_the_role_and_sorted() -> None:
    known = TrustList(
        [
            Member(KEYS[3], "participant"),
            Member(KEYS[0], "participant", valid_from=NOW - DAY, valid_to=NOW + DAY),
            Member(KEYS[1], "participant", revoked=NOW - DAY),
            Member(KEYS[2], "coordinator"),
            Member(rotated(KEYS[2]), "participant", valid_to=NOW - DAY),
        ]
    )
    assert organizations(known.current("participant", NOW)) == ["org-0", "org-3"]
    assert organizations(known.current("coordinator", NOW)) == ["org-2"]
    assert organizations(known.current("participant", NOW - 2 * DAY)) == ["org-1", "org-2", "org-3"]


@pytest.mark.parametrize(
    ("dates", "refusal"),
    [
        ({"valid_from": NOW}, None),
        ({"valid_from": NOW + timedelta(microseconds=1)}, SignerExpired),
        ({"valid_to": NOW}, SignerExpired),
        ({"valid_to": NOW + timedelta(microseconds=1)}, None),
        ({"revoked": NOW}, SignerRevoked),
        ({"revoked": NOW + timedelta(microseconds=1)}, None),
        ({"valid_to": NOW - DAY, "revoked": NOW - DAY}, SignerRevoked),
    ],
)
def test_dates_count_to_the_moment(
    dates: dict[str, datetime], refusal: type[SignatureRefused] | None
) -> None:
    known = TrustList([Member(KEYS[0], "participant", **dates)])
    if refusal is None:
        assert organizations(known.signer("org-0", "participant", NOW)) == ["org-0"]
        return
    with pytest.raises(refusal, match="org-0"):
        known.signer("org-0", "participant", NOW)
    assert known.current("participant", NOW) == []


def test_unknown_signers_and_roles() -> None:
    known = TrustList([Member(KEYS[0], "participant")])
    for organization, role in (
        ("org-1", "participant"),
        ("org-0", "coordinator"),
        ("", "x\n" * 99),
    ):
        with pytest.raises(SignerUnknown, match="not in the trust list as"):
            known.signer(organization, role, NOW)  # type: ignore[arg-type]
    with pytest.raises(SignerUnknown):
        TrustList().signer("org-0", "participant", NOW)


def test_an_organization_changes_its_key_without_a_gap() -> None:
    old, new = KEYS[0], rotated(KEYS[0])
    known = TrustList([Member(old, "participant", valid_to=NOW), Member(new, "participant")])
    at = {moment: known.signer("org-0", "participant", moment) for moment in (NOW - DAY, NOW)}
    assert [member.identity for member in at[NOW - DAY]] == [old, new]
    assert [member.identity for member in at[NOW]] == [new]
    known = known.revoke(new.fingerprint, NOW)
    for members in (known.members, known.members[::-1]):
        with pytest.raises(SignerExpired):  # the better news of the two
            TrustList(members).signer("org-0", "participant", NOW)


def test_revoking_by_name_and_by_fingerprint() -> None:
    new = rotated(KEYS[0])
    known = TrustList(
        [
            *(Member(key, "participant") for key in (KEYS[0], new, KEYS[1])),
            Member(KEYS[0], "coordinator"),
        ]
    )
    one = known.revoke(KEYS[0].fingerprint.upper().replace(" ", "-"), NOW)
    assert [member.revoked for member in one.members] == [NOW, None, None, NOW]
    both = one.revoke("org-0", NOW + DAY)
    assert [member.revoked for member in both.members] == [NOW, NOW + DAY, None, NOW]
    assert both.revoke("org-0", NOW - DAY).members[0].revoked == NOW - DAY
    assert all(member.revoked is None for member in known.members)
    for name in ("org-9", "", KEYS[2].fingerprint):
        with pytest.raises(TrustListError, match="not in the trust list"):
            known.revoke(name, NOW)


def test_naive_moments_are_refused_everywhere() -> None:
    naive = datetime(2026, 1, 1)
    known = TrustList([Member(KEYS[0], "participant")])
    for call in (
        lambda: known.current("participant", naive),
        lambda: known.signer("org-0", "participant", naive),
        lambda: known.revoke("org-0", naive),
        lambda: Member(KEYS[0], "participant", valid_from=naive),
        lambda: Member(KEYS[0], "participant", revoked=naive),
    ):
        with pytest.raises(TrustListError, match="with an offset"):
            call()


# ---- contradictions


def test_contradictions_are_refused() -> None:
    first, second = KEYS[:2]
    for thief in (
        PublicIdentity("thief", first.signing, second.sealing),
        PublicIdentity("thief", second.signing, first.sealing),
        PublicIdentity("org-0", first.signing, second.sealing),
    ):
        with pytest.raises(TrustListError, match="share a key"):
            TrustList([Member(first, "participant"), Member(thief, "participant")])
    with pytest.raises(TrustListError, match="org-0 is listed twice as participant"):
        TrustList([Member(first, "participant")]).trust(Member(first, "participant", NOW))
    with pytest.raises(TrustListError, match="not after valid_from"):
        Member(first, "participant", NOW, NOW)
    with pytest.raises(TrustListError, match="coordinator or participant"):
        Member(first, "boss")  # type: ignore[arg-type]
    both = TrustList([Member(first, "participant")]).trust(Member(first, "coordinator"))
    assert len(both.members) == 2


# ---- files

moments = st.datetimes(
    min_value=datetime(1970, 1, 2),
    max_value=datetime(9000, 1, 1),
    timezones=st.integers(-23 * 60, 23 * 60).map(lambda m: timezone(timedelta(minutes=m))),
)


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    chosen = draw(st.lists(st.sampled_from(KEYS), unique=True))
    found = []
    for public in chosen:
        dates = sorted(draw(st.lists(moments, min_size=3, max_size=3, unique=True)))
        kept = [date if draw(st.booleans()) else None for date in dates]
        role = draw(st.sampled_from(["coordinator", "participant"]))
        found.append(Member(public, role, *kept))  # type: ignore[arg-type]
    return found


@settings(max_examples=50)
@given(members())
def test_lists_come_back(tmp_path_factory: pytest.TempPathFactory, chosen: list[Member]) -> None:
    path = tmp_path_factory.mktemp("list") / "trust.toml"
    known = TrustList(chosen)
    known.save(path)
    assert TrustList.load(path) == known
    assert path.read_text() == known.dumps() == TrustList.load(path).dumps()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o644)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    known = TrustList(
        [Member(KEYS[0], "participant", NOW, NOW + DAY), Member(KEYS[1], "participant")]
    )
    return written(tmp_path / "trust.toml", known.dumps())


CHANGES: dict[str, tuple[str, str, str]] = {
    "another version": ("trust/v1", "trust/v2", "expected 'fedipfs-trust/v1'"),
    "an unknown table": ("[[member]]", "[[members]]", "'members' is not known"),
    "one table": ("[[member]]", "[member]", "TOML|is not a list"),
    "an unknown key": ("role =", "note = 1\nrole =", "member 1: 'note' is not known"),
    "a misspelt date": ("valid_to", "valid_until", "member 1: 'valid_until' is not known"),
    "no role": ('role = "participant"\n', "", "member 1: role is missing"),
    "another role": ('"participant"', '"boss"', "member 1: org-0: role 'boss' must be"),
    "another fingerprint": ('fingerprint = "', 'fingerprint = "a', "have the fingerprint"),
    "another name": ('"org-1"', '"org-2"', "member 2: .* have the fingerprint"),
    "a bad name": ('"org-0"', '"org 0"', "member 1: organization 'org 0'"),
    "a naive date": ("+00:00", "", "member 1: org-0: valid_from .* with an offset"),
    "a day": ("2026-06-01T12:00:00+00:00", "2026-06-01", "is not a datetime"),
    "a text": ("2026-06-01T12:00:00+00:00", '"today"', "is not a datetime"),
    "year zero": ("2026-06-01T12:00:00+00:00", "0001-01-01T00:00:00+23:00", "with an offset"),
    "no span": ("2026-06-02", "2026-05-02", "member 1: org-0: .* is not after valid_from"),
    "not TOML": ("[[", "[", "TOML"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_malformed_lists_are_refused(path: Path, change: str) -> None:
    old, new, problem = CHANGES[change]
    assert old in path.read_text()
    written(path, path.read_text().replace(old, new))
    with pytest.raises(TrustListError, match=problem) as caught:
        TrustList.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_contradictions_in_files_name_the_file(path: Path) -> None:
    entry = path.read_text().split("[[member]]")[1]
    written(path, f"{path.read_text()}\n[[member]]{entry}")
    with pytest.raises(TrustListError, match=rf"{path}: org-0 is listed twice"):
        TrustList.load(path)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o620])
def test_lists_that_others_can_change_are_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(TrustListError, match=f"can be changed by other users: chmod go-w {path}"):
        TrustList.load(path)


def test_lists_of_other_users_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only an owner who is neither root nor this user can be told apart, and only root can make one.
    real = os.fstat

    def theirs(file: int) -> os.stat_result:
        found = list(real(file))
        found[4] = os.geteuid() + 1
        return os.stat_result(found)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", theirs)
        with pytest.raises(TrustListError, match="belongs to another user"):
            TrustList.load(path)
    assert TrustList.load(path).members


def test_missing_and_oversized_lists(tmp_path: Path) -> None:
    with pytest.raises(TrustListError, match=r"cannot read .*No such file"):
        TrustList.load(tmp_path / "none")
    with pytest.raises(TrustListError, match="more than"):
        TrustList.load(written(tmp_path / "large", "#" * (5 << 20)))
    assert TrustList.load(written(tmp_path / "empty", 'format = "fedipfs-trust/v1"')).members == ()


def test_a_list_is_replaced_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, link = path.read_text(), path.with_name("link")
    link.symlink_to(path)

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="No space"):
            TrustList().save(path)
    assert path.read_text() == before
    assert sorted(os.listdir(path.parent)) == ["link", "trust.toml"]
    umask = os.umask(0)
    try:
        TrustList().save(link)
    finally:
        os.umask(umask)
    assert link.is_symlink()
    assert TrustList.load(path) == TrustList()
    assert path.stat().st_mode & 0o777 == 0o644
