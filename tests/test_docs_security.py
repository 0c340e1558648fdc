"""docs/security.md: its programs run, its tables are computed, and its formulae suffice."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from runs import QUICK, lines, play
from scipy import stats

from fedipfs import CID, FolderStore
from fedipfs.exchange import Vault
from fedipfs.exchange.stages import get_message
from fedipfs.ipld import DAG_CBOR, dagcbor
from fedipfs.secagg import Parameters, Record, Session, decode
from fedipfs.server import parties, records, simulation
from fedipfs.store import dag

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text(encoding="utf-8")
FIVE = (
    *QUICK,
    "clients.total=5",
    "clients.exclude_after=null",
    "secagg=on",
    "keep.everything=true",
)


def program(holding: str) -> str:
    """The program on the page that has this in it."""
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.S) if holding in text]
    return found


def run_program(text: str, **given) -> tuple[dict, str]:
    """What a program leaves and prints."""
    names, printed = {"__name__": "__main__", **given}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "security.md", "exec"), names)
    return names, printed.getvalue()


def rows(after: str) -> list[list[str]]:
    """The cells of the first table after a text, without its head."""
    table = PAGE[PAGE.index(after) :]
    lines = table[table.index("\n|") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- the demonstration


def test_the_demonstration_reads_a_digit_off_a_plain_update_and_nothing_off_a_masked_one():
    _, printed = run_program(program("def invert"))
    found = dict(re.findall(r"(.*): (\d\.\d\d)\n", printed))
    shown = dict(re.findall(r"(.*): (\d\.\d\d)\n", PAGE[PAGE.index("It prints how alike") :]))
    assert found.keys() == shown.keys() == {"plain update", "masked update", "sum of three"}
    assert found["plain update"] == shown["plain update"] == "1.00"
    assert found["sum of three"] == shown["sum of three"]
    assert float(found["masked update"]) < 0.65  # of 64 pixels; more by chance once in 10**7 times


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """One example a client, one step: a run without masks and one with; the first round of each."""
    folder = tmp_path_factory.mktemp("attacked")
    words = (*QUICK, "rounds=1", "train.batch_size=1", "train.steps=1", "train.optimizer.lr=0.5")
    rounds = {}
    for name, more in (("plain", ()), ("masked", ("secagg=on",))):
        play(folder / name, *words, *more, "keep.everything=true", "run_id=one")
        vault = Vault(FolderStore(folder / name / "store"), parties.reader(folder / name / "one"))
        head = CID.parse((folder / name / "one" / "head").read_text().strip())
        rounds[name] = vault, records.get(vault, head)
    return rounds


def pixels() -> np.ndarray:
    """What the clients train on, scaled as the task does it: a row each."""
    from fedipfs import data

    train = data.load("digits", root=None, fallback="digits").train
    return train.inputs.reshape(len(train), -1).astype("f4") / 8 - 1


def likeness(found: np.ndarray) -> float:
    """How alike a vector is to the training example that it is most alike."""
    known = pixels()
    centred = known - known.mean(1, keepdims=True)
    other = found - found.mean()
    norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(other)
    return float((centred @ other / norms).max())


def read_off(change: dict[str, np.ndarray]) -> np.ndarray:
    """The input of the first layer, from what one step changed of it."""
    row = np.abs(change["1.bias"]).argmax()
    return change["1.weight"][row] / change["1.bias"][row]


def test_a_real_clients_plain_update_shows_the_very_example_that_it_was_trained_on(attacked):
    vault, record = attacked["plain"]
    before = vault.weights(record["model_in"]).tensors()
    for update in record["updates"]:
        after = vault.weights(update["cid"]).tensors()
        change = {name: after[name].astype("f8") - before[name] for name in before}
        assert likeness(read_off(change)) > 0.999


def masked_changes(attacked) -> dict[str, dict[str, np.ndarray]]:
    """By client, its masked vector read as if it were not."""
    vault, record = attacked["masked"]
    kept = Record.from_bytes(get_message(vault, str(record["aggregation"]["secagg"]["record"])))
    parameters = Session.from_bytes(kept.session).parameters
    file = vault.weights(record["model_in"])
    found = {}
    for each in kept.survivors:
        vector = vault.weights(CID.parse(each.vector)).tensor("masked")
        values, changes = decode(parameters, vector, 1).values, {}
        for name in file.names:
            count = file.specs[name].elements
            changes[name], values = values[:count].reshape(file.specs[name].shape), values[count:]
        found[each.by] = changes
    return found


def test_of_the_same_clients_masked_vector_nothing_is_read_off(attacked):
    for change in masked_changes(attacked).values():
        assert likeness(read_off(change)) < 0.75  # the best of 1442 examples, by chance


def test_a_masked_vector_is_uniform_and_unrelated_to_the_update(attacked):
    vault, record = attacked["masked"]
    plain_vault, plain = attacked["plain"]
    before = plain_vault.weights(plain["model_in"]).tensors()
    for update, other in zip(record["updates"], plain["updates"], strict=True):
        vector = vault.weights(update["cid"]).tensor("masked")
        for shift in (0, 8, 16, 24):  # every byte
            counts = np.bincount((vector >> shift) & 255, minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-9
        after = plain_vault.weights(other["cid"]).tensors()
        names = plain_vault.weights(plain["model_in"]).names
        change = np.concatenate([(after[name] - before[name]).ravel() for name in names])
        masked = vector[: len(change)].astype("f8")
        assert abs(stats.spearmanr(masked, change).statistic) < 0.1
        assert update["client"] == other["client"]


# ---- the audit


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """Runs in which client-1 and client-3 drop out, one in each round: sealed, and not."""
    folder = tmp_path_factory.mktemp("audited")
    faults = {1: "1/masked/raise", 3: "2/masked/raise"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "CLIENT_APP", "stubborn_app:app")
        patch.setattr(
            simulation,
            "node_config",
            lambda attack, partition, clients: {"faults": faults.get(partition, "")},
        )
        for seal in ("none", "all"):
            play(folder / seal / "runs", *FIVE, f"seal={seal}", "run_id=RUN")
    return folder


@pytest.mark.parametrize("seal", ["none", "all"])
def test_the_auditors_program_recomputes_every_round(audited, monkeypatch, seal):
    monkeypatch.chdir(audited / seal)
    _, printed = run_program(program("kept.audit("))
    assert printed == "round 2: the sum of 4 is right\nround 1: the sum of 4 is right\n"


def rounds_of(folder: Path) -> tuple[Vault, list[dict]]:
    vault = Vault(FolderStore(folder / "runs/store"), parties.reader(folder / "runs/RUN"), "none")
    head = CID.parse((folder / "runs/RUN/head").read_text().strip())
    return vault, [each for _, each in records.chain(vault, head) if "updates" in each]


def test_the_program_without_fedipfs_gives_the_same_sum(audited):
    vault, found = rounds_of(audited / "none")
    assert len(found) == 2

    def block(cid: str) -> bytes:
        return vault.store.get(CID.parse(cid))

    def file(cid: str) -> bytes:
        return b"".join(dag.cat(vault.store, CID.parse(cid)))

    text = program("import libipld")
    assert "fedipfs." not in text and "import fedipfs" not in text
    for record in found:
        note = record["aggregation"]["secagg"]
        names, _ = run_program(text, block=block, file=file, RECORD=str(note["record"]))
        assert names["record"]["total"] == str(note["sum"])
        assert len(names["dropped"]) == 1
        np.testing.assert_array_equal(names["total"], vault.weights(note["sum"]).tensor("sum"))


def test_that_program_notices_secrets_that_are_not_the_clients_own(audited):
    vault, (record, _) = rounds_of(audited / "none")
    said = dagcbor.decode(get_message(vault, str(record["aggregation"]["secagg"]["record"])))

    def file(cid: str) -> bytes:
        return b"".join(dag.cat(vault.store, CID.parse(cid)))

    for field in ("seeds", "mask_keys"):
        forged = {**said, field: [bytes(31) + b"\1", *said[field][1:]]}
        block = dagcbor.encode({"message": dagcbor.encode(forged)})
        given = {"block": lambda cid, block=block: block, "file": file, "RECORD": ""}
        with pytest.raises(AssertionError):
            run_program(program("import libipld"), **given)


def test_signatures_are_as_the_page_says(audited):
    """Checked with nothing but the page, Ed25519 and DAG-CBOR."""
    vault, (record, _) = rounds_of(audited / "none")
    said = dagcbor.decode(get_message(vault, str(record["aggregation"]["secagg"]["record"])))
    session = dagcbor.decode(said["session"])
    public = {each["by"]: (each["mask_key"], each["seal_key"]) for each in said["clients"]}
    trusted = vault.party.trusted

    def sha(value: object) -> bytes:
        return hashlib.sha256(dagcbor.encode(value)).digest()

    terms = {"format": "fedipfs-secagg-parameters/v1", **session["parameters"]}
    checked = 0
    for field, stage in (
        ("clients", "advertise"),
        ("commitments", "share"),
        ("survivors", "masked"),
        ("confirmations", "confirm"),
    ):
        for each in said[field]:
            payload = {key: each[key] for key in each if key not in ("by", "signature")}
            if "sealed_hash" in payload:
                payload["sealed"] = payload.pop("sealed_hash")
            content = {
                "protocol": "fedipfs-secagg/v1",
                "attempt": session["attempt"],
                "cohort": sha(session["cohort"]),
                "parameters": sha(terms),
                "by": each["by"],
                "mask key": public[each["by"]][0],
                "seal key": public[each["by"]][1],
                "payload": CID.of(dagcbor.encode(payload), DAG_CBOR),
            }
            statement = {
                "cid": CID.of(dagcbor.encode(content), DAG_CBOR),
                "run": session["run"],
                "round": session["round"],
                "role": f"secagg {stage}",
                "organization": each["by"],
            }
            (member,) = trusted.entries(each["by"], "participant")
            key = Ed25519PublicKey.from_public_bytes(member.identity.signing)
            key.verify(each["signature"], b"fedipfs/statement/v1\0" + dagcbor.encode(statement))
            checked += 1
    assert checked == 5 + 5 + 4 + 4
    roster = sha({"clients": said["clients"], "kind": "Roster"})
    assert {each["roster"] for each in said["commitments"]} == {roster}
    sharers = sha(sorted(each["by"] for each in said["commitments"]))
    assert {each["sharers"] for each in said["survivors"]} == {sharers}
    survivors = sha({"clients": said["survivors"], "kind": "Survivors"})
    assert {each["survivors"] for each in said["confirmations"]} == {survivors}


def test_the_sum_says_what_the_page_says(audited):
    """The mean, the weights, steps and the loss, by the page's formulae."""
    vault, (record, _) = rounds_of(audited / "none")
    note = record["aggregation"]["secagg"]
    kept = Record.from_bytes(get_message(vault, str(note["record"])))
    terms = dagcbor.decode(kept.session)["parameters"]
    total = vault.weights(note["sum"]).tensor("sum").astype("O")  # exact
    n, bits, clip, values = (terms[key] for key in ("clients", "bits", "clip", "values"))
    b = 32 - (n - 1).bit_length()
    width, numbers = -(-64 // b), {}
    for place, name in enumerate(terms["numbers"]):
        parts = total[values + place * width : values + (place + 1) * width]
        whole = sum(int(part) << (b * i) for i, part in enumerate(parts)) % 2**64
        numbers[name] = (whole - 2**64 if whole >= 2**63 else whole) / 2**32
    assert next(iter(numbers)) == "weight"
    s = (2**bits - 1) * (1 - 2.0**-40) / (2 * clip)
    mean = (total[:values].astype("f8") / s - note["survivors"] * clip) / numbers["weight"]
    before, after = (vault.weights(record[key]) for key in ("model_in", "model_out"))
    for name in before.names:
        known = before.tensor(name)
        piece, mean = np.split(mean, [known.size])
        moved = known + piece.reshape(known.shape)
        np.testing.assert_allclose(after.tensor(name), moved, rtol=0, atol=1e-6)
    loss = numbers["train_loss"] / numbers["weight"]
    assert record["metrics"]["train"]["train_loss"] == pytest.approx(loss)
    (line,) = [each for each in lines(audited / "none/runs/RUN") if each["round"] == 2]
    assert numbers["steps"] == line["sgd_steps"] > 0


# ---- the tables


def test_the_table_of_complete_graphs_is_what_is_chosen():
    table = rows("**Complete graph")
    assert len(table) == 7
    for cells in table:
        n, *expected = map(int, cells)
        found = Parameters.choose(n, 1000)
        others = found.quorum - found.colluders
        bits = [found.threshold, found.dropouts, found.colluders, others]
        assert expected == [*bits, 32 - (n - 1).bit_length()]
        Parameters.choose(n, 1000, bits=expected[-1])


def test_the_table_of_regular_graphs_is_what_is_chosen():
    table = rows("**k-regular graph")
    assert len(table) == 7
    for n, colluders, dropouts, *expected in table:
        shares = [int(share.rstrip(" %")) / 100 for share in (colluders, dropouts)]
        found = Parameters.choose(
            int(n), 1000, complete=False, colluders=shares[0], dropouts=shares[1]
        )
        assert list(map(int, expected)) == [found.neighbours, found.threshold, found.quorum]


@pytest.mark.parametrize(("clients", "column"), [(10, 0), (50, 1)])
def test_the_sizes_of_what_is_said_are_as_in_the_table(tmp_path, clients, column):
    place = Path(__file__).parent / "secagg" / "conftest.py"
    spec = importlib.util.spec_from_file_location("secagg_conftest", place)
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    world = support.World(tmp_path, clients=clients, values=100)
    world.until("unmask")
    taken, name = world.server._taken, world.names[0]
    said = {
        "ADVERTISE": (world.session, taken["advertise"][name]),
        "SHARE": (world.roster, taken["share"][name]),
        "MASKED": (world.deliveries[name], taken["masked"][name]),
        "CONFIRM": (world.survivors, taken["confirm"][name]),
        "UNMASK": (world.request, world.client(name).unmask(world.request)),
    }
    for stage, _, asks, _, answers in rows("## Stages"):
        for cell, message in zip((asks, answers), said[stage], strict=True):
            shown = int(cell.split(", ")[column])
            assert len(message.to_bytes()) == pytest.approx(shown, rel=0.02)
