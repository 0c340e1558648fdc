"""Members stay members, vote, and teach; hand-worked cases, then digits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import ConfigRecord
from judges import Judges, QueuedGrid, QueuedLink, first_model, play
from parties import Parties
from runs import QUICK, lines
from runs import play as run

import fedipfs
from fedipfs import CidGrid, use_store
from fedipfs.data import Examples
from fedipfs.errors import ConfigError, NotSealed, RunFailed
from fedipfs.exchange import Vault, from_torch, get_ensemble, specs_of, store_arrays
from fedipfs.ipld import CID
from fedipfs.server.cohort import CohortGrid
from fedipfs.store import FolderStore, dag
from fedipfs.strategies import Average, Brief, FedAvg, build, load_state, save_state
from fedipfs.strategies.distill import Distillation
from fedipfs.strategies.ensemble import EnsembleStrategy
from fedipfs.tasks import evaluate
from fedipfs.tasks.ensemble import Ensemble
from fedipfs.tasks.small import Digits
from fedipfs.trust import is_sealed

ZERO = {"w": np.zeros(1, "f4")}
TARGET = "fedipfs.tasks.small:Digits"
ASKS = {"min_train_nodes": 1, "min_available_nodes": 1}


def strategy(**options) -> EnsembleStrategy:
    task = options.pop("task", Digits())
    return EnsembleStrategy(task=task, task_target=TARGET, **{**ASKS, **options})


def start(store, judges: Judges, *, order: int = 0):
    use_store(store)
    grid = QueuedGrid(judges.app, len(judges.quality)).queue(order)
    return CidGrid(grid, store, read_updates=False), first_model(store, ZERO)


def only(grid: CidGrid, *nodes: int) -> CohortGrid:
    """The grid as a strategy sees it in a round that only `nodes` train in."""
    cohort = CohortGrid(grid, nodes)
    cohort.receive, cohort.give_up = grid.receive, grid.give_up  # type: ignore[attr-defined]
    return cohort


def value(arrays) -> float:
    return round(float(arrays["w"].numpy()[0]), 6)


def given(judges: Judges) -> list[float]:
    """What the nodes were given to train last, in their order."""
    return [judges.given[node] for node in sorted(judges.given)]


def members(store, chosen: EnsembleStrategy) -> dict[float, float]:
    """Weight by quality, of the ensemble that was stored last."""
    cids, recipe = get_ensemble(store, chosen.notes["ensemble"])
    tensors = [fedipfs.Weights(store, cid).tensor("w")[0] for cid in cids]
    return {round(float(w), 6): weight for w, weight in zip(tensors, recipe.weights, strict=True)}


# ---- whose model trains on


def test_by_default_each_client_trains_its_own_model_on(store):
    judges = Judges(0.3, 0.9, 0.6)
    grid, model = start(store, judges)
    chosen = strategy()
    model, _ = play(chosen, grid, model)
    assert set(given(judges)) == {0.0}
    assert value(model) == pytest.approx(0.6)  # what a newcomer would begin with
    judges.quality = {node: quality + 1 for node, quality in judges.quality.items()}
    play(chosen, grid, model, number=2)
    assert given(judges) == pytest.approx([0.3, 0.9, 0.6])
    assert members(store, chosen) == {1.3: 1.0, 1.9: 1.0, 1.6: 1.0}


def test_with_a_common_model_all_train_the_mean_of_the_members(store):
    judges = Judges(0.3, 0.9, 0.6)
    grid, model = start(store, judges)
    chosen = strategy(start="common", weighting="examples")
    model, _ = play(chosen, grid, model)
    expected = (10 * 0.3 + 20 * 0.9 + 30 * 0.6) / 60
    assert value(model) == pytest.approx(expected)
    play(chosen, grid, model, number=2)
    assert given(judges) == pytest.approx([expected] * 3)


@pytest.mark.parametrize(("weighting", "plain"), [("examples", FedAvg), ("uniform", Average)])
def test_the_common_model_is_bit_for_bit_that_of_plain_averaging(store, weighting, plain):
    judges = Judges(0.1, 0.7, 0.35)
    grid, model = start(store, judges)
    ours, _ = play(strategy(start="common", weighting=weighting), grid, model)
    averaging = plain(**ASKS)
    averaging.follow_up = lambda *_: []  # type: ignore[attr-defined]
    averaging.take_follow_ups = lambda _: None  # type: ignore[attr-defined]
    theirs, _ = play(averaging, grid, model)
    assert ours.cid == theirs.cid


def test_who_is_not_asked_stays_a_member(store):
    judges = Judges(0.3, 0.9, 0.6)
    grid, model = start(store, judges)
    chosen = strategy()
    model, _ = play(chosen, only(grid, 2, 3), model)
    assert members(store, chosen) == {0.3: 1.0, 0.9: 1.0}
    judges.quality = {2: 5.0, 3: 5.0, 4: 0.6}
    model, _ = play(chosen, only(grid, 4), model, number=2)
    assert members(store, chosen) == {0.3: 1.0, 0.9: 1.0, 0.6: 1.0}
    assert judges.given[4] == pytest.approx(0.6)  # a newcomer begins with the members' mean


def test_with_a_common_model_the_members_are_those_of_the_round(store):
    grid, model = start(store, Judges(0.3, 0.9, 0.6))
    chosen = strategy(start="common")
    model, _ = play(chosen, only(grid, 2, 3), model)
    play(chosen, only(grid, 4), model, number=2)
    assert members(store, chosen) == {0.6: 1.0}


@pytest.mark.parametrize("resumed", [False, True])
def test_where_there_are_too_many_those_heard_longest_ago_leave(store, monkeypatch, resumed):
    monkeypatch.setattr("fedipfs.strategies.ensemble.MAX_MEMBERS", 3)
    monkeypatch.setattr("fedipfs.exchange.ensemble.MAX_MEMBERS", 3)
    judges = Judges(2.0, 3.0, 4.0, 5.0, 6.0)
    grid, model = start(store, judges)
    chosen, expected = strategy(weighting="examples"), []
    rounds = [((2, 3), None), ((4,), None), ((2,), None), ((5,), [3]), ((3, 6), [2, 4])]
    for number, (cohort, dropped) in enumerate(rounds, 1):
        if resumed:
            state, _ = save_state(chosen, store)
            chosen = strategy(weighting="examples")
            load_state(chosen, store, state)
        model, _ = play(chosen, only(grid, *cohort), model, number=number)
        expected = sorted({*expected, *cohort} - set(dropped or ()))
        assert list(members(store, chosen)) == expected == sorted(chosen.members)
        assert chosen.notes.get("dropped") == (dropped and {"nodes": dropped})
        assert sorted(map(int, chosen.examples)) == sorted(map(int, chosen.heard)) == expected


def test_the_best_of_many_may_be_many(store, monkeypatch):
    monkeypatch.setattr("fedipfs.strategies.ensemble.MAX_MEMBERS", 2)
    monkeypatch.setattr("fedipfs.exchange.ensemble.MAX_MEMBERS", 2)
    grid, model = start(store, Judges(0.3, 0.9, 0.6))
    chosen = strategy(top_k=2)
    play(chosen, grid, model)
    assert set(members(store, chosen)) == {0.9, 0.6}
    assert sorted(chosen.members) == [2, 3, 4]  # each still trains its own


def test_who_fails_stays_a_member_with_the_model_it_had(store):
    judges = Judges(0.3, 0.9, 0.6)
    grid, model = start(store, judges)
    chosen = strategy()
    model, _ = play(chosen, grid, model)
    judges.quality[3] = float("nan")
    play(chosen, grid, model, number=2)
    assert list(chosen.excluded) == [3]
    assert members(store, chosen) == {0.3: 1.0, 0.9: 1.0, 0.6: 1.0}


# ---- who votes, with which weight


@pytest.mark.parametrize("selector", ["cross", "reported"])
def test_only_the_best_vote(store, selector):
    judges = Judges(0.3, 0.9, 0.6)
    grid, model = start(store, judges)
    chosen = strategy(top_k=2, selector=selector)
    model, _ = play(chosen, grid, model)
    assert members(store, chosen) == {0.9: 1.0, 0.6: 1.0}
    assert value(model) == pytest.approx(0.75)
    assert [row["node"] for row in chosen.notes["ranking"]] == [3, 4, 2]
    assert [row["node"] for row in chosen.notes["members"]] == [3, 4]
    assert [row["score"] for row in chosen.notes["members"]] == pytest.approx([0.9, 0.6])


def test_a_member_that_was_not_asked_keeps_the_score_it_had(store):
    judges = Judges(0.3, 0.9, 0.6)
    grid, model = start(store, judges)
    chosen = strategy(top_k=2)
    model, _ = play(chosen, grid, model)
    judges.quality[4] = 0.1
    play(chosen, only(grid, 4), model, number=2)
    assert members(store, chosen) == {0.3: 1.0, 0.9: 1.0}


@pytest.mark.parametrize(
    ("direction", "weights"),
    [
        ("max", {0.25: 0.25, 0.75: 0.75, 0.5: 0.5}),
        ("min", {0.25: 1 / 1.25, 0.75: 1 / 1.75, 0.5: 1 / 1.5}),
    ],
)
def test_the_better_weigh_more(store, direction, weights):
    grid, model = start(store, Judges(0.25, 0.75, 0.5))
    chosen = strategy(weighting="score", direction=direction)
    play(chosen, grid, model)
    assert members(store, chosen) == pytest.approx(weights)


def test_who_has_no_score_does_not_vote_where_that_is_the_weight(store):
    judges = Judges(0.25, 0.75, 0.5)
    judges.verdicts = {2: RuntimeError("x")}  # so only its own model is judged by more than half
    grid, model = start(store, judges)
    chosen = strategy(weighting="score")
    play(chosen, grid, model)
    assert members(store, chosen) == {0.25: 0.25}
    judges.verdicts[3] = RuntimeError("z")
    play(chosen, grid, model, number=2)
    assert set(members(store, chosen).values()) == {1.0}  # nobody has one


def test_without_a_choice_nobody_is_asked_for_one(store):
    judges = Judges(0.3, 0.9)
    grid, model = start(store, judges)
    chosen = strategy(selector="cross")
    _, answers = play(chosen, grid, model)
    assert answers.follow_ups == judges.evaluated == []
    assert "ranking" not in chosen.notes
    assert not chosen.needs_validation
    assert strategy(top_k=1).needs_validation


# ---- its result


def test_the_result_is_a_record_and_clients_evaluate_it(store):
    grid, model = start(store, Judges(0.3, 0.9))
    chosen = strategy(voting="hard", fraction_evaluate=1.0, min_evaluate_nodes=1)
    assert chosen.result is None
    before = list(chosen.configure_evaluate(1, model, ConfigRecord(), grid))
    assert "arrays" in before[0].content
    model, _ = play(chosen, grid, model)
    _, recipe = get_ensemble(store, chosen.result)
    assert (recipe.task, recipe.voting) == (TARGET, "hard")
    messages = list(chosen.configure_evaluate(1, model, ConfigRecord({"run-config": "x"}), grid))
    assert len(messages) == 2
    for message in messages:
        assert list(message.content) == ["config"]  # the ensemble, and no model
        assert dict(message.content["config"]) == {
            "run-config": "x",
            "server-round": 1,
            "ensemble": str(chosen.result),
        }


# ---- architectures


SIZES = ({"hidden": 4}, {"hidden": 8})


class Widths(Judges):
    """Clients whose answer is the model they got, plus 1; so structures stay as they are."""

    def _train(self, message, context):
        from flwr.app import Message, MetricRecord, RecordDict

        node = context.node_id
        self.told[node] = dict(message.content["config"])
        state = {
            name: torch.from_numpy(array.numpy()) + 1
            for name, array in message.content["arrays"].items()
        }
        metrics = MetricRecord({"num-examples": 10, "train_loss": 0.5})
        content = RecordDict({"arrays": from_torch(state), "metrics": metrics})
        return Message(content, reply_to=message)

    def _evaluate(self, message, context):
        from flwr.app import Message, MetricRecord, RecordDict

        options = json.loads(message.content["config"]["task-options"])
        model = Digits(**options).model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        self.evaluated.append((context.node_id, options["hidden"]))
        metrics = MetricRecord({"num-examples": 5, "accuracy": 1 / options["hidden"]})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)


def carrier(where, task=None):
    torch.manual_seed(3)
    return store_arrays(where, from_torch((task or Digits(8)).model().state_dict()))


def test_architectures_are_dealt_in_turn_and_the_carrier_stays(store):
    judges = Widths(0, 0, 0)
    grid, _ = start(store, judges)
    model = carrier(store)
    chosen = strategy(architectures=SIZES, task=Digits(8), seed=5)
    after, _ = play(chosen, grid, model)
    assert after.cid == model.cid
    options = {node: json.loads(told["task-options"]) for node, told in judges.told.items()}
    assert options == {2: SIZES[0], 3: SIZES[1], 4: SIZES[0]}
    cids, recipe = get_ensemble(store, chosen.result)
    assert recipe.options == (SIZES[0], SIZES[1], SIZES[0])
    assert isinstance(fedipfs.load_model(chosen.result, store), Ensemble)
    first = fedipfs.Weights(store, cids[0])
    play(chosen, grid, after, number=2)
    second = fedipfs.Weights(store, get_ensemble(store, chosen.result)[0][0])
    np.testing.assert_allclose(second.tensor("1.bias"), first.tensor("1.bias") + 1)
    torch.manual_seed(5)
    initial = Digits(4).model().state_dict()["1.bias"].numpy()
    np.testing.assert_allclose(first.tensor("1.bias"), initial + 1)


def test_evaluators_are_told_the_architecture_of_what_they_get(store):
    judges = Widths(0, 0, 0)
    grid, _ = start(store, judges)
    chosen = strategy(architectures=SIZES, task=Digits(8), top_k=1)
    play(chosen, grid, carrier(store))
    assert sorted(width for _, width in judges.evaluated) == [4, 4, 4, 4, 8, 8]
    assert [row["node"] for row in chosen.notes["ranking"]] == [2, 4, 3]


def test_newcomers_get_the_next_architecture(store):
    judges = Widths(0, 0, 0)
    grid, _ = start(store, judges)
    chosen = strategy(architectures=SIZES, task=Digits(8))
    model, _ = play(chosen, only(grid, 4), carrier(store))
    play(chosen, only(grid, 2, 3), model, number=2)
    assert chosen.architecture == {"4": 0, "2": 1, "3": 0}


# ---- distillation


def dataset():
    return Digits().data(root=None, fallback="error")


def trained(task: Digits, part: slice, seed: int) -> torch.nn.Module:
    from fedipfs.clients.trainer import train

    data = dataset().train
    torch.manual_seed(seed)
    model = task.model()
    train(
        task,
        model,
        data.inputs[part],
        data.targets[part],
        config={"batch_size": 32, "epochs": 6, "optimizer": {"name": "SGD", "lr": 0.2}},
        seed=seed,
        server_round=1,
    )
    return model


def accuracy(task: Digits, model: torch.nn.Module) -> float:
    test = dataset().test
    return evaluate(task, model, test.inputs, test.targets, batch_size=500)["accuracy"]


def test_a_student_learns_what_its_teachers_know_without_labels():
    """Teachers of different widths, so that there is no mean of weights to begin with."""
    tasks = [Digits(32), Digits(64), Digits(48)]
    parts = [slice(0, 400), slice(400, 800), slice(800, 1200)]
    teachers = [
        (trained(task, part, seed), task, 1.0)
        for seed, (task, part) in enumerate(zip(tasks, parts, strict=True))
    ]
    inputs = Examples(dataset().train.inputs[1200:], np.zeros(242, np.int64))  # labels of no use
    torch.manual_seed(9)
    task, results = Digits(64), []
    for _ in range(2):
        torch.manual_seed(9)
        student = task.model()
        before = accuracy(task, student)
        options = {"steps": 400, "batch_size": 32, "lr": 0.003}
        teaching = Distillation.of(options, inputs, task)
        loss = teaching.teach(student, task, teachers, seed=4)
        results.append({name: each.clone() for name, each in student.state_dict().items()})
    assert before < 0.3
    assert accuracy(task, student) > 0.88
    assert loss < 0.2
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_single_input_that_is_left_over_is_taught_with_batch_normalisation():
    task = Digits(8, norm=True)
    inputs = Examples(dataset().train.inputs[:9], np.zeros(9, np.int64))
    teaching = Distillation.of({"steps": 3, "batch_size": 4}, inputs, task)
    loss = teaching.teach(task.model(), task, [(task.model(), task, 1.0)], seed=1)
    assert np.isfinite(loss)


@pytest.mark.parametrize(("count", "batch_size"), [(9, 1), (1, 4)])
def test_batches_of_one_are_refused_with_batch_normalisation_only(count, batch_size):
    inputs = Examples(dataset().train.inputs[:count], np.zeros(count, np.int64))
    options = {"steps": 2, "batch_size": batch_size}
    with pytest.raises(ConfigError, match=rf"distill\.batch_size={batch_size} of {count} inputs"):
        Distillation.of(options, inputs, Digits(8, norm=True))
    task = Digits(8)
    teaching = Distillation.of(options, inputs, task)
    assert np.isfinite(teaching.teach(task.model(), task, [(task.model(), task, 1.0)], seed=1))


def test_the_teacher_is_the_weighted_mean_of_logits():
    """A student of one parameter per class, and teachers that answer constants."""

    class Constant(torch.nn.Module):
        def __init__(self, *logits: float) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor(logits))

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    task = Digits()
    inputs = Examples(np.zeros((8, 8, 8), np.uint8), np.zeros(8, np.int64))
    student = Constant(0.0, 0.0)
    teaching = Distillation.of({"steps": 600, "lr": 0.1, "temperature": 2.0}, inputs, task)
    teachers = [(Constant(1.0, 0.0), task, 3.0), (Constant(5.0, 4.0), task, 1.0)]
    teachers.append((Constant(0.0, 2.0), task, 1.0))
    teaching.teach(student, task, teachers, seed=0)
    difference = (student.logits[0] - student.logits[1]).item()
    assert difference == pytest.approx((3 * 1 + 1 * 1 - 1 * 2) / 5, abs=1e-3)


def test_distillation_that_diverges_is_named():
    inputs = Examples(dataset().train.inputs[:64], np.zeros(64, np.int64))
    task = Digits()
    teaching = Distillation.of({"steps": 20, "lr": 1e30}, inputs, task)
    with pytest.raises(RunFailed, match=r"lower strategy\.distill\.lr"):
        teaching.teach(task.model(), task, [(task.model(), task, 1.0)], seed=0)


@pytest.mark.parametrize("sizes", [None, SIZES])
def test_the_student_becomes_the_model(store, sizes):
    judges = Widths(0, 0, 0)
    grid, _ = start(store, judges)
    held_out = Examples(dataset().test.inputs[:50], np.zeros(50, np.int64))
    runs = []
    for _ in range(2):
        chosen = strategy(
            architectures=sizes, task=Digits(8), distill={"steps": 3}, held_out=held_out
        )
        model, _ = play(chosen, grid, carrier(store))
        runs.append(model.cid)
        assert chosen.result is None
        assert len(get_ensemble(store, chosen.notes["ensemble"])[0]) == 3
        assert chosen.notes["distill_loss"] < 10
        assert specs_of(model) == specs_of(carrier(store))
    assert runs[0] == runs[1] != carrier(store).cid


# ---- state, seals


def test_a_resumed_run_goes_on_with_the_same_members(store):
    def rounds(upto: int, resumed: bool):
        judges = Judges(0.3, 0.9, 0.6)
        grid, model = start(store, judges)
        chosen = strategy(top_k=2, weighting="examples")
        cohorts = [(2, 3, 4), (2,), (3, 4)]
        for number in range(1, upto + 1):
            judges.quality[2] = 0.3 + number
            if resumed and number == 3:
                state, _ = save_state(chosen, store)
                chosen = strategy(top_k=2, weighting="examples")
                load_state(chosen, store, state)
            model, _ = play(chosen, only(grid, *cohorts[number - 1]), model, number=number)
        return model.cid, chosen.result, chosen.notes, judges.given

    assert rounds(3, resumed=False) == rounds(3, resumed=True)


def test_architectures_survive_resume(store):
    judges = Widths(0, 0, 0)
    grid, _ = start(store, judges)
    chosen = strategy(architectures=SIZES, task=Digits(8))
    model, _ = play(chosen, only(grid, 3, 4), carrier(store))
    state, _ = save_state(chosen, store)
    again = strategy(architectures=SIZES, task=Digits(8))
    load_state(again, store, state)
    results = [play(each, grid, model, number=2)[0].cid for each in (chosen, again)]
    assert results[0] == results[1]
    assert chosen.result == again.result
    assert again.architecture == {"3": 0, "4": 1, "2": 0}


@pytest.mark.parametrize("seal", ["all", "updates"])
def test_members_are_for_all_participants_to_read(tmp_path, store, seal):
    parties = Parties(tmp_path, store, seal)
    judges = Judges(0.3, 0.9, 0.6, mod=parties.mod)
    link = QueuedLink(judges.app, 3).queue(0)
    grid = CidGrid(link, parties.coordinator, name_of=parties.name_of, read_updates=False)
    model = first_model(parties.coordinator, ZERO)
    chosen = strategy(top_k=2)
    for number in (1, 2):
        model, _ = play(chosen, grid, model, number=number)
        for name in parties.names:
            cids, _ = get_ensemble(parties.vaults[name], chosen.result)
            found = [parties.vaults[name].weights(cid).tensor("w")[0] for cid in cids]
            assert found == pytest.approx([0.9, 0.6])
        for member in chosen.members.values():
            assert is_sealed(next(iter(dag.cat(store, member.cid))))
            with pytest.raises(NotSealed):
                Vault(store).weights(member.cid)
        with pytest.raises(NotSealed):  # who weighs how much
            get_ensemble(store, chosen.result)
    assert given(judges) == pytest.approx([0.3, 0.9, 0.6])
    state, _ = save_state(chosen, parties.coordinator)
    again = strategy(top_k=2)
    load_state(again, parties.coordinator, state)
    assert {node: value(each) for node, each in again.members.items()} == pytest.approx(
        {2: 0.3, 3: 0.9, 4: 0.6}
    )


def test_the_mean_of_one_member_is_sealed_as_it_is(tmp_path, store):
    parties = Parties(tmp_path, store, "updates")
    judges = Judges(0.3, 0.9, 0.6, mod=parties.mod)
    link = QueuedLink(judges.app, 3).queue(0)
    grid = CidGrid(link, parties.coordinator, name_of=parties.name_of, read_updates=False)
    chosen = strategy(top_k=1)
    model, _ = play(chosen, grid, first_model(parties.coordinator, ZERO))
    assert value(model) == pytest.approx(0.9)
    adopted = store_arrays(parties.coordinator, model)
    assert is_sealed(next(iter(dag.cat(store, adopted.cid))))


def test_members_do_not_hold_on_to_what_they_began_with(store):
    grid, model = start(store, Judges(0.3, 0.9))
    chosen = strategy()
    for number in range(1, 4):
        model, _ = play(chosen, grid, model, number=number)
    assert [each.base for each in chosen.members.values()] == [None, None]


# ---- whole runs


WORDS = (*QUICK, "strategy=ensemble", "evaluate.federated=true")


def test_what_a_run_yields_is_loaded_in_one_line(tmp_path):
    summary = run(tmp_path, *WORDS, "run_id=one", "task.options={hidden: 24}")
    last = lines(tmp_path / "one")[-1]
    assert summary["final_model_cid"] == last["model_cid"] == last["aggregation"]["ensemble"]
    assert last["evaluate"]["accuracy"] > 0.5
    model = fedipfs.load_model(summary["final_model_cid"], str(tmp_path / "store"))
    assert accuracy(Digits(), model) == pytest.approx(summary["metrics"]["accuracy"])
    weights = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())
    assert len(model.members) == 4


@pytest.mark.parametrize("seal", ["all", "updates"])
def test_a_sealed_run_measures_the_same(tmp_path, seal):
    words = (*WORDS, "strategy.top_k=2", "strategy.architectures=[{hidden: 8}, {hidden: 64}]")
    plain = run(tmp_path / "none", *words, "run_id=one")
    sealed = run(tmp_path / "all", *words, "run_id=one", f"seal={seal}")
    assert sealed["metrics"] == plain["metrics"]
    held = FolderStore(tmp_path / "all" / "store")
    for line in lines(tmp_path / "all" / "one"):
        for row in line["aggregation"]["members"]:
            assert is_sealed(next(iter(dag.cat(held, CID.parse(row["cid"])))))
    for line, other in zip(
        lines(tmp_path / "none" / "one"), lines(tmp_path / "all" / "one"), strict=True
    ):
        assert line["evaluate"] == other["evaluate"]
        assert line["clients"]["failed"] == other["clients"]["failed"] == []
    assert (tmp_path / "none" / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "all" / "one" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ("clients.per_round=2", "strategy.top_k=2"),
        ("strategy.start=common", "data.held_out=0.3", "strategy.distill={steps: 20}"),
    ],
)
def test_a_run_that_is_resumed_ends_with_the_same(tmp_path, options):
    whole = run(tmp_path, *WORDS, *options, "rounds=3", "run_id=whole")
    run(tmp_path, *WORDS, *options, "rounds=1", "run_id=parts")
    FolderStore(tmp_path / "store").gc(0)  # what it needs is pinned
    parts = run(tmp_path, *WORDS, *options, "rounds=3", "run_id=parts", resume=True)
    assert parts["final_model_cid"] == whole["final_model_cid"]
    assert parts["head_cid"] == whole["head_cid"]


# ---- configuration


BRIEF = Brief(
    per_round=4, min_successes=2, clients=8, task=Digits(), task_target=TARGET, validation=0.1
)


@pytest.mark.parametrize(
    ("options", "brief", "says"),
    [
        ({"start": "mine"}, {}, r"strategy\.start=mine is unknown; choose own, common"),
        ({"voting": "loud"}, {}, r"strategy\.voting=loud is unknown; choose soft, hard"),
        ({"weighting": "x"}, {}, r"strategy\.weighting=x is unknown"),
        ({"selector": "x"}, {}, r"strategy\.selector=x is unknown"),
        ({"top_k": 0}, {}, r"top_k=0 must be a whole number of at least 1"),
        ({"top_k": 1.5}, {}, r"top_k=1\.5 must be a whole number"),
        ({"top_k": 5}, {}, r"top_k=5 is more than clients\.per_round=4"),
        ({"top_k": 1}, {"per_round": 1}, r"clients\.per_round=1"),
        ({"top_k": 2, "selector": "server"}, {}, r"set data\.held_out=0\.2"),
        ({"top_k": 2}, {"validation": 0.0}, r"data\.validation=0"),
        ({"weighting": "score"}, {"validation": 0.0}, r"data\.validation=0"),
        ({"architectures": [{"hidden": 3}], "start": "common"}, {}, r"needs strategy\.start=own"),
        ({"architectures": []}, {}, r"a list of task options"),
        ({"architectures": "x"}, {}, r"a list of task options"),
        ({"architectures": [3]}, {}, r"3 is no set of task options"),
        ({"architectures": [{"width": 3}]}, {}, r"\{'width': 3\} does not fit: .*width"),
        ({"architectures": [{"hidden": -3}]}, {}, r"\{'hidden': -3\} does not fit"),
        ({"distill": {}}, {}, r"distill needs inputs .*set data\.held_out=0\.2"),
        ({"distill": {"step": 3}}, {}, r"strategy\.distill\.step is unknown"),
        ({"distill": {"data": "nowhere.npy"}}, {}, r"nowhere\.npy cannot be read"),
        ({}, {"clients": 2000}, r"2000 members; at most 1024 .*strategy\.top_k"),
        ({}, {"task": None}, r"needs the task"),
    ],
)
def test_what_cannot_be_right_is_refused(options, brief, says):
    with pytest.raises(ConfigError, match=says):
        build({"name": "ensemble", **options}, Brief(**{**vars(BRIEF), **brief}))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, r"distill\.steps=0 must be a whole number of at least 1"),
        ({"batch_size": 0}, r"distill\.batch_size=0"),
        ({"lr": -1}, r"distill\.lr=-1 must be a number above 0"),
        ({"temperature": 0}, r"distill\.temperature=0 must be a number above 0"),
    ],
)
def test_numbers_that_distillation_cannot_work_with(options, says):
    held_out = Examples(dataset().test.inputs[:9], np.zeros(9, np.int64))
    with pytest.raises(ConfigError, match=says):
        build(
            {"name": "ensemble", "distill": options}, Brief(**{**vars(BRIEF), "held_out": held_out})
        )


def test_inputs_of_ones_own(tmp_path):
    good, wrong, empty, objects = (tmp_path / f"{name}.npy" for name in ("good", "w", "e", "o"))
    np.save(good, np.zeros((5, 8, 8), np.uint8))
    np.save(wrong, np.zeros((5, 3), np.uint8))
    np.save(empty, np.zeros((0, 8, 8), np.uint8))
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert build({"name": "ensemble", "distill": {"data": str(good)}}, BRIEF)
    for path, says in (
        (wrong, r"inputs \(3,\) of uint8, which the task does not take"),
        (empty, "holds no inputs"),
        (objects, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=says):
            build({"name": "ensemble", "distill": {"data": str(path)}}, BRIEF)


def test_choices_that_are_not_made_ask_for_nothing():
    brief = Brief(**{**vars(BRIEF), "per_round": 1, "min_successes": 1, "validation": 0.0})
    assert build({"name": "ensemble", "selector": "server"}, brief)
    assert build({"name": "ensemble", "selector": "cross"}, brief)
