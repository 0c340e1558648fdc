"""Whole runs in which all clients add noise under masks."""

from __future__ import annotations

import pytest
from runs import QUICK, lines, play, summary

from fedipfs.clients import app as client
from fedipfs.errors import ConfigError, RunFailed
from fedipfs.exchange import Vault
from fedipfs.ipld import CID
from fedipfs.privacy.ledger import Cap, Ledger, ledgers
from fedipfs.server import records, simulation
from fedipfs.store import FolderStore

RUN = (*QUICK, "privacy=distributed", "secagg=on", "run_id=run", "stop.divergence=null")


def test_with_hardly_any_noise_it_is_the_mean_of_clipped_updates(tmp_path):
    quiet = ("privacy.noise_multiplier=0.01", "privacy.clip_norm=3")
    noisy = play(tmp_path, *RUN, *quiet)
    plain = play(tmp_path, *QUICK, "strategy=average", "run_id=plain")
    assert noisy["metrics"]["accuracy"] == pytest.approx(plain["metrics"]["accuracy"], abs=0.05)
    assert noisy["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], abs=0.1)


def test_what_it_cost_is_in_every_record_by_those_who_survived(tmp_path):
    done = play(tmp_path, *RUN, "privacy.noise_multiplier=3")
    told = lines(tmp_path / "run")
    assert [line["privacy"]["survivors"] for line in told] == [[4], [4, 4]]
    assert 0 < told[0]["privacy"]["epsilon"] < told[1]["privacy"]["epsilon"]
    spent = done["privacy"]
    assert (spent["unit"], spent["name"]) == ("client", "distributed")
    assert spent["epsilon"] == spent["epsilon_rdp"] == told[1]["privacy"]["epsilon"]
    assert spent["epsilon"] < spent["planned_epsilon"]  # it was planned with the quorum
    assert "integers" in spent["noise"]
    vault = Vault(FolderStore(tmp_path / "store"))
    record = records.get(vault, CID.parse(done["head_cid"]))
    assert record["privacy"]["survivors"] == [4, 4]
    assert all(not update["metrics"] and update["examples"] == 1 for update in record["updates"])


def test_the_noise_is_another_in_every_run(tmp_path):
    first, second = (
        play(tmp_path, *RUN[:-2], f"run_id={name}", "rounds=1", "stop.divergence=null")
        for name in ("a", "b")
    )
    assert first["final_model_cid"] != second["final_model_cid"]


def test_a_round_that_was_begun_counts_after_a_kill(tmp_path, monkeypatch):
    def killed(self, survivors):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedipfs.server.secure._Round._opened", killed, raising=False)
        patched.setattr("fedipfs.server.spending.OfClients.survived", killed)
        with pytest.raises(BaseException):  # noqa: B017 - as the run ends, whatever it is called
            play(tmp_path, *RUN)
    assert (tmp_path / "run" / "releases").read_text() == "1\n"
    done = play(tmp_path, *RUN, resume=True)
    assert [line["privacy"]["survivors"] for line in lines(tmp_path / "run")] == [[0, 4], [0, 4, 4]]
    assert done["privacy"]["epsilon"] > done["privacy"]["planned_epsilon"] * 0.9


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("secagg=off",), "secagg=on"),
        (("strategy=krum", "secagg=on"), "krum"),
        (("secagg=on", "privacy.epsilon=1", "privacy.noise_multiplier=0.5"), "leave one"),
        (("secagg=on", "privacy.scale=1e9"), "scale"),
        (("secagg=on", "evaluate.federated=true"), "evaluate.federated"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_begun(tmp_path, words, why):
    with pytest.raises(ConfigError, match=why):
        play(tmp_path, *QUICK, "privacy=distributed", *words)
    assert not list(tmp_path.glob("*/log.txt"))


def test_real_sites_with_a_ledger_pay_for_their_part_and_refuse_what_is_not_paid(
    tmp_path, monkeypatch
):
    """Clients that are no simulated ones, with a ledger each."""
    folder, names = tmp_path / "ledgers", []
    Ledger.create(folder, "0" * 64, Cap(1.0, 1e-5, "rdp"))  # of other data
    fingerprint = client.Site.fingerprint

    def noted(self, context):
        name = fingerprint(self, context)
        if name not in names:
            names.append(name)
            Ledger.create(folder, name, Cap(1000.0 if len(names) > 1 else 0.1, 1e-5, "rdp"))
        return name

    pool = simulation.pool

    def of_sites(config, vault):
        made = pool(config, vault)
        inside = made._handle.__self__._options["node_config"]
        inside.pop("simulated")
        inside["ledger"] = str(folder)
        return made

    monkeypatch.setattr(client.Site, "fingerprint", noted)
    monkeypatch.setattr(simulation, "pool", of_sites)
    play(tmp_path, *RUN, "rounds=1")
    (line,) = lines(tmp_path / "run")
    assert line["clients"]["ok"] == 3
    assert "BudgetSpent" in line["clients"]["failed"][0]["reason"]
    purposes = {spend.purpose for each in ledgers(folder) for spend in each.spends}
    assert purposes == {"a part in a noised sum"}
    with pytest.raises(RunFailed, match="PrivacyRequired"):
        play(tmp_path, *QUICK, "secagg=on", "run_id=plain")
    assert summary(tmp_path / "plain")["status"] == "failed"
