"""A client under secure aggregation: what it demands, checks, refuses, and says only once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from parties import NAMES
from sites import OPTIONS, Sites, cid_of, reason

from fedipfs import CidGrid, tasks, use_store
from fedipfs.clients import app as client
from fedipfs.clients import secure
from fedipfs.clients.demands import Demands
from fedipfs.errors import ConfigError, NotRecipient, RunFailed
from fedipfs.exchange import Vault, flat_size, from_torch, stages, store_arrays
from fedipfs.ipld import CID
from fedipfs.secagg import Advertise, Delivery, Masked, Parameters, Roster
from fedipfs.trust import Identity, Member, TrustList
from fedipfs.trust.party import Party


@pytest.fixture
def sites(tmp_path, store):
    return Sites(tmp_path, store)


@pytest.fixture
def trainings(monkeypatch):
    """The rounds in which any client trained."""
    honest, seen = client.train_model, []

    def train_model(*args, server_round, **kwargs):
        seen.append(server_round)
        return honest(*args, server_round=server_round, **kwargs)

    monkeypatch.setattr(client, "train_model", train_model)
    return seen


def files(sites, name: str = "alpha") -> set[str]:
    """What is in a site's journals."""
    return {path.name for path in (sites.journals / name).rglob("*") if path.is_file()}


# ---- what a site demands


@pytest.mark.parametrize(
    ("demand", "value", "says"),
    [
        ("secagg-min-clients", 4, "clients=3: this site demands at least 4"),
        ("secagg-min-threshold", 4, "threshold=3: this site demands at least 4"),
        ("secagg-min-neighbours", 3, "neighbours=2: this site demands at least 3"),
        ("secagg-min-colluders", 3, "colluders=2: this site demands at least 3"),
        ("secagg-clip-min", 2, "clip=1.0: this site demands 2 to inf"),
        ("secagg-clip-max", 0.5, "clip=1.0: this site demands 0.0 to 0.5"),
        ("secagg-parameters", "ab" * 32, "this site has pinned abab"),
    ],
)
def test_terms_below_what_a_site_demands_are_refused_at_once(sites, demand, value, says):
    sites.contexts["alpha"].node_config[demand] = value
    refused = reason(sites.stage("alpha", "advertise", sites.session()))
    assert refused.startswith("BelowFloor: ") and says in refused
    assert files(sites) == set()
    assert reason(sites.stage("beta", "advertise", sites.session())) == ""


def test_terms_that_meet_all_demands_are_taken_in_every_round(tmp_path, store):
    """The hash that is pinned does not hold what changes from round to round."""
    pin = stages.lasting(Sites(tmp_path, store).session().parameters).digest().hex()
    least = {"secagg-min-clients": 3, "secagg-min-threshold": 3, "secagg-clip-max": 1}
    sites = Sites(tmp_path, store, node={**least, "secagg-parameters": pin})
    for sites.round in (1, 2):
        found = sites.play(sites.secure())
        assert found.note["survivors"] == 3
        sites.model = found.arrays
    sites.round = 3
    with pytest.raises(RunFailed, match=r"BelowFloor: the parameters' hash is .*; beta: Below"):
        sites.play(sites.secure(options={**OPTIONS, "clip": 0.5}))


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"secagg-min-client": 5}, "secagg-min-client is no demand; use secagg-required, "),
        ({"secagg-min-clients": "5"}, "secagg-min-clients='5' should be int"),
        ({"secagg-min-clients": 5.0}, "secagg-min-clients=5.0 should be int"),
        ({"secagg-min-clients": True}, "secagg-min-clients=True should be int"),
        ({"secagg-required": "true"}, "secagg-required='true' should be bool"),
        ({"secagg-required": 1}, "secagg-required=1 should be bool"),
        ({"secagg-clip-max": "1"}, "secagg-clip-max='1' should be int or float"),
        ({"secagg-parameters": "AB" * 32}, "should be 64 digits of lower-case hex"),
        ({"secagg-parameters": "ab"}, "should be 64 digits of lower-case hex"),
        ({"secagg-journal": 7}, "secagg-journal=7 should be str"),
    ],
)
def test_a_demand_that_is_misspelt_is_not_dropped(sites, node, says):
    with pytest.raises(ConfigError) as caught:
        Demands.of(node)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    sites.contexts["alpha"].node_config |= node
    assert says in reason(sites.send("alpha", "train", sites.ask, sites.model))
    assert says in reason(sites.stage("alpha", "advertise", sites.session()))


def test_other_settings_of_a_node_are_none_of_its_business():
    assert Demands.of({"partition-id": 3, "data-root": "x"}).floors.clients == 3


def test_journals_are_in_the_state_folder_unless_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Demands.of({}).journals == tmp_path / "fedipfs" / "secagg"
    assert Demands.of({"secagg-journal": "/here"}).journals.as_posix() == "/here"


def test_a_site_that_requires_masks_gives_nothing_without(tmp_path, store, trainings):
    sites = Sites(tmp_path, store, node={"secagg-required": True})
    for kind, what in (("train", "an update"), ("evaluate", "what a model achieves here")):
        refused = reason(sites.send("alpha", kind, sites.ask, sites.model))
        assert refused.startswith(f"BelowFloor: {what} leaves this site under masks or not at all")
    assert trainings == []
    reply = sites.send("alpha", "query.capabilities", sites.ask)
    assert reply.content["capabilities"].keys() == {"gpu", "gpus", "cores"}
    assert sites.play(sites.secure()).note["survivors"] == 3
    del sites.contexts["beta"].node_config["secagg-required"]
    reply = sites.send("beta", "query.capabilities", sites.ask)
    assert reply.content["capabilities"]["examples"] > 400


def test_without_keys_nothing_is_answered(sites, store):
    use_store(store)
    cid = stages.put_message(sites.vault, sites.session().to_bytes())
    ask = ConfigRecord({"server-round": 1, "stage": "advertise", "session": str(cid)})
    content = RecordDict({"config": ask})
    message = sites.grid.create_message(content, stages.QUERY, 2, "advertise")
    with pytest.raises(ConfigError, match="needs this client's keys: set FEDIPFS_IDENTITY"):
        client.app(message, sites.contexts["alpha"])


# ---- whether the session fits what is asked


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": "bafyreiother"}, "WrongSession: the session is of the run 'bafyreiother'"),
        ({"run": "bafyreirun+0"}, "WrongSession: the session is of the run 'bafyreirun+0'"),
        ({"run": "bafyreirun+01"}, "WrongSession"),
        ({"run": "bafyreirun+x"}, "WrongSession"),
        ({"run": "bafyreirunaway"}, "WrongSession"),
        ({"run": "bafyrei"}, "WrongSession"),
        ({"round": 2}, "WrongSession: a message of round 1 about round 2 of bafyreirun"),
        ({"cohort": ("beta", "gamma", "zeta")}, "NotInCohort: 'alpha' is not in the cohort"),
    ],
)
def test_a_session_of_another_run_round_or_cohort_is_refused(sites, changes, says):
    assert reason(sites.stage("alpha", "advertise", sites.session(**changes))).startswith(says)
    assert files(sites) == set()


def test_a_round_that_differs_from_the_one_signed_for_is_refused(sites):
    reply = sites.stage("alpha", "advertise", sites.session(), **{"server-round": 2})
    assert reason(reply).startswith("WrongSession: a message of round 1 about round 1")


def test_what_a_client_does_not_tell_is_refused_by_name(sites):
    told = sites.parameters
    for number in ("val_loss", "num-examples", "age"):
        other = dataclasses.replace(told, numbers=(*told.numbers, number))
        assert reason(sites.stage("alpha", "advertise", sites.session(other))) == (
            f"BelowFloor: {number!r} is nothing that this client tells"
        )
    for number in ("weight", "clipped/1", "clipped/128"):
        left = tuple(name for name in told.numbers if name != number)
        other = dataclasses.replace(told, numbers=left)
        assert reason(sites.stage("alpha", "advertise", sites.session(other))) == (
            f"WrongSession: {number!r} is missing among what clients tell"
        )


@pytest.mark.parametrize(
    ("details", "says"),
    [
        ({"examples": None}, "WrongSession: examples=None"),
        ({"examples": -1.0}, "WrongSession: examples=-1.0"),
        ({"examples": 1e300}, "WrongSession: examples=1e+300"),
        ({"examples": "all"}, "WrongSession: examples='all'"),
        ({"examples": True}, "WrongSession: examples=True"),
        ({"relative": None}, "WrongSession: relative is missing"),
        ({"relative": 1}, "WrongSession: relative is missing"),
        ({"model": None}, "WrongSession: model is missing"),
        ({"terms": None}, "WrongSession: terms is missing"),
        ({"terms": "x"}, "WrongSession: terms is missing"),
    ],
)
def test_details_that_make_no_sense_are_refused(sites, details, says):
    assert reason(sites.stage("alpha", "advertise", sites.with_details(**details))).startswith(says)


def test_an_encoding_that_a_client_does_not_know_is_refused(sites):
    told = sites.parameters
    other = Parameters.choose(3, told.values, encoding="plain", details=dict(told.details))
    assert reason(sites.stage("alpha", "advertise", sites.session(other))) == (
        "BelowFloor: encoding='plain' is not known here"
    )


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"session": "bafynonsense"}, "CidError"),
        ({"session": 7}, "BadMessage: a message of secure aggregation is named by its CID"),
        ({"stage": "mask"}, "BadMessage: there is no stage 'mask' without training"),
        ({"stage": "masked"}, "BadMessage: there is no stage 'masked' without training"),
        ({"stage": "share"}, "BadMessage: a message of secure aggregation is named by its CID"),
        ({"stage": "unmask"}, "BadMessage: a message of secure aggregation is named by its CID"),
    ],
)
def test_nonsense_is_refused(sites, ask, says):
    cid = stages.put_message(sites.vault, sites.session().to_bytes())
    asked = {"server-round": 1, "stage": "advertise", "session": str(cid), **ask}
    assert reason(sites.send("alpha", stages.QUERY, asked)).startswith(says)


def test_a_stage_is_not_answered_before_its_turn(sites):
    server, _ = sites.until_masked(sites.session())
    survivors = b"\xa0"
    refused = reason(sites.stage("alpha", "confirm", sites.session(), survivors))
    assert refused.startswith("BadMessage: expected a message of the kind Survivors")
    assert server.stage == "masked"


# ---- whether all train the same


def other_model(sites):
    torch.manual_seed(2)
    module = tasks.load("fedipfs.tasks.small:Digits", {}, allowed=tasks.ALLOWED).model()
    return store_arrays(sites.vault, from_torch(module.state_dict()))


def trained(sites, deliveries, session, name="alpha", **changes):
    return sites.stage(name, "masked", session, deliveries[name], train=True, **changes)


def test_a_model_of_ones_own_is_not_trained(sites, trainings):
    """A trap for one client: it would stand out in the sum."""
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    refused = reason(trained(sites, deliveries, session, model=other_model(sites)))
    assert refused.startswith("WrongSession: asked to train bafybei")
    assert "others are given another model" in refused
    assert trainings == []
    assert reason(trained(sites, deliveries, session)) == ""


def test_who_is_announced_another_model_shares_no_masks_with_the_others(sites):
    """The lie is told earlier: alpha's session binds the other model, the others' the true one."""
    lie = sites.with_details(model=str(other_model(sites).cid))
    truth = sites.session()
    server = sites.server(truth)
    said = {
        name: sites.said(
            sites.stage(name, "advertise", lie if name == "alpha" else truth), Advertise
        )
        for name in NAMES
    }
    roster = Roster(tuple(said[name] for name in NAMES)).to_bytes()
    assert server.missing() == list(NAMES)
    assert "alpha's signature does not fit" in reason(sites.stage("beta", "share", truth, roster))
    assert "beta's signature does not fit" in reason(sites.stage("alpha", "share", lie, roster))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"proximal-mu": 1.0}, "WrongSession: asked to train"),
        ({"answer": "gradient"}, "WrongSession: asked to train"),
        ({"report": True}, "WrongSession: report is nothing that is asked for under masks"),
        ({"personal": ["*"]}, "WrongSession: personal is nothing"),
        ({"loss": True}, "WrongSession: loss is nothing"),
        ({"task-options": "{}"}, "WrongSession: task-options is nothing"),
        ({"control-round": 1}, "WrongSession: control-round is nothing"),
        ({"ensemble": "bafy"}, "WrongSession: ensemble is nothing"),
    ],
)
def test_a_task_of_ones_own_is_not_trained(sites, trainings, ask, says):
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    assert reason(trained(sites, deliveries, session, **ask)).startswith(says)
    assert trainings == []


def test_another_configuration_is_not_trained(sites, trainings):
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    train = {**sites.config["train"], "steps": 50}
    other = str(sites.vault.put_record({**sites.config, "train": train}))
    refused = reason(trained(sites, deliveries, session, **{"run-config": other}))
    assert refused.startswith("WrongSession: asked to train") and trainings == []


def test_a_gradient_is_not_taken_for_a_change_of_the_model_nor_the_reverse(sites, trainings):
    for relative, ask, says in (
        (True, {"answer": "gradient"}, "a gradient is no change of the model"),
        (False, {}, "a gradient is no change of the model, and a model is no gradient"),
    ):
        parameters = dataclasses.replace(
            sites.parameters, details=(("examples", 1000.0), ("relative", relative))
        )
        bound = stages.bound(parameters, sites.model.cid, {**sites.ask, **ask})
        session = dataclasses.replace(sites.session(), parameters=bound)
        _, deliveries = sites.until_masked(session)
        refused = reason(trained(sites, deliveries, session, **ask))
        assert refused.startswith(f"WrongSession: {says}")
        sites.round += 1
    assert trainings == []


def test_fewer_values_than_the_model_has_are_not_masked(sites, trainings):
    parameters = dataclasses.replace(sites.parameters, values=100)
    session = sites.session(parameters)
    _, deliveries = sites.until_masked(session)
    assert reason(trained(sites, deliveries, session)) == (
        "WrongSession: 100 values are to be masked of a model of 4810"
    )
    assert trainings == []


def test_a_private_clients_loss_is_not_told_even_in_sums(tmp_path, store, trainings):
    privacy = {
        "name": "dp_sgd", "epsilon": 3.0, "noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-5,
        "examples": 400, "sample_rate": 0.08, "accountant": "rdp", "clipping": "auto",
        "physical_batch": 512, "replace_layers": False, "metrics": "withhold",
        "metrics_noise_multiplier": 20.0, "metric_bounds": {"loss": 5.0}, "reproducible": False,
    }  # fmt: skip
    ledger = {"ledger": str(tmp_path / "ledger"), "ledger-epsilon": 3.0, "ledger-delta": 1e-5}
    sites = Sites(tmp_path, store, node=ledger, privacy=privacy)
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    assert reason(trained(sites, deliveries, session)).startswith("BelowFloor: the loss on this")
    assert trainings == [] and not list((tmp_path / "ledger").glob("*"))

    sites.round = 2
    parameters = dataclasses.replace(
        sites.parameters,
        numbers=tuple(name for name in sites.parameters.numbers if name != "train_loss"),
    )
    session = sites.session(parameters)
    _, deliveries = sites.until_masked(session)
    reply = trained(sites, deliveries, session)
    assert len(reply.content["privacy"]["events"]) == 3
    paid = sum(path.stat().st_size for path in (tmp_path / "ledger").iterdir())
    again = trained(sites, deliveries, session)  # its answer was lost
    assert trainings == [2]
    assert sum(path.stat().st_size for path in (tmp_path / "ledger").iterdir()) == paid
    assert sites.said(again, Masked) == sites.said(reply, Masked)


# ---- once and no more


def test_asked_again_a_client_says_the_same_and_does_not_train_again(sites, trainings):
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    first = trained(sites, deliveries, session)
    second = trained(sites, deliveries, session)
    assert cid_of(first) == cid_of(second) and trainings == [1]


def test_another_delivery_gets_no_second_vector(sites, trainings):
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    assert reason(trained(sites, deliveries, session)) == ""
    other = {**deliveries, "alpha": deliveries["beta"]}
    assert reason(trained(sites, other, session)).startswith("SecondAnswer: ")
    assert trainings == [1]


def test_a_vector_that_may_have_left_unnamed_is_not_made_again(sites, trainings, monkeypatch):
    """The process was killed after the vector was stored, before it was named."""
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    honest = secure.put_vector

    def killed(vault, parameters, vector):
        honest(vault, parameters, vector)
        raise SystemError("killed")

    monkeypatch.setattr(secure, "put_vector", killed)
    assert "killed" in reason(trained(sites, deliveries, session))
    monkeypatch.setattr(secure, "put_vector", honest)
    refused = reason(trained(sites, deliveries, session))
    assert refused.startswith("SecondAnswer: a vector of alpha may have left")
    assert trainings == [1]


def test_nothing_is_trained_for_who_has_not_shared(sites, trainings):
    session = sites.session()
    server = sites.server(session)
    for name in NAMES:
        server.take(sites.said(sites.stage(name, "advertise", session), Advertise))
    deliveries = {"alpha": Delivery("alpha", NAMES, (bytes(82), bytes(82))).to_bytes()}
    assert reason(trained(sites, deliveries, session)).startswith("OutOfTurn: share of round 1")
    assert trainings == []


def test_a_stage_that_trains_is_masked_and_no_other(sites, trainings):
    session = sites.session()
    sites.until_masked(session)
    reply = sites.stage("alpha", "advertise", session, b"\xa0", train=True)
    assert reason(reply) == "BadMessage: 'advertise' is no stage that trains" and trainings == []


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"num-examples": 3, "steps": 2}, "BadUpdate: its train_loss is missing"),
        ({"num-examples": 3, "train_loss": 1.0}, "BadUpdate: its steps is missing"),
        ({"steps": 2, "train_loss": 1.0}, "BadUpdate: its number of examples is None"),
        ({"num-examples": 0, "steps": 2, "train_loss": 1.0}, "BadUpdate: its number of examples"),
        (
            {"num-examples": 3, "steps": 2, "train_loss": float("nan")},
            "BadUpdate: its train_loss is nan, not finite",
        ),
        (
            {"num-examples": 3, "steps": float("inf"), "train_loss": 1.0},
            "BadUpdate: its steps is inf, not finite",
        ),
        ({"num-examples": 3, "steps": 1e18, "train_loss": 1.0}, "BadUpdate: steps=1e+18 cannot"),
    ],
)
def test_metrics_that_make_no_sum_are_named_and_nothing_leaves(sites, monkeypatch, metrics, says):
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    monkeypatch.setattr(client, "train_model", lambda *args, **kwargs: dict(metrics))
    assert reason(trained(sites, deliveries, session)).startswith(says)
    assert "mask" not in files(sites)  # it may try again
    monkeypatch.undo()
    assert reason(trained(sites, deliveries, session)) == ""


# ---- who reads what, and for how long


def test_what_a_client_answers_is_sealed_to_the_coordinator_that_asked(tmp_path, store):
    """Another coordinator that the site trusts as well reads nothing of it."""
    sites = Sites(tmp_path, store, "all")
    other = Identity.new("rival")
    for name in NAMES:
        listed = TrustList.load(sites.parties.lists[name])
        listed.trust(Member(other.public, "coordinator")).save(sites.parties.lists[name])
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    reply = trained(sites, deliveries, session)
    said = sites.said(reply, Masked)
    rival = Vault(store, Party(other, "coordinator", TrustList(sites.parties.members())), "all")
    for cid in (cid_of(reply), CID.parse(said.vector)):
        with pytest.raises(NotRecipient):
            rival.get_bytes(cid)
        sites.vault.get_bytes(cid)


def test_a_coordinator_cannot_end_what_another_has_begun(tmp_path, store):
    """A second coordinator names the first one's run, and a later round of it."""
    sites = Sites(tmp_path, store)
    session = sites.session()
    server, deliveries = sites.until_masked(session)
    other = Identity.new("rival")
    for name in NAMES:
        listed = TrustList.load(sites.parties.lists[name])
        listed.trust(Member(other.public, "coordinator")).save(sites.parties.lists[name])
    mine = sites.grid
    rival = Vault(store, Party(other, "coordinator", TrustList(sites.parties.members())), "none")
    sites.grid = CidGrid(mine._grid, rival, name_of=sites.parties.name_of)
    sites.round = 9
    assert reason(sites.stage("alpha", "advertise", sites.session())) == ""
    sites.grid, sites.round = mine, 1
    reply = trained(sites, deliveries, session)
    said = sites.said(reply, Masked)
    server.take(said, sites.vault.weights(CID.parse(said.vector)).tensor("masked"))


def test_a_coordinator_that_has_begun_anew_ends_what_it_had_begun_before(sites, trainings, caplog):
    session = sites.session()
    _, deliveries = sites.until_masked(session)
    assert {"advertise", "share"} <= files(sites)
    anew = sites.session(run="bafyreirun+2")
    assert reason(sites.stage("alpha", "advertise", anew)) == ""
    assert "its coordinator says that it was interrupted, 2 times" in caplog.text
    assert files(sites) == {"lock", "advertise"}  # the earlier secrets are gone
    for old in (session, sites.session(run="bafyreirun+1")):
        refused = reason(trained(sites, deliveries, old))
        assert refused.startswith("TooLate: ") and "has begun anew (2)" in refused
    assert trainings == []


def test_a_session_on_other_terms_under_the_same_name_is_refused(sites):
    assert reason(sites.stage("alpha", "advertise", sites.session())) == ""
    other = sites.session(dataclasses.replace(sites.parameters, clip=0.5))
    assert reason(sites.stage("alpha", "advertise", other)).startswith("SecondAnswer: ")


def test_the_sum_is_that_of_what_the_clients_would_have_sent(sites):
    """A whole round, against the updates that the same clients send without masks."""
    found = sites.play(sites.secure())
    moved, weights = np.zeros(flat_size(sites.model)), 0.0
    for name in NAMES:
        reply = sites.send(name, "train", sites.ask, sites.model)
        weight = reply.content["metrics"]["num-examples"] / OPTIONS["examples"]
        moved += weight * change(sites, reply.content["arrays"])
        weights += weight
    mean = change(sites, found.arrays)
    np.testing.assert_allclose(mean, moved / weights, rtol=0, atol=1e-5)
    assert found.metrics["steps"] == 6
    assert found.metrics["weight"] == pytest.approx(weights, abs=1e-8)


def change(sites, after) -> np.ndarray:
    """What a model changes of the round's, as one vector."""
    return np.concatenate(
        [(after[n].numpy() - sites.model[n].numpy()).astype("f8").ravel() for n in sites.model]
    )


def test_all_secrets_are_gone_after_the_last_answer(sites):
    sites.play(sites.secure())
    for name in NAMES:
        assert files(sites, name) == {"lock", "unmask"}
