"""How a site joins: it makes its keys here and asks, and takes what the coordinator answers.

No private key leaves the site, and nobody is trusted whose fingerprint was not compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from fedipfs.clients.home import Home
from fedipfs.errors import ConfigError, JoinError, JoinRefused
from fedipfs.trust import Identity, Member, PublicIdentity, TrustList, files, joining, nodekey
from fedipfs.trust.identity import check_organization, same_fingerprint
from fedipfs.trust.joining import Federation, JoinRequest

QUESTION = "Did the coordinator read this out over another channel?"

Say = Callable[[str], None]


def init(
    home: Path,
    organization: str,
    out: Path = Path(),
    *,
    say: Say = lambda line: None,
    ask: Callable[[], bytes] | None = None,
) -> Path:
    """Make a site's keys and configuration in the folder `home`, and the join file in `out`.

    Keys of the same organization that are there are kept, and so is site.yaml; new keys are
    encrypted if $FEDIPFS_PASSPHRASE is set, and `ask` gives the passphrase of those that are
    there. `say` gets a line for everything that was made, and what to do next. Raises
    ConfigError, FormatError for the name, and KeyFileError for keys of another organization.
    """
    check_organization(organization)
    place = Home(home)
    if (home / "coordinator.toml").exists():
        raise ConfigError(
            f"{home} is a coordinator's folder: choose another for the site with FEDIPFS_HOME"
        )
    if not out.is_dir():
        raise ConfigError(f"{out} is no folder: choose one for the join file")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(home, 0o700)
    keys = joining.own_identity(place.identity, organization, ask)
    node_key = _node_key(place)
    if not place.site.exists():
        template = Path(__file__).with_name("site.yaml.in").read_text(encoding="utf-8")
        files.write_new(place.site, template)
        say(f"wrote {place.site}: say in it where your data are and what you allow")
    say(f"the keys of {organization} are in {home} and stay there: keep a copy of identity.key")
    request = JoinRequest(keys.public, node_key, joining.now())
    path = out / f"{organization}.join.json"
    files.write_whole(path, request.dumps(keys))
    say(f"wrote {path}: send it to the coordinator, and read this fingerprint out to them,")
    say("by telephone or in person:")
    say(f"  {keys.public.fingerprint}")
    say("then run: fedipfs-client join FILE, with the federation file that they send back")
    return path


def join(
    home: Path,
    path: Path,
    *,
    fingerprint: str | None = None,
    confirm: Callable[[str], bool] | None = None,
    say: Say = lambda line: None,
    ask: Callable[[], bytes] | None = None,
) -> Federation:
    """Take the federation file at `path`: whom to dial, whom to trust, who else is in it.

    The coordinator must be one whose fingerprint was compared: it is `fingerprint`, or `confirm`
    says so when it is asked `QUESTION`, or it is in trust.toml already. A later file brings the
    list of members up to date: those who left are revoked in trust.toml, and who is revoked there
    stays so. Raises JoinRefused and SignatureWrong for files that are not to be believed,
    JoinError for what is no such file, and ConfigError before `init`.
    """
    place = Home(home)
    if not place.identity.exists():
        raise ConfigError(f"{home} has no keys yet: first run fedipfs-client init --org NAME")
    own = Identity.unlock(place.identity, ask).public
    text = files.read(path, JoinError, limit=joining.MAX_FEDERATION)
    federation = Federation.loads(text, path)
    before = Federation.load(place.federation) if place.federation.exists() else None
    _check(federation, own, before, path, home)
    trusted = TrustList.load(place.trust) if place.trust.exists() else TrustList()
    coordinator = federation.coordinator
    say(f"{coordinator.organization}, at {federation.address}, is the coordinator:")
    say(f"  {coordinator.fingerprint}")
    if fingerprint is not None and not same_fingerprint(fingerprint, coordinator.fingerprint):
        raise JoinRefused(
            f"{path} is of another coordinator than {fingerprint!r:.80}: do not trust it, and ask "
            "the coordinator how it could be changed on its way"
        )
    if not _known(trusted, coordinator):
        if fingerprint is None and not (confirm is not None and confirm(QUESTION)):
            raise JoinRefused(
                "nothing was changed: compare the fingerprint with the coordinator first, or say "
                "with --fingerprint what they read out"
            )
        trusted = trusted.trust(Member(coordinator, "coordinator"))
    trusted = _up_to_date(trusted, federation, before, joining.now(), say)
    files.write_whole(place.ca, federation.ca_pem)
    trusted.save(place.trust)
    files.write_whole(place.federation, text)  # the last: with it the site has joined
    say(
        f"{own.organization} is member {federation.number}, one of {len(federation.members)}; "
        "start with: fedipfs-client run"
    )
    return federation


def _node_key(place: Home) -> str:
    """The public line of the site's node key, which is made if there is none."""
    if not place.node_key.exists():
        files.write_new(place.node_key, nodekey.new())
    line = nodekey.public_of(place.node_key)
    files.write_whole(place.path / "node.pub", f"{line}\n")
    return line


def _check(
    federation: Federation,
    own: PublicIdentity,
    before: Federation | None,
    path: Path,
    home: Path,
) -> None:
    """Refuse a file that is not for this site, or not after the last one."""
    if federation.organization != own.organization:
        raise JoinRefused(
            f"{path} is for {federation.organization}, and this site is {own.organization}: take "
            f"{own.organization}.federation.json"
        )
    if federation.own != own:
        raise JoinRefused(
            f"{path} names other keys for {own.organization} than those here "
            f"({own.fingerprint}): send the join file of this site again"
        )
    if before is None:
        return
    old, new = before.coordinator, federation.coordinator
    if old != new:
        raise JoinRefused(
            f"this site has joined {old.organization} ({old.fingerprint}), and {path} is of "
            f"{new.organization} ({new.fingerprint}): for another federation set FEDIPFS_HOME to "
            "another folder; if the coordinator has new keys, run `fedipfs keys revoke "
            f"{old.organization}`, move {home / 'federation.json'} away and join again"
        )
    if (federation.serial, federation.issued) < (before.serial, before.issued):
        raise JoinRefused(
            f"{path} (serial {federation.serial}, of {federation.issued:%Y-%m-%d %H:%M} UTC) is "
            f"older than what this site has (serial {before.serial}): ask for the present one"
        )


def _known(trusted: TrustList, coordinator: PublicIdentity) -> bool:
    """Whether the site has compared this fingerprint before. Refuses a key that ended."""
    at = joining.now()
    for one in trusted.entries(coordinator.organization, "coordinator"):
        if one.identity == coordinator:
            if one.state(at) != "valid":
                raise JoinRefused(f"{one.refusal(at)}: this site's own trust.toml says so")
            return True
    return False


def _up_to_date(
    trusted: TrustList,
    federation: Federation,
    before: Federation | None,
    at: datetime,
    say: Say,
) -> TrustList:
    """The trust list with the members that are new, and without those who left."""
    present = {who for _, who in federation.members}
    listed = {one.identity: one for one in trusted.members if one.role == "participant"}
    for number, who in federation.members:
        if number == federation.number:
            continue
        if who not in listed:
            trusted = trusted.trust(Member(who, "participant"))
            say(f"+ {who.organization}: {who.fingerprint}")
        elif listed[who].state(at) != "valid":
            say(
                f"! {who.organization} is a member, but revoked or ended in this site's "
                "trust.toml, and stays so: to trust it again, take that line out"
            )
    for _, who in before.members if before else ():
        if who not in present and who in listed and listed[who].state(at) == "valid":
            trusted = trusted.revoke(who.fingerprint, at)
            say(f"- {who.organization} has left: {who.fingerprint}")
    return trusted
