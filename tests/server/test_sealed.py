"""Sealed runs: the same model, nothing to read in the store, and no key taken for another."""

from __future__ import annotations

import os
import re
import shutil
from datetime import UTC, datetime

import pytest
import safetensors.numpy
from parties import blocks
from runs import QUICK, configure, lines, play

from fedipfs.errors import (
    ConfigError,
    KeyFileError,
    RunError,
    SignatureMissing,
    SignatureWrong,
    SignerUnknown,
    TrustListError,
)
from fedipfs.exchange import Vault
from fedipfs.ipld import CID, DAG_CBOR, dagcbor
from fedipfs.server import parties, records, settings
from fedipfs.store import FolderStore, dag
from fedipfs.trust import Identity, TrustList, is_sealed
from fedipfs.trust.party import Party

WORDS = (*QUICK, "evaluate.federated=true", "clients.per_round=3")


def model(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def opened(runs_dir, run_id: str) -> tuple[Vault, CID]:
    """A run's vault, as its coordinator reads it, and its head."""
    party = parties.reader(runs_dir / run_id)
    head = CID.parse((runs_dir / run_id / "head").read_text().strip())
    return Vault(FolderStore(runs_dir / "store"), party, "all"), head


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a sealed run's `runs_dir`; tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("sealed")
    play(folder, *WORDS, "seal=all", "run_id=one")
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


# ---- the same run, whatever is sealed


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "krum"])
def test_sealing_changes_no_bit_of_the_model(tmp_path, strategy):
    words = (*WORDS, f"strategy={strategy}", "run_id=one")
    if strategy == "krum":
        words += ("strategy.num_malicious_nodes=0",)
    plain = play(tmp_path / "none", *words)
    sealed = play(tmp_path / "all", *words, "seal=all")
    updates = play(tmp_path / "updates", *words, "seal=updates")
    for name, summary in (("all", sealed), ("updates", updates)):
        assert model(tmp_path / name / "one") == model(tmp_path / "none" / "one")
        assert summary["metrics"] == plain["metrics"]
        assert summary["sgd_steps"] == plain["sgd_steps"]
        for line, other in zip(
            lines(tmp_path / name / "one"), lines(tmp_path / "none" / "one"), strict=True
        ):
            assert line["clients"]["failed"] == []
            assert (line["train"], line["evaluate"]) == (other["train"], other["evaluate"])
    in_the_clear = strategy != "krum"  # which makes one client's update the model
    assert (updates["final_model_cid"] == plain["final_model_cid"]) == in_the_clear
    assert sealed["final_model_cid"] != plain["final_model_cid"]
    assert sealed["bytes"]["flower_per_client_round"] < 2500


def test_the_store_of_a_sealed_run_tells_nothing(finished, tmp_path):
    tensors = safetensors.numpy.load_file(finished / "one" / "model.safetensors")
    words = [b"accuracy", b"loss", b"client-1", b"num-examples", b"batch_size", b"optimizer"]
    words += [name.encode() for name in tensors]
    words += [array.tobytes()[:32] for array in tensors.values()]
    for cid, block in blocks(FolderStore(finished / "store")).items():
        assert [word for word in words if word in block] == [], cid
    play(tmp_path, *WORDS)  # not sealed, they are all found
    everything = b"".join(blocks(FolderStore(tmp_path / "store")).values())
    assert [word for word in words if word not in everything] == []


def test_two_sealed_runs_share_no_block(tmp_path, finished):
    play(tmp_path, *WORDS, "seal=all", "run_id=one")
    assert not set(blocks(FolderStore(tmp_path / "store"))) & set(
        blocks(FolderStore(finished / "store"))
    )


def test_only_updates_are_sealed_where_that_is_chosen(tmp_path):
    play(tmp_path, *QUICK, "seal=updates", "run_id=one")
    vault, head = opened(tmp_path, "one")
    for _, record in records.chain(vault, head):
        for update in record.get("updates", ()):
            assert is_sealed(next(iter(dag.cat(vault.store, update["cid"]))))
        if "model_out" in record:
            assert Vault(vault.store).weights(record["model_out"]).names
        assert Vault(vault.store).get_record(record["config"])["seed"] == 1
    assert not [cid for cid, block in blocks(vault.store).items() if b"client-1" in block]


@pytest.mark.parametrize(
    ("strategy", "seal"), [("fedavg", "all"), ("fedadam", "all"), ("fedadam", "updates")]
)
def test_a_sealed_run_goes_on_to_the_same_model(tmp_path, strategy, seal):
    words = (*WORDS, f"strategy={strategy}", f"seal={seal}")
    play(tmp_path, *words, "rounds=3", "run_id=whole")
    play(tmp_path, *words, "rounds=1", "run_id=parts")
    for rounds in (2, 3):
        play(tmp_path, *words, f"rounds={rounds}", "run_id=parts", resume=True)
    assert model(tmp_path / "parts") == model(tmp_path / "whole")
    vault, head = opened(tmp_path, "parts")
    assert [record.get("round") for _, record in records.chain(vault, head)] == [3, 2, 1, None]


def test_stateful_clients_keep_their_sealed_state(tmp_path, monkeypatch):
    from flwr.app import ConfigRecord

    from fedipfs.clients import app as client

    real, seen = client.Site.examples, {}

    def examples(self, context):
        state = context.state.setdefault("seen", ConfigRecord({"calls": 0, "note": "remember me"}))
        state["calls"] += 1
        seen.setdefault(context.node_config["partition-id"], []).append(state["calls"])
        return real(self, context)

    monkeypatch.setattr(client.Site, "examples", examples)
    play(tmp_path, *QUICK, "seal=all", "run_id=parts")
    FolderStore(tmp_path / "store").gc(0)
    play(tmp_path, *QUICK, "seal=all", "run_id=parts", "rounds=3", resume=True)
    assert seen == {number: [1, 2, 3] for number in range(4)}
    held = blocks(FolderStore(tmp_path / "store"))
    assert [cid for cid, block in held.items() if b"remember me" in block] == []


def test_a_run_begins_with_a_plain_model_and_seals_it(tmp_path):
    first = play(tmp_path, *QUICK, "run_id=a")
    words = (*QUICK, f"init_from={first['final_model_cid']}")
    plain = play(tmp_path, *words, "run_id=b")
    play(tmp_path, *words, "run_id=c", "seal=all")
    assert plain["rounds_completed"] == 2
    assert model(tmp_path / "c") == model(tmp_path / "b")


# ---- keys


def test_keys_are_their_owners_alone(finished):
    folder = finished / "one" / "keys"
    assert folder.stat().st_mode & 0o777 == 0o700
    names = {path.name for path in folder.iterdir()}
    assert names == {"coordinator.key", "trust.toml", *(f"client-{i}.key" for i in range(4))}
    for path in folder.glob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert not [path for path in finished.rglob("*") if path.is_file() and _tells_keys(path)]


def _tells_keys(path) -> bool:
    return path.parent.name != "keys" and b"PRIVATE KEY" in path.read_bytes()


def test_keys_are_closed_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        play(tmp_path, *QUICK, "rounds=1", "clients.total=1", "seal=all", "run_id=one")
    finally:
        os.umask(before)
    folder = tmp_path / "one" / "keys"
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.glob("*.key"))} == {0}
    assert (folder / "trust.toml").stat().st_mode & 0o022 == 0


def test_without_sealing_on_one_machine_there_are_no_keys(tmp_path):
    play(tmp_path, *QUICK, "run_id=one")
    assert not (tmp_path / "one" / "keys").exists()
    assert parties.reader(tmp_path / "one") is None


def _lost(keys) -> None:
    (keys / "coordinator.key").unlink()


def _all_lost(keys) -> None:
    shutil.rmtree(keys)


def _replaced(keys) -> None:
    _lost(keys)
    Identity.new("coordinator").save(keys / "coordinator.key")


def _of_a_client(keys) -> None:
    shutil.copy(keys / "client-0.key", keys / "coordinator.key")


def _opened_to_others(keys) -> None:
    (keys / "coordinator.key").chmod(0o644)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_lost, "coordinator.key is gone, .* put back a copy, or start a new run"),
        (_all_lost, "coordinator.key is gone"),
        (_replaced, "coordinator.key holds another key than the run began with"),
        (_of_a_client, "coordinator.key holds another key"),
        (_opened_to_others, "open to other users: chmod 600"),
    ],
)
def test_a_lost_or_foreign_key_is_said_before_anything_is_done(copied, spoil, says):
    spoil(copied / "one" / "keys")
    before = {path.name for path in (copied / "one" / "keys").glob("*")}
    with pytest.raises(KeyFileError, match=says) as caught:
        play(copied, *WORDS, "seal=all", "run_id=one", "rounds=3", resume=True)
    assert "\n" not in str(caught.value)
    assert {path.name for path in (copied / "one" / "keys").glob("*")} == before
    assert (copied / "one" / "model.safetensors").exists()


def test_a_lost_trust_list_is_not_made_anew(copied):
    """It would forget who was revoked."""
    (copied / "one" / "keys" / "trust.toml").unlink()
    with pytest.raises(TrustListError, match="is gone, and with it what was revoked"):
        play(copied, *WORDS, "seal=all", "run_id=one", "rounds=3", resume=True)
    assert not (copied / "one" / "keys" / "trust.toml").exists()


def test_the_coordinators_own_identity_is_used(tmp_path, monkeypatch):
    own = tmp_path / "acme.key"
    Identity.new("acme").save(own, b"correct horse")
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "correct horse")
    words = (*QUICK, "rounds=1", "clients.total=2", "seal=all", "run_id=one", f"identity={own}")
    play(tmp_path, *words)
    assert not (tmp_path / "one" / "keys" / "coordinator.key").exists()
    party = parties.reader(tmp_path / "one", str(own))
    head = CID.parse((tmp_path / "one" / "head").read_text().strip())
    vault = Vault(FolderStore(tmp_path / "store"), party, "all")
    assert {record["by"] for _, record in records.chain(vault, head)} == {"acme"}
    play(tmp_path, *words, "rounds=2", resume=True)
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "wrong")
    with pytest.raises(KeyFileError, match="another passphrase"):
        play(tmp_path, *words, "rounds=3", resume=True)
    monkeypatch.delenv("FEDIPFS_PASSPHRASE")
    with pytest.raises(KeyFileError, match="is encrypted: set FEDIPFS_PASSPHRASE"):
        play(tmp_path, *words, "rounds=3", resume=True)


def test_a_passphrase_that_no_key_file_needs_is_ignored(tmp_path, monkeypatch):
    own = tmp_path / "acme.key"
    Identity.new("acme").save(own)
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "of another file")
    for run_id, *more in (("own", f"identity={own}"), ("made",)):
        play(tmp_path, *QUICK, "rounds=1", "clients.total=2", "seal=all", f"run_id={run_id}", *more)
    assert parties.reader(tmp_path / "own", str(own)).name == "acme"
    assert parties.reader(tmp_path / "made").name == "coordinator"


@pytest.mark.parametrize("content", [None, "nonsense"])
def test_a_run_without_its_identity_leaves_no_trace(tmp_path, content):
    own = tmp_path / "acme.key"
    if content:
        own.write_text(content)
        own.chmod(0o600)
    words = (*QUICK, "rounds=1", "clients.total=2", "seal=all", "run_id=one", f"identity={own}")
    with pytest.raises(KeyFileError, match=r"acme\.key"):
        play(tmp_path, *words)
    assert not (tmp_path / "one").exists()
    own.unlink(missing_ok=True)
    Identity.new("acme").save(own)
    assert play(tmp_path, *words)["status"] == "finished"


# ---- records


def test_the_chain_of_records_is_signed_and_shows_its_details_to_the_coordinator(finished):
    vault, head = opened(finished, "one")
    chain = [record for _, record in records.chain(vault, head)]
    assert [record.get("round") for record in chain] == [2, 1, None]
    for record in chain[:-1]:
        assert {update["client"] for update in record["updates"]} <= {
            f"client-{i}" for i in range(4)
        }
        assert all(len(update["signature"]) == 64 for update in record["updates"])
        assert record["metrics"]["server"]["accuracy"] > 0.3
        assert record["failures"] == {}


def test_the_updates_of_a_round_prove_who_made_them(finished):
    vault, head = opened(finished, "one")
    record = records.get(vault, head)
    from fedipfs.trust import Statement

    for update in record["updates"]:
        signed = dagcbor.decode(update["signed"])
        assert signed["fedipfs"]["cid:arrays"] == str(update["cid"])
        assert signed["metrics"]["num-examples"] == update["examples"]
        assert signed["fedipfs"]["run"] == str(record["run"])
        statement = Statement(
            CID.of(update["signed"], DAG_CBOR), str(record["run"]), record["round"], "update"
        )
        vault.party.verify(update["client"], statement, update["signature"])
        with pytest.raises(SignatureWrong):
            other = Statement(statement.cid, statement.run, 7, "update")
            vault.party.verify(update["client"], other, update["signature"])


def test_others_see_the_chain_without_the_details(finished):
    vault, head = opened(finished, "one")
    keys = finished / "one" / "keys"
    partner = Party(Identity.load(keys / "client-0.key"), "participant", keys / "trust.toml")
    for reader in (Vault(vault.store), Vault(vault.store, partner, "all")):
        chain = [record for _, record in records.chain(reader, head)]
        assert [record.get("round") for record in chain] == [2, 1, None]
        for record in chain[:-1]:
            assert not {"updates", "metrics", "failures"} & set(record)


def test_a_partner_checks_the_signatures_of_the_records(finished):
    """With a list in which the coordinator has another key, or none."""
    vault, head = opened(finished, "one")
    keys = Identity.load(finished / "one" / "keys" / "client-0.key")
    from fedipfs.trust import Member

    wrong = TrustList([Member(Identity.new("coordinator").public, "coordinator")])
    for trusted, error in ((wrong, SignatureWrong), (TrustList(), SignerUnknown)):
        partner = Vault(vault.store, Party(keys, "participant", trusted), "all")
        with pytest.raises(error):
            list(records.chain(partner, head))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"round": 7}, SignatureWrong),
        ({"model_out": CID.of(b"other")}, SignatureWrong),
        ({"blocks": []}, SignatureWrong),
        ({"run": CID.of(b"", DAG_CBOR)}, SignatureWrong),
        ({"type": records.RUN}, SignatureWrong),
        ({"extra": 1}, SignatureWrong),
        ({"signature": bytes(64)}, SignatureWrong),
        ({"signature": b""}, SignatureWrong),
        ({"signature": None}, SignatureMissing),
        ({"by": "client-0"}, SignerUnknown),
        ({"by": 5}, SignatureWrong),
    ],
)
def test_a_changed_record_is_refused(copied, change, error):
    vault, head = opened(copied, "one")
    record = {**dag.get_record(vault.store, head), **change}
    forged = dag.put_record(vault.store, record)
    with pytest.raises(error):
        list(records.chain(vault, forged))
    (copied / "one" / "head").write_text(f"{forged}\n")
    with pytest.raises(error):
        play(copied, *WORDS, "seal=all", "run_id=one", "rounds=3", resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"round": "x"},
        {"round": None},
        {"round": []},
        {"round": 2.5},
        {"round": 0},
        {"run": "x"},
        {"parent": "x"},
        {"parent": None},
    ],
)
def test_a_malformed_record_is_refused_with_and_without_keys(finished, change):
    vault, head = opened(finished, "one")
    forged = dag.put_record(vault.store, {**dag.get_record(vault.store, head), **change})
    for reader in (vault, Vault(vault.store)):
        with pytest.raises(RunError, match="is no record of a round"):
            list(records.chain(reader, forged))


@pytest.mark.parametrize("change", ["round", "run", "model_in", "parent"])
def test_records_that_do_not_follow_each_other_are_no_chain(finished, change):
    """Signed by the coordinator all the same."""
    vault, head = opened(finished, "one")
    record = dag.get_record(vault.store, head)
    for field in ("signature", "by"):
        del record[field]
    other = {"round": 3, "run": head, "model_in": CID.of(b"x"), "parent": record["run"]}
    record[change] = other[change]
    statement = records._statement(record, record["run"])
    record |= {"signature": vault.party.sign(statement), "by": vault.party.name}
    with pytest.raises(RunError, match="is not of the round before"):
        list(records.chain(vault, dag.put_record(vault.store, record)))


def test_a_record_signed_with_another_key_is_refused(copied):
    vault, head = opened(copied, "one")
    record = dag.get_record(vault.store, head)
    stranger = Party(Identity.new("coordinator"), "coordinator", TrustList())
    statement = records._statement(
        {k: v for k, v in record.items() if k not in ("signature", "by")}, record["run"]
    )
    record["signature"] = stranger.sign(statement)
    with pytest.raises(SignatureWrong):
        records.get(vault, dag.put_record(vault.store, record))


# ---- clients that are refused


def _new_key(keys) -> None:
    (keys / "client-1.key").unlink()
    Identity.new("client-1").save(keys / "client-1.key")


def _revoked(keys) -> None:
    trusted = TrustList.load(keys / "trust.toml")
    trusted.revoke("client-1", datetime(2020, 1, 1, tzinfo=UTC)).save(keys / "trust.toml")


def _key_of_another(keys) -> None:
    shutil.copy(keys / "client-2.key", keys / "client-1.key")


@pytest.mark.parametrize(
    ("spoil", "seal", "reason"),
    [
        (_new_key, "all", "NotRecipient: the envelope is not sealed to client-1"),
        (_new_key, "updates", "SignatureWrong: client-1's signature does not fit"),
        (_revoked, "updates", "SignerRevoked: client-1's key as participant is revoked"),
        (_key_of_another, "updates", "SignatureWrong: .*'client-2' instead of client-1"),
        (lambda keys: (keys / "client-1.key").unlink(), "all", "KeyFileError: cannot read"),
        (lambda keys: (keys / "client-1.key").chmod(0o644), "all", "KeyFileError: .*chmod 600"),
    ],
)
def test_a_client_without_its_key_is_left_out_by_name(tmp_path, spoil, seal, reason):
    words = (*QUICK, f"seal={seal}", "run_id=one")
    play(tmp_path, *words, "rounds=1")
    spoil(tmp_path / "one" / "keys")
    summary = play(tmp_path, *words, "rounds=2", resume=True)
    assert summary["status"] == "finished"
    first, second = lines(tmp_path / "one")
    assert first["clients"]["failed"] == []
    assert (second["clients"]["selected"], second["clients"]["ok"]) == (4, 3)
    (failed,) = second["clients"]["failed"]
    assert failed["client"] == "client-1"
    assert re.search(reason, failed["reason"])
    vault, head = opened(tmp_path, "one")
    record = records.get(vault, head)
    assert record["failures"] == {"client-1": failed["reason"]}
    assert [update["client"] for update in record["updates"]] == [
        "client-0", "client-2", "client-3"
    ]  # fmt: skip


# ---- settings


@pytest.mark.parametrize("store", ["kubo", "cached"])
def test_nothing_sealed_where_others_read_must_be_explained(tmp_path, store):
    words = (*QUICK, f"store={store}")
    assert settings.check(configure(tmp_path, *words))["seal"] == "all"
    with pytest.raises(ConfigError, match="unsealed_because='the data are public'") as caught:
        settings.check(configure(tmp_path, *words, "seal=none"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="unsealed_because"):
        settings.check(configure(tmp_path, *words, "seal=none", "unsealed_because=''"))
    told = settings.check(configure(tmp_path, *words, "seal=none", "unsealed_because=open data"))
    assert (told["seal"], told["unsealed_because"]) == ("none", "open data")


def test_a_folder_is_not_sealed_unless_asked(tmp_path):
    assert settings.check(configure(tmp_path, *QUICK))["seal"] == "none"
    for seal in ("updates", "all"):
        assert settings.check(configure(tmp_path, *QUICK, f"seal={seal}"))["seal"] == seal


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seal=some"], "seal=some is not one of none, updates, all"),
        (["seal=true"], r"seal=True is not"),
        (["keep.models=0"], r"keep\.models=0 is not a whole number of at least 1"),
        (["keep.everything=maybe"], r"keep\.everything=maybe is neither true nor false"),
        (["++keep.model=1"], r"unknown setting 'keep\.model'; did you mean 'keep\.models'"),
        (["identity=''"], "identity= is not a text"),
    ],
)
def test_what_cannot_be_kept_or_sealed_so_is_refused(tmp_path, words, says):
    with pytest.raises(ConfigError, match=says):
        settings.check(configure(tmp_path, *QUICK, *words))
