"""What a site gives away with privacy: what it is paid for, what it refuses, and what it tells."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress

import numpy as np
import pytest
import torch
from ledgered import CAP, CAPABILITIES, EVALUATE, QUADRATIC, SECTION, TRAIN, Sites
from zoo import Small, examples, mlp

from fedipfs.clients import trainer
from fedipfs.errors import DagCborError
from fedipfs.exchange import to_torch
from fedipfs.privacy import dpsgd, noise
from fedipfs.privacy.accounting import Event, epsilon
from fedipfs.privacy.base import GHOST, HOOKS, Mechanism
from fedipfs.privacy.ledger import Cap

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

STEP = Event(2.0, 0.25, 3)  # a round of Sites
METRICS = Event(20.0, 1.0, 1)
HELD_OUT = {"validation": 0.2}
KEY = bytes(16)


def said(reply) -> dict:
    return dict(reply.content["privacy"])


def metrics(reply) -> dict:
    return dict(reply.content["metrics"])


def purposes(sites: Sites, node: int = 2) -> list[str]:
    return [spend.purpose for spend in sites.ledger(node).spends]


# ---- what is paid


def test_a_round_is_paid_for_from_the_sites_own_ledger_and_the_answer_says_so(store, tmp_path):
    sites = Sites(store, tmp_path)
    reply = sites.say(TRAIN, **{"server-round": 7})
    (spend,) = sites.ledger().spends
    assert spend[1:] == ("run", 7, "unsigned", "training", (STEP,))
    assert said(reply) == {
        "events": [2.0, 0.25, 3.0],
        "ledger": hashlib.sha256(f"{sites.ledger().lines[-1]}\n".encode()).hexdigest(),
        "clipping": GHOST,
        "noise": noise.SECRET,
    }
    assert metrics(reply) == {"num-examples": 100, "steps": 3}
    assert sites.ledger(3).spends == []


@pytest.mark.parametrize(
    ("train", "options", "steps"),
    [
        ({"steps": 5}, {}, 5),
        ({"steps": None, "epochs": 2}, {"sample_rate": 0.1}, 20),
        ({"steps": None, "epochs": 1}, {"sample_rate": 0.3}, 4),
        ({"steps": None, "epochs": 1, "batch_size": 1}, {"sample_rate": 1.0}, 1),
    ],
)
@pytest.mark.parametrize("clipping", [GHOST, HOOKS])
def test_as_many_steps_are_made_as_are_paid_for_with_the_mechanism_that_is(
    store, tmp_path, monkeypatch, train, options, steps, clipping
):
    made = []
    fill = dpsgd.PrivateGradients.fill

    def counted(self, *chosen):
        if not chosen:  # else the model is tried, without noise and for nobody to see
            made.append((self.mechanism, self.mode))
        return fill(self, *chosen)

    sites = Sites(store, tmp_path)
    sites.reconfigure({**options, "clipping": clipping}, **train)
    monkeypatch.setattr(dpsgd.PrivateGradients, "fill", counted)
    reply = sites.say(TRAIN)
    rate = {**SECTION, **options}["sample_rate"]
    assert made == [(Mechanism(2.0, 1.0, rate, 100 * rate), clipping)] * steps
    (spend,) = sites.ledger().spends
    assert spend.events == (Event(2.0, rate, steps),)
    assert metrics(reply)["steps"] == steps


def test_a_gradient_is_one_step_and_is_noisy(store, tmp_path):
    sites = Sites(store, tmp_path)
    sites.reconfigure({"sample_rate": 1.0})
    replies = [sites.say(TRAIN, answer="gradient") for _ in range(2)]
    spends = sites.ledger().spends
    assert [each[4:] for each in spends] == [("gradient", (Event(2.0, 1.0, 1),))] * 2
    assert metrics(replies[0]) == {"num-examples": 100, "steps": 1}
    one, two = (
        torch.cat([each.flatten() for each in to_torch(reply.content["arrays"]).values()])
        for reply in replies
    )
    deviation = 2.0 * 1.0 / 100  # of 2,410 values, in each of both
    assert (one - two).std() == pytest.approx(deviation * 2**0.5, rel=0.1)


def test_every_number_that_is_asked_for_is_paid_for(store, tmp_path):
    sites = Sites(store, tmp_path, data=HELD_OUT)
    reply = sites.say(TRAIN, loss=True, report=True)
    assert purposes(sites) == ["metrics", "training", "metrics"]
    assert said(reply)["events"] == [*METRICS, *STEP, *METRICS]
    got = metrics(reply)
    assert set(got) == {"num-examples", "steps", "train_loss", "val_loss", "val_accuracy"}
    assert 0 <= got["train_loss"] <= 5 and 0 <= got["val_accuracy"] <= 1
    reply = sites.say(EVALUATE)
    assert set(metrics(reply)) == {"num-examples", "loss", "accuracy"}
    assert said(reply)["events"] == [*METRICS]
    assert purposes(sites) == ["metrics", "training", "metrics", "metrics"]


def test_it_is_paid_before_it_is_done(store, tmp_path, monkeypatch):
    """A client that dies while it trains has spent: what it made may have left."""
    from fedipfs.clients import app

    def dies(*args, **kwargs):
        assert purposes(sites) == ["training"]
        raise RuntimeError("out of memory")

    sites = Sites(store, tmp_path)
    monkeypatch.setattr(app, "train_model", dies)
    refused = sites.refusal(TRAIN)  # whose text could hold what no other may know
    assert "Withheld" in refused and "out of memory" not in refused
    assert purposes(sites) == ["training"]
    monkeypatch.undo()
    assert not sites.say(TRAIN).has_error()
    assert sites.ledger().history == (Event(2.0, 0.25, 6),)


def test_a_model_that_cannot_be_trained_costs_nothing_and_its_layers_are_named(store, tmp_path):
    sites = Sites(store, tmp_path, options={"norm": True})
    assert "UnsupportedModel: privacy=dp_sgd cannot train layer 2 (BatchNorm1d" in sites.refusal(
        TRAIN
    )
    assert sites.ledger().spends == []


def test_what_is_asked_again_is_paid_again_and_has_other_noise(store, tmp_path):
    sites = Sites(store, tmp_path)
    one, two = (to_torch(sites.say(TRAIN).content["arrays"]) for _ in range(2))
    assert sites.ledger().history == (Event(2.0, 0.25, 6),)
    for name in one:
        assert not torch.equal(one[name], two[name])


def test_another_run_of_another_coordinator_spends_from_the_same_ledger(store, tmp_path):
    sites = Sites(store, tmp_path)
    sites.say(TRAIN)
    sites.run = "another"
    sites.reconfigure({"noise_multiplier": 4.0}, batch_size=7)
    sites.say(TRAIN)
    assert [spend.run for spend in sites.ledger().spends] == ["run", "another"]
    assert sites.ledger().history == (Event(2.0, 0.25, 3), Event(4.0, 0.25, 3))


# ---- what is refused


def test_what_would_pass_the_cap_is_declined_for_good_and_says_why(store, tmp_path, monkeypatch):
    from fedipfs.clients import app

    cap = Cap(epsilon([STEP, STEP], 1e-5, "rdp"), 1e-5, "rdp")  # two rounds, and not a third
    sites = Sites(store, tmp_path, cap=cap)
    assert not sites.say(TRAIN).has_error()
    assert not sites.say(TRAIN).has_error()
    spent = sites.ledger().lines
    monkeypatch.setattr(app, "train_model", lambda *args, **kwargs: pytest.fail("it trained"))
    for _ in range(2):
        text = sites.refusal(TRAIN, **{"server-round": 3})
        assert text.startswith(
            "BudgetSpent: round 3 of run run would pass the privacy cap of this site's data, "
            f"{cap}: "
        )
    assert sites.ledger().lines == spent
    assert sites.ledger().epsilon() == cap.epsilon
    monkeypatch.undo()
    assert not sites.say(TRAIN, node=3).has_error()


def test_metrics_that_are_withheld_are_not_told_and_not_paid_for(store, tmp_path):
    sites = Sites(store, tmp_path, data=HELD_OUT)
    sites.reconfigure({"metrics": "withhold"})
    for kind, ask in ((EVALUATE, {}), (TRAIN, {"report": True}), (TRAIN, {"loss": True})):
        text = sites.refusal(kind, **ask)
        assert text.startswith("PrivacyRequired: what a model achieves on this client's examples")
        assert "privacy.metrics=noise" in text
    assert "metrics" not in purposes(sites)


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, CAPABILITIES])
def test_a_site_with_a_ledger_answers_nobody_without_privacy(store, tmp_path, kind):
    sites = Sites(store, tmp_path, privacy=None, data=HELD_OUT)
    text = sites.refusal(kind)
    assert text.startswith("PrivacyRequired: this site keeps count of what its records spend")
    assert "run with privacy=dp_sgd" in text
    assert sites.ledger().spends == []


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, CAPABILITIES])
def test_who_has_no_ledger_or_is_simulated_may_answer_without_privacy(store, tmp_path, kind):
    for folder, options in (("a", {"cap": None}), ("b", {"simulated": True})):
        sites = Sites(store, tmp_path / folder, privacy=None, data=HELD_OUT, **options)
        assert not sites.say(kind).has_error()


def test_data_without_a_ledger_are_as_private_where_there_are_ledgers(store, tmp_path):
    """They may be a new version of those that have one; public data the site says itself."""
    sites = Sites(store, tmp_path, privacy=None)
    for context in sites.raw.contexts.values():
        context.node_config["ledger"] = str(sites.place(2))
    assert sites.refusal(TRAIN, node=2).startswith("PrivacyRequired")
    assert sites.refusal(TRAIN, node=3).startswith("PrivacyRequired")
    sites.raw.contexts[3].node_config["public-data"] = True
    assert not sites.say(TRAIN, node=3).has_error()


def test_noise_that_the_coordinator_can_take_off_is_refused_by_a_real_site(store, tmp_path):
    sites = Sites(store, tmp_path)
    sites.reconfigure({"reproducible": True})
    for kind in (TRAIN, EVALUATE):
        text = sites.refusal(kind)
        assert text.startswith("ConfigError: privacy.reproducible=true makes noise that the coord")
        assert "leave it out" in text
    assert sites.ledger().spends == []


def test_a_simulated_site_makes_noise_that_follows_from_seed_client_and_round(store, tmp_path):
    sites = Sites(store, tmp_path, simulated=True)
    sites.reconfigure({"reproducible": True})
    for context in sites.raw.contexts.values():  # with another seed its data are others
        context.node_config |= {"ledger-epsilon": 50.0, "ledger-delta": 1e-5}

    def update(node: int = 2, server_round: int = 1) -> torch.Tensor:
        reply = sites.say(TRAIN, node, **{"server-round": server_round})
        assert said(reply)["noise"] == noise.KNOWN
        return torch.cat([v.flatten() for v in to_torch(reply.content["arrays"]).values()])

    first = update()
    assert torch.equal(update(), first)
    others = update(node=3), update(server_round=2)
    sites.config["seed"] = 2
    sites.reconfigure({"reproducible": True})
    for other in (*others, update()):
        assert not torch.equal(other, first)


BOUNDS = [float("nan"), float("inf"), 0.0, -1.0, 1e-42, 1e30, True, "1.0"]


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_that_no_noise_could_be_in_proportion_to_are_refused_unpaid(store, tmp_path, bound):
    """A coordinator that wants to see more sends what its own check would refuse."""
    sites = Sites(store, tmp_path)
    for option in ({"clip_norm": bound}, {"metric_bounds": {"loss": bound}}):
        with suppress(DagCborError):  # NaN and infinities do not get so far
            sites.reconfigure(option)
            for kind in (TRAIN, EVALUATE):
                assert "a site takes numbers from 1e-09 to 1e+09" in sites.refusal(kind)
    assert sites.ledger().spends == []


# ---- what is wrong with a ledger stays at the site


def place_of(sites: Sites, node: int = 2):
    return sites.place(node) / f"{sites.fingerprints[node]}.jsonl"


def check_discreet(sites: Sites, text: str, kind: str, logged: str) -> None:
    assert text == (
        f"LedgerError: the site's privacy ledger cannot be used ({kind}); its own log says why"
    )
    assert sites.fingerprints[2] in logged  # that is where it belongs


def alter(path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"epsilon": 50.0', b'"epsilon": 99.0'))


def remove(path) -> None:
    path.unlink()


def open_to_others(path) -> None:
    path.chmod(0o666)


DAMAGE = {alter: "LedgerTampered", remove: "LedgerTampered", open_to_others: "LedgerError"}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("when", ["before the run", "between rounds"])
def test_a_damaged_ledger_stops_the_client_and_tells_the_coordinator_nothing_of_the_data(
    store, tmp_path, caplog, damage, when
):
    sites = Sites(store, tmp_path)
    if when == "between rounds":
        assert not sites.say(TRAIN).has_error()
    damage(place_of(sites))
    for kind in (TRAIN, EVALUATE):
        caplog.clear()
        check_discreet(sites, sites.refusal(kind), DAMAGE[damage], caplog.text)
    assert not sites.say(TRAIN, node=3).has_error()


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, CAPABILITIES])
def test_so_does_a_damaged_ledger_where_a_run_asks_for_no_privacy(store, tmp_path, caplog, kind):
    sites = Sites(store, tmp_path, privacy=None, data=HELD_OUT)
    alter(place_of(sites))
    check_discreet(sites, sites.refusal(kind), "LedgerTampered", caplog.text)


def test_a_site_that_has_no_ledger_for_its_data_says_only_in_its_log_how_to_begin_one(
    store, tmp_path, caplog
):
    sites = Sites(store, tmp_path, cap=None)
    with caplog.at_level(logging.ERROR):
        check_discreet(sites, sites.refusal(TRAIN), "LedgerError", caplog.text)
    assert f"fedipfs privacy init --ledger {sites.place(2)} {sites.fingerprints[2]}" in caplog.text
    assert not sites.place(2).exists()


def test_a_simulated_site_begins_its_own_with_the_cap_that_it_is_told(store, tmp_path):
    sites = Sites(store, tmp_path, cap=None, simulated=True)
    for context in sites.raw.contexts.values():
        context.node_config |= {"ledger-epsilon": 3.0, "ledger-delta": 1e-5}
    assert not sites.say(TRAIN).has_error()
    assert sites.ledger().cap == Cap(3.0, 1e-5, "rdp")


# ---- what the answers tell


class Sizes:
    """The quadratic task over one site that has so many records."""

    def __init__(self, store, folder, *counts: int, **options) -> None:
        told = {"options": {"counts": counts}, "clients": 1, **options}
        self.sites = Sites(store, folder, task=QUADRATIC, **told)

    def told(self) -> list[object]:
        """All that is told besides arrays, noised values and the ledger's head."""
        sites, answers = self.sites, []
        asks = [(TRAIN, {}), (TRAIN, {"answer": "gradient"}), (TRAIN, {"loss": 1, "report": 1})]
        for kind, ask in (*asks, (EVALUATE, {}), (CAPABILITIES, {})):
            content = sites.say(kind, **ask).content
            plain = {name: dict(content[name]) for name in content if name != "arrays"}
            told = plain.get("metrics", {})
            for name in told.keys() - {"num-examples", "steps"}:
                told[name] = type(told[name])
            plain.get("privacy", {}).pop("ledger", None)
            answers.append(plain)
            if "arrays" in content:
                arrays = to_torch(content["arrays"])
                answers.append({name: each.shape for name, each in arrays.items()})
        return answers


def test_how_many_records_a_site_has_changes_nothing_that_it_tells(store, tmp_path):
    few, many, hardly = (
        Sizes(store, tmp_path / str(counts), *counts, data=HELD_OUT).told()
        for counts in ((4, 4), (300, 157), (1, 1))  # of two records none is held out
    )
    assert few == many == hardly
    numbers = [each["metrics"]["num-examples"] for each in few if "metrics" in each]
    assert numbers == [100, 100, 100, 25]  # privacy.examples, and a fifth of all
    assert few[-1]["capabilities"]["examples"] == 100


def test_sites_of_one_run_are_told_apart_by_nothing_either(store, tmp_path):
    sites = Sites(store, tmp_path, clients=4, data={"partition": "dirichlet", "alpha": 0.3})
    answers = [sites.say(TRAIN, node) for node in sites.raw.nodes]
    for reply in answers:
        assert metrics(reply) == {"num-examples": 100, "steps": 3}
        assert said(reply)["events"] == [*STEP]
    capabilities = [sites.say(CAPABILITIES, node).content["capabilities"] for node in range(2, 6)]
    assert [each["examples"] for each in capabilities] == [100] * 4


def test_clipping_is_as_this_run_asks_whatever_one_before_asked(store, tmp_path):
    sites = Sites(store, tmp_path)
    for clipping in ("auto", HOOKS, GHOST, HOOKS):
        sites.reconfigure({"clipping": clipping})
        wanted = GHOST if clipping == "auto" else clipping
        assert said(sites.say(TRAIN))["clipping"] == wanted


# ---- what is added after the noise


def private(**changed) -> trainer.Private:
    told = {"noise_multiplier": 1.0, "clip_norm": 1.0, "sample_rate": 0.5, "batch_size": 10.0}
    mechanism = Mechanism(**{**told, **changed})
    return trainer.Private(mechanism, 4, 20, noise.generator(KEY), GHOST, 512)


def trained(task: Small, **options) -> tuple[torch.nn.Module, dict[str, float]]:
    model, (x, y) = task.model(), examples("perceptron", 20)
    config = {"batch_size": 8, "epochs": 1, "optimizer": {"name": "SGD", "lr": 0.1}}
    got = trainer.train(task, model, x, y, config=config, seed=1, server_round=1, **options)
    return model, got


def test_nothing_is_told_of_the_loss():
    assert trained(Small(mlp), private=private())[1] == {"num-examples": 20, "steps": 4}


def test_training_is_the_steps_of_the_engine_with_the_terms_of_strategies_after_the_noise():
    """FedProx's and SCAFFOLD's know no record: they are not shortened, and get no noise."""
    task, (x, y) = Small(mlp), examples("perceptron", 20)
    terms = {name: torch.full_like(each, 0.3) for name, each in task.model().named_parameters()}
    model, _ = trained(task, private=private(), proximal_mu=0.7, correction=terms)

    other = task.model().train()
    start = [each.detach().clone() for each in other.parameters()]
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    told = private()
    with dpsgd.PrivateGradients(
        task, other, optimizer, task.inputs(x), task.targets(y), told.mechanism, told.source
    ) as engine:
        for _ in range(4):
            engine.fill()
            with torch.no_grad():
                for (name, each), origin in zip(other.named_parameters(), start, strict=True):
                    each -= 0.1 * (each.grad + 0.7 * (each - origin) + terms[name])
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_correction_is_as_long_as_it_is_also_where_gradients_are_shortened_to_nothing():
    task = Small(mlp)
    terms = {name: torch.full_like(each, 0.3) for name, each in task.model().named_parameters()}
    model, _ = trained(task, private=private(clip_norm=1e-9), correction=terms)
    for mine, before in zip(model.parameters(), task.model().parameters(), strict=True):
        torch.testing.assert_close(mine, before - 4 * 0.1 * 0.3, rtol=1e-5, atol=1e-6)


def test_the_seed_of_the_run_decides_dropout_and_not_the_noise():
    one, two, other = (
        trained(Small(mlp), private=each)[0]
        for each in (private(), private(), private()._replace(source=noise.generator()))
    )
    weights = [np.concatenate([p.detach().numpy().ravel() for p in m.parameters()]) for m in
               (one, two, other)]  # fmt: skip
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).all()


def test_frozen_layers_stay_and_learn_no_noise():
    def make():
        model = mlp()
        model[0].requires_grad_(False)
        return model

    task = Small(make)
    model, _ = trained(task, private=private())
    before = task.model()
    assert torch.equal(model[0].weight, before[0].weight)
    assert (model[2].weight != before[2].weight).all()


assert CAP.epsilon == 50.0  # what `alter` looks for


# ---- a coordinator that asks for what it should not have


@pytest.mark.parametrize(
    "wrong",
    [
        {"examples": 0},
        {"examples": None},
        {"examples": -5},
        {"noise_multiplier": 1e-6},
        {"noise_multiplier": 1e30},
        {"metrics_noise_multiplier": 1e-6},
        {"physical_batch": 0},
        {"sample_rate": 0.0},
    ],
    ids=str,
)
def test_numbers_that_no_honest_run_has_are_refused_before_anything_is_paid(store, tmp_path, wrong):
    sites = Sites(store, tmp_path, data=HELD_OUT)
    sites.reconfigure(wrong)
    for kind in (TRAIN, EVALUATE):
        assert f"privacy.{next(iter(wrong))} is" in sites.refusal(kind)
    assert sites.ledger().spends == []


def test_the_true_number_of_records_is_not_to_be_had_by_asking_for_none(store, tmp_path):
    sites = Sites(store, tmp_path)
    for known in (0, 7):
        sites.reconfigure({"examples": known})
        told = sites.say(CAPABILITIES).content["capabilities"]["examples"]
        assert told == known


@pytest.mark.parametrize("share", [0.95, 0.9999, 1.0, -0.1])
def test_a_share_of_held_out_records_that_would_count_them_is_refused(store, tmp_path, share):
    sites = Sites(store, tmp_path, data={"validation": share})
    before = sites.refusal(TRAIN)
    assert "data.validation" in before or "Withheld" in before
    assert "index" not in before and "no training examples" not in before


def test_a_record_is_held_out_or_not_whatever_others_there_are(store, tmp_path, monkeypatch):
    from fedipfs.clients import app

    sites = Sites(store, tmp_path, data=HELD_OUT)
    sites.say(EVALUATE)
    context = sites.raw.contexts[2]
    site = app._open_site(app.Opened(sites.run_config, 2))
    training, held_out = site.examples(context)
    share = len(held_out) / (len(training) + len(held_out))
    assert 0.5 * HELD_OUT["validation"] < share < 2 * HELD_OUT["validation"]
    kept = {each.tobytes() for each in training.inputs}
    fewer = app.Site(**{**site._asdict(), "parts": [part[1:] for part in site.parts]})
    app._held_out.cache_clear()
    monkeypatch.setattr(app, "_open_site", lambda *opened: fewer)
    one_less = {each.tobytes() for each in fewer.examples(context)[0].inputs}
    app._held_out.cache_clear()
    assert len(kept - one_less) <= 1 and not one_less - kept
