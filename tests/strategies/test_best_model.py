"""The best model wins, by a metric that its author cannot make up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from judges import FIRST, Judges, QueuedGrid, QueuedLink, first_model, play
from parties import Parties
from runs import QUICK, lines
from runs import play as run

from fedipfs import CidGrid, use_store
from fedipfs.data import Examples
from fedipfs.errors import ConfigError, NotSealed, RunFailed
from fedipfs.exchange import StoredArrays, Vault, store_arrays
from fedipfs.ipld import CID
from fedipfs.server.cohort import ask
from fedipfs.store import FolderStore, dag
from fedipfs.strategies import Brief, build
from fedipfs.strategies.best_model import BestModel
from fedipfs.strategies.selector import ring_after
from fedipfs.tasks import Task
from fedipfs.trust import is_sealed
from fedipfs.weights.compression import Spec

ZERO = {"w": np.zeros(1, "f4")}


def start(store, judges: Judges, *, order: int = 0, nodes: int | None = None):
    """The coordinator's grid, and the first model."""
    use_store(store)
    grid = QueuedGrid(judges.app, nodes or len(judges.quality)).queue(order)
    return CidGrid(grid, store, read_updates=False), first_model(store, ZERO)


def strategy(selector: str = "cross", **options) -> BestModel:
    return BestModel(selector=selector, min_train_nodes=1, min_available_nodes=1, **options)


def value(arrays) -> float:
    return round(float(arrays["w"].numpy()[0]), 6)


# ---- who wins


@pytest.mark.parametrize("selector", ["reported", "cross"])
def test_the_best_honest_model_wins(store, selector):
    grid, model = start(store, Judges(0.3, 0.9, 0.6))
    chosen = strategy(selector)
    best, _ = play(chosen, grid, model)
    assert value(best) == 0.9
    assert [row["node"] for row in chosen.notes["ranking"]] == [3, 4, 2]


@pytest.mark.parametrize(("selector", "winner"), [("reported", 0.1), ("cross", 0.8)])
def test_a_liar_wins_by_its_own_word_and_loses_by_that_of_others(store, selector, winner):
    judges = Judges(0.8, 0.7, 0.1, 0.6)
    judges.claims[FIRST + 2] = 1.0
    judges.verdicts[FIRST + 2] = 0.0  # it speaks ill of the others, too
    grid, model = start(store, judges)
    best, _ = play(strategy(selector), grid, model)
    assert value(best) == pytest.approx(winner)


@pytest.mark.parametrize("lie", [0.0, 1.0, 1e30, -5.0])
def test_a_minority_of_evaluators_cannot_decide(store, lie):
    judges = Judges(0.2, 0.9, 0.4, 0.5, 0.6, 0.3)
    judges.verdicts = {FIRST: lie, FIRST + 5: lie}
    grid, model = start(store, judges)
    best, _ = play(strategy(evaluators=5), grid, model)
    assert value(best) == pytest.approx(0.9)


def test_the_direction_is_that_of_the_metric(store):
    for direction, winner in (("max", 0.9), ("min", 0.3)):
        grid, model = start(store, Judges(0.3, 0.9, 0.6))
        best, _ = play(strategy("reported", direction=direction), grid, model)
        assert value(best) == pytest.approx(winner)


@pytest.mark.parametrize("selector", ["reported", "cross"])
def test_of_equals_the_lower_node_wins_in_any_order_of_arrival(store, selector):
    for order in range(4):
        judges = Judges(0.5, 0.5, 0.5)
        grid, model = start(store, judges, order=order)
        chosen = strategy(selector)
        play(chosen, grid, model)
        assert [row["node"] for row in chosen.notes["ranking"]] == [2, 3, 4]


def test_the_ranking_says_who_measured_what(store):
    judges = Judges(0.25, 0.75)
    judges.verdicts[FIRST] = 0.5
    grid, model = start(store, judges)
    chosen = strategy()
    best, _ = play(chosen, grid, model)
    first, second = chosen.notes["ranking"]
    assert (first["node"], first["score"]) == (FIRST + 1, 0.5)
    assert first["evaluators"] == [{"node": FIRST, "score": 0.5}]
    assert first["cid"] == best.cid
    assert (second["node"], second["score"]) == (FIRST, 0.25)
    assert type(second["cid"]) is CID


# ---- who evaluates


def test_each_candidate_goes_to_others_as_often_as_asked(store):
    judges = Judges(0.1, 0.2, 0.3, 0.4, 0.5)
    grid, model = start(store, judges)
    _, answers = play(strategy(evaluators=2), grid, model)
    assert len(answers.follow_ups) == 10
    by_candidate = {
        q: [n for n, f in judges.evaluated if f == pytest.approx(q)] for q in (0.1, 0.5)
    }
    for quality, evaluators in by_candidate.items():
        author = FIRST + round(quality * 10) - 1
        assert len(set(evaluators)) == 2
        assert author not in evaluators
    counts = [sum(node == each for node, _ in judges.evaluated) for each in judges.quality]
    assert counts == [2] * 5


@given(
    st.lists(st.integers(2, 2**64 - 1), min_size=2, max_size=12, unique=True),
    st.integers(0, 2**32),
    st.integers(1, 99),
    st.randoms(),
)
def test_the_choice_of_evaluators_is_fixed_by_seed_round_and_candidate(nodes, seed, number, rng):
    author = nodes[0]
    chosen = ring_after(seed, number, author, nodes)
    rng.shuffle(nodes)
    assert ring_after(seed, number, author, nodes) == chosen
    assert author not in chosen
    assert sorted([*chosen, author]) == sorted(nodes)
    gone = rng.choice(chosen)  # one that is not there changes nothing for the others
    rest = [node for node in nodes if node != gone]
    assert ring_after(seed, number, author, rest) == [each for each in chosen if each != gone]


def test_the_order_of_arrival_changes_nothing(store):
    notes = []
    for order in range(5):
        grid, model = start(store, Judges(0.3, 0.9, 0.6, 0.5), order=order)
        chosen = strategy(seed=7)
        play(chosen, grid, model, number=3)
        notes.append(chosen.notes)
    assert notes.count(notes[0]) == 5


def test_nodes_outside_the_cohort_may_evaluate(store):
    """One client trains; the others only judge."""
    judges = Judges(0.4, 0.5, 0.6)
    grid, model = start(store, judges)
    chosen = strategy()
    config = ConfigRecord({"run-config": "x"})
    (message, *_) = sorted(
        chosen.configure_train(1, model, config, grid), key=lambda m: m.metadata.dst_node_id
    )
    (reply,) = ask(grid, [message], now=lambda: 0.0).replies
    questions = list(chosen.follow_up(1, reply, grid))
    assert {q.metadata.dst_node_id for q in questions} == {FIRST + 1, FIRST + 2}
    told = dict(questions[0].content["config"])
    assert told == {"run-config": "x", "server-round": 1}


# ---- what goes wrong


def test_an_evaluator_that_fails_is_left_out(store):
    judges = Judges(0.2, 0.9, 0.5, 0.6)
    judges.verdicts = {FIRST: RuntimeError("no data"), FIRST + 2: 0.7}
    grid, model = start(store, judges)
    chosen = strategy()
    best, _ = play(chosen, grid, model)
    rows = {row["node"]: row for row in chosen.notes["ranking"]}
    evaluators = {each["node"]: each["score"] for each in rows[FIRST + 1]["evaluators"]}
    assert evaluators == pytest.approx({FIRST + 2: 0.7, FIRST + 3: 0.9})
    assert value(best) == pytest.approx(0.9)


@pytest.mark.parametrize(("direction", "lie"), [("max", 1e30), ("min", -1e30)])
def test_a_liar_does_not_decide_because_others_fail(store, direction, lie):
    """Of two answers the mean is the liar's to choose; of one, all of it."""
    judges = Judges(0.2, 0.9, 0.4, 0.5)
    judges.verdicts = {FIRST: RuntimeError("no data"), FIRST + 3: lie}
    grid, model = start(store, judges)
    chosen = strategy(direction=direction)
    play(chosen, grid, model)  # two or three of the three that are asked answer
    scores = {row["node"]: row["score"] for row in chosen.notes["ranking"]}
    assert scores == pytest.approx(judges.quality)
    judges.verdicts |= {FIRST + 1: RuntimeError("nor I")}
    chosen = strategy(direction=direction)
    best, _ = play(chosen, grid, model)
    # The first two are judged by the liar and one more, the others by one of these two alone.
    rows = {row["node"]: row for row in chosen.notes["ranking"]}
    assert [rows[FIRST + i]["score"] is None for i in range(4)] == [False, False, True, True]
    assert value(best) == pytest.approx(0.9 if direction == "max" else 0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, RuntimeError("broken")])
def test_a_candidate_without_a_score_is_last_and_says_why(store, bad):
    judges = Judges(0.2, 0.1, 0.9)
    judges.verdicts = {FIRST: bad}
    grid, model = start(store, judges)
    chosen = strategy()
    best, _ = play(chosen, grid, model)
    last = chosen.notes["ranking"][-1]
    assert (last["node"], last["score"]) == (FIRST + 2, None)
    assert f"1 of 2 evaluators gave a score, too few (node {FIRST}: " in last["reason"]
    assert value(best) == pytest.approx(0.2)


@pytest.mark.parametrize("claim", [math.nan, math.inf, -math.inf])
def test_a_claim_that_is_no_number_loses(store, claim):
    judges = Judges(0.2, 0.1)
    judges.claims[FIRST] = claim
    grid, model = start(store, judges)
    chosen = strategy("reported")
    best, _ = play(chosen, grid, model)
    assert value(best) == pytest.approx(0.1)
    assert "not a finite number" in chosen.notes["ranking"][-1]["reason"]


def test_without_any_score_the_round_fails_with_the_reason(store):
    judges = Judges(0.2, 0.9)
    judges.verdicts = dict.fromkeys(judges.quality, RuntimeError("no examples"))
    grid, model = start(store, judges)
    with pytest.raises(RunFailed, match=r"no update has a score .*no examples"):
        play(strategy(), grid, model)


def test_a_winner_that_is_not_finite_is_left_out(store):
    judges = Judges(0.2, math.nan, 0.4)
    judges.verdicts = dict.fromkeys(judges.quality, 0.5)
    judges.quality[FIRST] = math.nan  # of equals it would come first
    grid, model = start(store, judges)
    chosen = strategy()
    best, _ = play(chosen, grid, model)
    assert value(best) == pytest.approx(0.4)
    assert set(chosen.excluded) == {FIRST, FIRST + 1}


def test_an_update_other_than_was_evaluated_cannot_win(store):
    grid, model = start(store, Judges(0.2, 0.9))
    chosen = strategy()
    _, answers = play(chosen, grid, model)
    reply = next(r for r in answers.replies if r.metadata.src_node_id == FIRST + 1)
    metrics = reply.content["metrics"]
    other = first_model(store, {"w": np.full(1, 7, "f4")})
    reply.content = RecordDict({"arrays": other, "metrics": metrics})
    best, _ = chosen.aggregate_train(1, answers.replies)
    assert value(best) == pytest.approx(0.2)
    assert "not what evaluators were given" in chosen.notes["ranking"][-1]["reason"]


def test_answers_that_nobody_asked_for_are_ignored(store):
    grid, model = start(store, Judges(0.2, 0.9))
    chosen = strategy()
    _, answers = play(chosen, grid, model)
    before = chosen.notes
    stray = Message(RecordDict(), FIRST, "evaluate")
    chosen.take_follow_ups([stray])
    chosen.aggregate_train(1, answers.replies)
    assert chosen.notes == before


# ---- on the coordinator's examples


class Numbers(Task):
    """The model is its "w"; its accuracy is w itself."""

    def model(self):
        import torch

        class One(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.w = torch.nn.Parameter(torch.zeros(1))

            def forward(self, x):
                return self.w.expand(len(x), 1)

        return One()

    def data(self, *, root, fallback):
        raise NotImplementedError

    def loss(self, output, target):
        return output.mean()

    def metrics(self, output, target):
        return {"accuracy": output.mean()}


HELD_OUT = Examples(np.zeros((4, 1), "f4"), np.zeros(4, np.int64))


def test_the_coordinator_judges_on_its_own_examples(store):
    judges = Judges(0.3, 0.9, 0.6)
    judges.claims = dict.fromkeys(judges.quality, 0.0)
    grid, model = start(store, judges)
    chosen = strategy("server", task=Numbers(), held_out=HELD_OUT)
    best, answers = play(chosen, grid, model)
    assert value(best) == pytest.approx(0.9)
    assert answers.follow_ups == judges.evaluated == []
    assert [row["score"] for row in chosen.notes["ranking"]] == pytest.approx([0.9, 0.6, 0.3])
    assert not chosen.needs_validation


# ---- sealed


@pytest.mark.parametrize("seal", ["all", "updates"])
def test_what_others_evaluate_and_inherit_they_can_open(tmp_path, store, seal):
    parties = Parties(tmp_path, store, seal)
    judges = Judges(0.3, 0.9, 0.6, mod=parties.mod)
    link = QueuedLink(judges.app, 3).queue(0)
    grid = CidGrid(link, parties.coordinator, name_of=parties.name_of, read_updates=False)
    model = first_model(parties.coordinator, ZERO)
    chosen = strategy()
    best, answers = play(chosen, grid, model)
    assert value(best) == pytest.approx(0.9)
    assert len(judges.evaluated) == 6
    assert best.is_as_in(parties.coordinator)
    for row in chosen.notes["ranking"]:  # what evaluators were given is one client's
        assert is_sealed(next(iter(dag.cat(store, row["cid"]))))
        with pytest.raises(NotSealed):
            Vault(store).weights(row["cid"])
    for name in parties.names:
        opened = parties.vaults[name].weights(best.cid)
        assert opened.tensor("w")[0] == pytest.approx(0.9)
    for reply in answers.replies:  # what came in is for the coordinator alone
        update = reply.content["arrays"].cid
        assert is_sealed(next(iter(dag.cat(store, update))))
        assert update not in [row["cid"] for row in chosen.notes["ranking"]]
    second, _ = play(chosen, grid, best, number=2)
    assert value(second) == pytest.approx(0.9)


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_goes_out_of_one_clients_model_is_sealed(tmp_path, store, down, resumed):
    parties = Parties(tmp_path, store, "updates")
    judges = Judges(0.3, 0.9, 0.6, mod=parties.mod)
    link = QueuedLink(judges.app, 3).queue(0)
    grid = CidGrid(
        link,
        parties.coordinator,
        name_of=parties.name_of,
        read_updates=False,
        compression=Spec.parse("int8"),
        compress_models=down,
    )
    best, _ = play(strategy(), grid, first_model(parties.coordinator, ZERO))
    best = store_arrays(parties.coordinator, best)  # as the server takes it over
    if resumed:
        best = StoredArrays.open(parties.coordinator, best.cid)
    before = len(link.crossed)
    play(strategy(), grid, best, number=2)
    sent = [m.content["fedipfs"]["cid:arrays"] for m in link.crossed if "fedipfs" in m.content
            and "cid:arrays" in m.content["fedipfs"]]  # fmt: skip
    assert len(link.crossed) > before
    first = sent[0]
    for text in sent:
        assert is_sealed(next(iter(dag.cat(store, CID.parse(text))))) == (text != first)


def test_models_do_not_hold_on_to_those_before_them(store):
    grid, model = start(store, Judges(0.3, 0.9))
    chosen = strategy()
    for number in range(1, 4):
        model, _ = play(chosen, grid, model, number=number)
        assert model.base is None


# ---- whole runs


@pytest.mark.parametrize("seal", ["all", "updates"])
def test_a_run_is_the_same_however_it_is_sealed(tmp_path, seal):
    words = (*QUICK, "strategy=best_model", "run_id=one")
    plain = run(tmp_path / "none", *words)
    sealed = run(tmp_path / "all", *words, f"seal={seal}")
    assert plain["metrics"] == sealed["metrics"]
    ours, theirs = (lines(tmp_path / folder / "one") for folder in ("none", "all"))
    held = FolderStore(tmp_path / "all" / "store")
    shared = [CID.parse(row["cid"]) for line in theirs for row in line["aggregation"]["ranking"]]
    assert all(is_sealed(next(iter(dag.cat(held, cid)))) for cid in shared)
    for line, other in zip(ours, theirs, strict=True):
        rows = line["aggregation"]["ranking"]
        assert [(row["client"], row["score"], row["evaluators"]) for row in rows] == [
            (row["client"], row["score"], row["evaluators"])
            for row in other["aggregation"]["ranking"]
        ]
        assert [len(row["evaluators"]) for row in rows] == [3] * 4
        assert rows[0]["cid"] == line["model_cid"]
        assert line["clients"]["failed"] == other["clients"]["failed"] == []


def test_a_run_by_the_clients_own_word_or_the_coordinators(tmp_path):
    for selector in ("reported", "server"):
        words = (*QUICK, "strategy=best_model", f"strategy.selector={selector}")
        found = run(tmp_path, *words, "data.held_out=0.3", f"run_id={selector}")
        assert found["metrics"]["accuracy"] > 0.7
        scores = [row["score"] for row in lines(tmp_path / selector)[0]["aggregation"]["ranking"]]
        assert scores == sorted(scores, reverse=True)


# ---- configuration


BRIEF = Brief(per_round=4, min_successes=2, task=Numbers(), validation=0.1)


@pytest.mark.parametrize(
    ("options", "brief", "says"),
    [
        ({"selector": "server"}, {}, r"selector=server needs examples.*data\.held_out=0\.2"),
        ({"selector": "cross"}, {"per_round": 1}, r"clients\.per_round=1 .*take 2 or more"),
        ({"selector": "crosss"}, {}, r"selector=crosss is unknown; choose reported, server, cross"),
        ({"evaluators": 0}, {}, r"evaluators=0 must be a whole number of at least 1"),
        ({"selector": "reported"}, {"validation": 0.0}, r"data\.validation=0 leaves them none"),
        ({}, {"validation": 0.0}, r"data\.validation=0 leaves them none"),
        ({}, {"direction": "up"}, r"task\.direction=up must be max or min"),
        ({"judges": 3}, {}, r"unknown option of strategy best_model"),
    ],
)
def test_what_cannot_be_right_is_refused(options, brief, says):
    with pytest.raises(ConfigError, match=says):
        build({"name": "best_model", **options}, Brief(**{**vars(BRIEF), **brief}))


def test_what_it_needs_of_clients():
    built = build({"name": "best_model"}, BRIEF)
    assert built.needs_validation
    on_server = build(
        {"name": "best_model", "selector": "server"}, Brief(**{**vars(BRIEF), "held_out": HELD_OUT})
    )
    assert not on_server.needs_validation
