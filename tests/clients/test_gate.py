"""The gate of a site: messages of a real coordinator pass it, or are refused, once; and are noted.

`alpha` is the site with the gate; beta and gamma are there for secure aggregation.
"""

from __future__ import annotations

import sys
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from ledgered import SECTION
from parties import NAMES
from sites import Sites, reason

from fedipfs.clients import app as client
from fedipfs.clients.activity import Activity, entries, verify
from fedipfs.clients.gate import Gate, use_gate
from fedipfs.clients.policy import Policy
from fedipfs.clients.replay import Positions
from fedipfs.data import Dataset, Examples, load
from fedipfs.errors import ConfigError, EdgeError, Replayed
from fedipfs.exchange import (
    Recipe,
    Seal,
    Stamp,
    from_numpy,
    put_arrays,
    put_ensemble,
    stages,
    store_arrays,
    stored_cid,
)
from fedipfs.flower_compat import message_from_bytes, message_to_bytes
from fedipfs.secagg import Confirm, Masked
from fedipfs.server.selection import fits

TASK = "fedipfs.tasks.small:Digits"
EVENING = datetime(2026, 12, 1, 20, 30, tzinfo=timezone(timedelta(hours=1)))


class Gated(Sites):
    """Sites of which alpha has a gate, with a policy of `rules`; at the time `now`."""

    def __init__(self, folder, store, seal: Seal = "none", *, rules=None, node=None, **config):
        super().__init__(folder, store, seal, node=node, **config)
        self.folder, self.now, self.counted = folder, EVENING, 0
        self.log = folder / "site" / "activity.log"
        self.kept = lambda by, run, number, state: None
        self.policy(**(rules or {}))

    def policy(self, **rules) -> None:
        """The worker begins anew, with other rules."""
        policy = Policy.of({"tasks": [TASK], **rules})
        self.gate = Gate(
            policy,
            Activity(self.log),
            Positions(self.folder / "site" / "state"),
            examples=self._count,
            keep=lambda *kept: self.kept(*kept),
            now=lambda: self.now,
        )
        self.contexts["alpha"].node_config |= policy.node_config()

    def _count(self, run_config: str | None, context: Context) -> tuple[int, int]:
        self.counted += 1
        if context.node_config.get("own-data"):
            return client.count_examples(run_config, context)
        return 599, 0

    def _call(self, message: Message, context: Context) -> Message:
        mine = self.parties.name_of(message.metadata.dst_node_id) == "alpha"
        use_gate(self.gate if mine else None)
        try:
            return super()._call(message, context)
        finally:
            use_gate(None)

    def ask_alpha(self, kind: str = "train", *, model=True, **ask) -> Message:
        told = {**self.ask, "cohort": 3, **ask}
        told = {name: value for name, value in told.items() if value is not None}
        return self.send("alpha", kind, told, self.model if model is True else model or None)

    @property
    def entries(self):
        return list(entries(self.log)) if self.log.exists() else []

    @property
    def events(self) -> list[str]:
        return [entry.event for entry in self.entries]


@pytest.fixture
def site(tmp_path, store):
    return Gated(tmp_path, store)


@pytest.fixture
def trainings(monkeypatch):
    """The rounds in which any client trained."""
    honest, seen = client.train_model, []

    def train_model(*args, server_round, **kwargs):
        seen.append(server_round)
        return honest(*args, server_round=server_round, **kwargs)

    monkeypatch.setattr(client, "train_model", train_model)
    return seen


def refusal(site: Gated, reply: Message) -> str:
    """Why alpha refused; it is what the log says, too."""
    text = reason(reply)
    entry = site.entries[-1]
    assert entry.event == "refused"
    kind, _, said = text.partition(": ")
    if kind == "PolicyRefused":
        assert said == f"{entry.fields['rule']}: {entry.fields['reason']}"
    else:
        assert (entry.fields["rule"], entry.fields["reason"]) == (kind, said)
    return text


# ---- what passes, and what is noted of it


@pytest.mark.parametrize("seal", ["none", "all"])
def test_what_is_permitted_is_done_and_noted(tmp_path, store, seal, trainings):
    site = Gated(tmp_path, store, seal, data={**Sites(tmp_path, store).config["data"]})
    trained = site.ask_alpha()
    assert reason(trained) == ""
    assert reason(site.ask_alpha("evaluate")) != ""  # nothing is held out
    assert trainings == [1]
    assert site.events == ["began", "trained", "failed"]
    began, done, _ = site.entries
    whose = {"kind": "train", "coordinator": "coordinator", "run": site.run, "round": "1"}
    assert began.fields == whose
    assert done.fields == whose | {
        "task": TASK,
        "cohort": "3",
        "examples": "599",
        "seconds": done.fields["seconds"],
        "model": str(site.model.cid),
        "update": str(trained.content["arrays"].cid),
    }
    assert float(done.fields["seconds"]) < 60
    assert verify(site.log) == 3


def test_evaluations_offers_and_models_that_are_fetched_are_noted(tmp_path, store):
    data = {**Sites(tmp_path, store).config["data"], "validation": 0.2}
    site = Gated(tmp_path, store, data=data)
    assert 0 <= site.ask_alpha("evaluate").content["metrics"]["accuracy"] <= 1
    offers = dict(site.ask_alpha("query.capabilities", model=None).content["capabilities"])
    assert offers["tasks"] == [TASK] and type(offers["gpus"]) is int
    assert fits({"tasks": TASK, "cores_min": 1, "gpus_min": 0}, offers)
    assert not fits({"tasks": "fedipfs.tasks.vision:Mnist"}, offers)
    site.grid.announce(site.model)
    assert [reason(reply) for reply in site.grid._grid.pull_messages([])] == ["", "", ""]
    assert site.events == ["evaluated", "answered", "prefetched"]
    assert {entry.fields["kind"] for entry in site.entries} == {
        "evaluate",
        "query.capabilities",
        "query.prefetch",
    }
    assert site.entries[0].fields["model"] == site.entries[2].fields["model"]


def test_without_a_gate_nobody_announces_tasks_and_everything_passes(site):
    offers = site.send("beta", "query.capabilities", site.ask).content["capabilities"]
    assert "tasks" not in offers
    assert reason(site.send("beta", "train", site.ask, site.model)) == ""
    assert not site.log.exists()


@pytest.mark.parametrize("run", ['a b=c "x" #0123456789abcdef \\', "trained run=x", "漢 é"])
def test_a_run_may_be_called_anything_and_a_line_stays_a_line(site, run):
    site.run = run
    assert reason(site.ask_alpha()) == ""
    assert [entry.fields["run"] for entry in site.entries] == [run] * 2


# ---- what breaks a rule


def other_config(site, **changes) -> str:
    return str(site.vault.put_record({**site.config, **changes}))


DAY = {"hours": "21:00-06:00"}
LEDGER = {"privacy": {"epsilon": 3.0, "delta": 1e-5}}


@pytest.mark.parametrize(
    ("rules", "ask", "says"),
    [
        ({"coordinators": ["fl.example.org"]}, {}, "coordinators: this site does not work for c"),
        ({"tasks": ["my.task:Mine"]}, {}, f"tasks: {TASK} is no task of this site"),
        ({"max_parameters": 2000}, {}, "max_parameters: a model of 4,810 parameters, and this s"),
        ({"min_cohort": 4}, {}, "min_cohort: 3 are asked in this round, and this site trains am"),
        ({}, {"cohort": None}, "min_cohort: the message does not say how many are asked"),
        ({}, {"cohort": "9"}, "min_cohort: the message does not say how many are asked"),
        ({}, {"cohort": -9}, "min_cohort: -9 are asked in this round"),
        ({"min_examples": 600}, {}, "min_examples: this site has too few examples to train on"),
        (DAY, {}, "hours: this site trains from 21:00 to 06:00, and it is 20:30"),
        ({"secagg": {"required": True}}, {}, "secagg: what this site learns leaves under masks"),
        (LEDGER, {}, "privacy: nothing leaves this site without noise: run with privacy=dp_sgd"),
    ],
)
def test_a_round_that_breaks_policy_is_refused_by_the_rules_name(
    tmp_path, store, trainings, rules, ask, says
):
    site = Gated(tmp_path, store, rules=rules)
    text = refusal(site, site.ask_alpha(**ask))
    assert text.startswith(f"PolicyRefused: policy.{says}")
    assert "599" not in text
    assert trainings == [] and site.events == ["refused"]


def test_code_of_another_task_is_not_imported(site):
    for target in ("antigravity:Task", "fedipfs.tasks.vision:Mnist"):
        config = other_config(site, task={"target": target, "options": {}})
        site.round += 1
        for kind, model in (("train", True), ("evaluate", True), ("query.capabilities", None)):
            text = refusal(site, site.ask_alpha(kind, model=model, **{"run-config": config}))
            assert text == f"PolicyRefused: policy.tasks: {target} is no task of this site"
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", ["train.default", "evaluate.default"])
def test_what_it_does_not_know_by_its_rules_is_refused(site, trainings, kind):
    """Flower takes `train.default` for `train`."""
    assert refusal(site, site.ask_alpha(kind)).startswith(f"PolicyRefused: policy: {kind} is noth")
    assert trainings == []


@pytest.mark.parametrize("config", [{}, {"task": 1}, [], {"task": {"target": TASK}, "privacy": 1}])
def test_a_configuration_that_is_none_is_an_error_and_no_crash(site, config):
    cid = str(site.vault.put_record(config))
    reply = site.ask_alpha(**{"run-config": cid})
    assert reason(reply) == f"BadMessage: {cid} is not the configuration of a run"
    assert site.events == ["failed"]


def test_options_that_ask_for_more_than_the_model_that_came_get_no_memory(site, trainings):
    """The architecture is the site's, its size is not the coordinator's to choose."""
    options = {"hidden": 10**9}
    config = other_config(site, task={"target": TASK, "options": options})
    text = reason(site.ask_alpha(**{"run-config": config}))
    assert text.startswith("ConfigError: the model that came is not one of the task with its opt")
    assert trainings == []


def test_rounds_an_hour_are_those_to_train_whatever_became_of_them(tmp_path, store, trainings):
    site = Gated(tmp_path, store, rules={"rounds_per_hour": 2})
    site.now = start = datetime.now().astimezone()
    assert reason(site.ask_alpha()) == ""
    site.ask_alpha("evaluate")
    site.round = 2
    bad = site.vault.put_record({**site.config, "train": {}})
    assert reason(site.ask_alpha(**{"run-config": str(bad)})) != ""
    assert site.events == ["began", "trained", "failed", "began", "failed"]
    site.round = 3
    said = "PolicyRefused: policy.rounds_per_hour: this site trains at most 2 times an hour"
    assert refusal(site, site.ask_alpha()) == said
    site.now = start = datetime.now().astimezone()
    site.policy(rounds_per_hour=2)  # to begin the worker anew does not help
    site.round = 4
    assert refusal(site, site.ask_alpha()) == said
    site.now = start + timedelta(minutes=61)
    site.round = 5
    assert reason(site.ask_alpha()) == ""
    assert trainings == [1, 2, 5]  # the second of which failed


def test_a_model_that_is_too_large_is_refused_from_its_head(tmp_path, store):
    """By its parameters, or by its bytes where no head is looked at; nothing else is fetched."""
    site = Gated(tmp_path, store, rules={"max_parameters": 4810})
    large = from_numpy({"w": np.zeros((1 << 20, 3), np.float32)})  # 12 MB
    half = from_numpy({"w": np.zeros(4811, np.int8)})
    got = store.counters.get_bytes
    for round_, (record, what) in enumerate([(large, "12,58"), (half, "4,811 parameters")], 2):
        site.round, site.model = round_, store_arrays(site.vault, record)
        got = store.counters.get_bytes
        for kind in ("train", "evaluate"):
            text = refusal(site, site.ask_alpha(kind))
            assert text.startswith(f"PolicyRefused: policy.max_parameters: a model of {what}")
        assert store.counters.get_bytes - got < 1 << 20
        site.grid.announce(site.model)
        first = next(iter(site.grid._grid.pull_messages([])))
        assert refusal(site, first).startswith("PolicyRefused: policy.max_parameters")


def test_so_is_an_ensemble_that_is_too_large(tmp_path, store):
    data = {**Sites(tmp_path, store).config["data"], "validation": 0.2}
    site = Gated(tmp_path, store, data=data, rules={"max_parameters": 2 * 4810})
    for count, says in ((2, ""), (3, "PolicyRefused: policy.max_parameters: a model of 14,430")):
        members = [stored_cid(site.model)] * count
        cid = put_ensemble(site.vault, members, Recipe(TASK, ({},) * count, (1.0,) * count))
        site.round += 1
        reply = site.ask_alpha("evaluate", model=None, ensemble=str(cid))
        assert reason(reply).startswith(says) and bool(reason(reply)) == bool(says)
        assert site.entries[-1].fields["model"] == str(cid)


def test_a_member_that_the_site_sealed_for_itself_is_not_opened(tmp_path, store):
    data = {**Sites(tmp_path, store).config["data"], "validation": 0.2}
    site = Gated(tmp_path, store, "all", data=data)
    own, _ = put_arrays(site.parties.vaults["alpha"], site.model, private=True)
    for member, says in ((stored_cid(site.model), ""), (own, "SignatureWrong: ")):
        cid = put_ensemble(site.vault, [member], Recipe(TASK, ({},), (1.0,)))
        site.round += 1
        text = reason(site.ask_alpha("evaluate", model=None, ensemble=str(cid)))
        assert text.startswith(says) and bool(text) == bool(says)


def test_a_run_that_makes_noise_passes_where_privacy_is_asked_for(tmp_path, store):
    node = {"ledger": str(tmp_path / "ledger")}
    site = Gated(tmp_path, store, rules=LEDGER, node=node, privacy=SECTION)
    assert reason(site.ask_alpha(run="r")) == ""  # it is simulated, and makes its own ledger
    site.config["privacy"] = {**SECTION, "noise_multiplier": 0.02}
    site.run_config, site.round = other_config(site), 2
    text = refusal(site, site.ask_alpha(run="r"))
    assert text.startswith("BudgetSpent: round 2")
    assert site.events == ["began", "trained", "began", "refused"]
    for level in ("central", "distributed", "none"):  # in the open the sum's noise is no one's
        site.run_config, site.round = other_config(site, privacy={"name": level}), site.round + 1
        assert refusal(site, site.ask_alpha()).startswith("PolicyRefused: policy.privacy")


# ---- how many examples a run reaches


@pytest.fixture
def own(tmp_path, store, monkeypatch):
    """Makes sites with 100 examples of their own, and a test set of `tests`."""
    digits = load("digits", root=None, fallback="digits").train
    caches = (client._open_site, client._held_out, client._fingerprint)

    def make(*, rules, tests=0, train=None, **data) -> Gated:
        sets = [
            Examples(digits.inputs[part], digits.targets[part])
            for part in (slice(100), slice(100, 100 + tests))
        ]
        monkeypatch.setattr(client, "_own", [Dataset("own", *sets)])
        for cache in caches:
            cache.cache_clear()
        plain = Sites(tmp_path, store).config
        return Gated(
            tmp_path,
            store,
            rules=rules,
            node={"own-data": True},
            data={**plain["data"], **data},
            train={**plain["train"], **(train or {})},
        )

    yield make
    for cache in caches:
        cache.cache_clear()


FEW = "PolicyRefused: policy.min_examples: this site has too few examples to "


def test_what_a_run_holds_out_is_not_counted_to_train_on(own):
    site = own(rules={"min_examples": 50}, validation=0.4)
    trained = site.ask_alpha()
    assert trained.content["metrics"]["num-examples"] == 60
    assert site.entries[-1].fields["examples"] == "60"
    site = own(rules={"min_examples": 50}, validation=0.9)
    site.round = 2
    assert refusal(site, site.ask_alpha()) == f"{FEW}train on"
    site = own(rules={"min_examples": 50}, tests=60, validation=0.9)  # then it is not split
    site.round = 3
    assert site.ask_alpha().content["metrics"]["num-examples"] == 100
    assert reason(site.ask_alpha("evaluate")) == ""


@pytest.mark.parametrize(
    ("train", "ask", "few"),
    [
        ({"steps": 2, "batch_size": 24}, {}, True),
        ({"steps": 1, "batch_size": 50}, {}, False),
        ({"steps": 60, "batch_size": 1}, {}, False),
        ({"steps": None, "batch_size": 1}, {}, False),  # epochs: all of them
        ({"steps": 1, "batch_size": 1}, {"answer": "gradient"}, False),  # on all of them
    ],
)
def test_steps_that_see_few_examples_are_refused(own, train, ask, few):
    site = own(rules={"min_examples": 50}, train=train)
    reply = site.ask_alpha(**ask)
    if few:
        assert refusal(site, reply) == f"{FEW}train on"
    else:
        assert reason(reply) == ""


@pytest.mark.parametrize(("least", "few"), [(1, False), (30, False), (31, True)])
def test_what_is_evaluated_on_is_not_few_either(own, least, few):
    site = own(rules={"min_examples": least}, validation=0.3)
    for kind, ask in (("evaluate", {}), ("train", {"report": True})):
        reply = site.ask_alpha(kind, **ask)
        if few:
            assert refusal(site, reply) == f"{FEW}evaluate on"
        else:
            assert reason(reply) == ""
    site.round = 2
    assert reason(site.ask_alpha()) == ""  # which measures nothing


# ---- array records


def also(site: Gated, kind: str, **records) -> Message:
    """alpha's reply to a message with further array records."""
    site.round += 1
    site.grid.stamp = Stamp(site.run, site.round)
    content = RecordDict({"config": ConfigRecord({**site.ask, "cohort": 3}), **records})
    (reply,) = site.grid.send_and_receive([site.grid.create_message(content, kind, 2, "")])
    return reply


@pytest.mark.parametrize(
    ("kind", "keys", "odd"),
    [
        ("train", ("arrays", "more"), "more"),
        ("evaluate", ("arrays", "control"), "control"),
        ("query.capabilities", ("arrays",), "arrays"),
        ("query.prefetch", ("arrays", "next"), "next"),
        ("query.secagg", ("arrays",), "arrays"),
        ("train", ("arrays", "control"), None),
    ],
)
def test_a_message_brings_no_more_arrays_than_its_work_needs(site, kind, keys, odd):
    reply = also(site, kind, **dict.fromkeys(keys, site.model))
    if odd is None:
        assert reason(reply) == ""
    else:
        said = f"PolicyRefused: policy: arrays {odd!r} are nothing for {kind}"
        assert refusal(site, reply) == said


def test_a_control_variate_is_no_larger_than_the_model(tmp_path, store):
    site = Gated(tmp_path, store, rules={"max_parameters": 4810})
    assert reason(also(site, "train", arrays=site.model, control=site.model)) == ""
    large = store_arrays(site.vault, from_numpy({"w": np.zeros(4811, np.float32)}))
    said = "PolicyRefused: policy: the control variate is larger than the model it is for"
    assert refusal(site, also(site, "train", arrays=site.model, control=large)) == said
    assert refusal(site, also(site, "train", control=site.model)) == said


# ---- replays and forgeries


def crossed(site: Gated, kind: str = "train") -> Message:
    """A message to alpha, as it was on its way."""
    return next(
        each
        for each in site.grid._grid.crossed
        if each.metadata.message_type == kind
        and each.metadata.dst_node_id == 2
        and "signature" in each.content["fedipfs"]
        and each.content["fedipfs"]["by"] == "coordinator"
    )


def again(site: Gated, message: Message) -> str:
    """Why a message that is brought to alpha once more is refused; "" if it is not."""
    message = message_from_bytes(message_to_bytes(message))
    try:
        site._call(message, site.contexts["alpha"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_replayed_message_is_refused_also_by_a_worker_that_began_anew(site, trainings):
    assert reason(site.ask_alpha()) == ""
    old = crossed(site)
    said = f"Replayed: round 1 of run {site.run} (train) was asked for before"
    assert again(site, old).startswith(said)
    site.policy()
    assert again(site, old).startswith(said)
    site.round = 2
    assert reason(site.ask_alpha()) == ""
    assert again(site, old).startswith("Replayed: round 1 of run bafyreirun (train) is asked for a")
    assert trainings == [1, 2]
    worked = ["began", "trained"]
    assert site.events == [*worked, "refused", "refused", *worked, "refused"]
    assert site.entries[2].fields["rule"] == "Replayed"


def test_a_message_that_was_refused_cannot_be_kept_for_later(tmp_path, store, trainings):
    site = Gated(tmp_path, store, rules=DAY)
    assert refusal(site, site.ask_alpha()).startswith("PolicyRefused: policy.hours")
    old = crossed(site)
    site.now += timedelta(hours=1)
    assert again(site, old).startswith("Replayed: ")
    assert trainings == []


def test_a_worker_that_dies_while_it_trains_does_not_train_again_on_the_same(site, monkeypatch):
    class Killed(BaseException):
        """As a signal."""

    def dies(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(client, "train_model", dies)
    with pytest.raises(Killed):
        site.ask_alpha()
    monkeypatch.undo()
    assert site.events == ["began"]
    site.now = datetime.now().astimezone()
    site.policy(rounds_per_hour=1)
    assert again(site, crossed(site)).startswith("Replayed: ")
    site.round = 2  # it has had its round of the hour, although no answer left
    assert refusal(site, site.ask_alpha()).startswith("PolicyRefused: policy.rounds_per_hour")


def test_a_resumed_coordinator_asks_for_its_round_again(site, trainings):
    site.round = 3
    assert reason(site.ask_alpha()) == ""
    assert refusal(site, site.ask_alpha()).startswith("Replayed: ")
    site.grid.attempt = 1
    assert reason(site.ask_alpha()) == ""
    assert site.entries[-1].fields["attempt"] == "1"
    assert refusal(site, site.ask_alpha()).startswith("Replayed: ")
    site.grid.attempt, site.round = 0, 9
    assert "after round 3 in attempt 1" in refusal(site, site.ask_alpha())
    assert trainings == [3, 3]


def test_a_strategy_may_ask_several_questions_in_a_round(tmp_path, store):
    """As best_model does: candidates to evaluate, one a message, told apart by their group."""
    data = {**Sites(tmp_path, store).config["data"], "validation": 0.2}
    site = Gated(tmp_path, store, data=data)
    for stage in ("one", "two"):
        assert reason(site.ask_alpha("evaluate", stage=stage)) == ""  # Sites makes it the group
    assert refusal(site, site.ask_alpha("evaluate", stage="two")).startswith("Replayed: ")


def forge(change):
    """Applies `change` to the content of what goes out to alpha."""
    return lambda message: change(message.content) if message.metadata.dst_node_id == 2 else None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content["fedipfs"].pop("signature"), "SignatureMissing: "),
        (lambda content: content.pop("fedipfs"), "SignatureMissing: "),
        (lambda content: content["config"].update({"cohort": 99}), "SignatureWrong: "),
        (lambda content: content["fedipfs"].update({"attempt": 5}), "SignatureWrong: "),
        (lambda content: content["fedipfs"].update({"round": 2}), "SignatureWrong: "),
        (lambda content: content["fedipfs"].update({"by": "mallory"}), "SignerUnknown: "),
        (lambda content: content["fedipfs"].update({"by": "beta"}), "SignerUnknown: "),
    ],
)
def test_what_is_not_signed_as_it_must_be_is_refused_and_moves_no_position(
    site, trainings, change, says
):
    site.grid._grid.forge = forge(change)
    text = refusal(site, site.ask_alpha())
    assert text.startswith(says)
    assert "coordinator" not in site.entries[-1].fields  # nothing of what it claims is believed
    assert trainings == []
    del site.grid._grid.forge
    assert reason(site.ask_alpha()) == ""


def test_what_was_signed_for_another_node_is_refused(site):
    site.send("beta", "train", {**site.ask, "cohort": 3}, site.model)
    (theirs,) = [each for each in site.grid._grid.crossed if each.metadata.dst_node_id == 3]
    assert again(site, theirs).startswith("SignatureWrong: ")


def test_a_site_without_keys_answers_nothing(site, store):
    from fedipfs import use_store

    site.ask_alpha()
    use_store(store)
    use_gate(site.gate)
    try:
        with pytest.raises(Exception, match="answers signed messages only"):
            client.app(crossed(site), site.contexts["alpha"])
    finally:
        use_gate(None)


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.capabilities"])
def test_a_message_of_one_round_that_says_another_is_refused(site, trainings, kind):
    model = None if kind == "query.capabilities" else True
    text = refusal(site, site.ask_alpha(kind, model=model, **{"server-round": 7}))
    assert text == "SignatureWrong: the message was signed for round 1, and says 7"
    assert site.entries[-1].fields["coordinator"] == "coordinator"
    assert trainings == []


# ---- secure aggregation


def test_a_whole_round_under_masks_passes_and_every_stage_is_noted(tmp_path, store, trainings):
    site = Gated(tmp_path, store, rules={"secagg": {"required": True, "min_clients": 3}})
    site.play(site.secure(), cohort=3)
    assert [reply.has_error() for reply in site.answers.replies] == [False] * 3
    assert trainings == [1, 1, 1]
    assert site.events == ["answered", "answered", "began", "trained", "answered", "answered"]
    stage = [entry.fields.get("stage") for entry in site.entries]
    assert stage == ["advertise", "share", None, None, "confirm", "unmask"]
    masked = site.entries[3].fields
    assert (masked["masked"], masked["cohort"], masked["examples"]) == ("true", "3", "599")
    said = Masked.from_bytes(stages.get_message(site.vault, masked["update"]))
    assert said.by == "alpha"
    for kind in ("train", "evaluate"):
        assert refusal(site, site.ask_alpha(kind)).startswith("PolicyRefused: policy.secagg: what")


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"min_cohort": 4}, "min_cohort: 3 are asked in this round, and this site trains among a"),
        ({"min_examples": 600}, "min_examples: this site has too few"),
        (DAY, "hours: this site trains from 21:00 to 06:00, and it is 20:30"),
        ({"coordinators": ["other"]}, "coordinators: this site does not work for coordinator"),
    ],
)
def test_who_may_not_train_does_not_begin_to(tmp_path, store, rules, says):
    site = Gated(tmp_path, store, rules=rules)
    text = refusal(site, site.stage("alpha", "advertise", site.session()))
    assert text.startswith(f"PolicyRefused: policy.{says}")
    assert not list(site.journals.rglob("alpha"))
    # What the message claims is not what counts, but whom all of the cohort sign with.
    text = reason(site.stage("alpha", "masked", site.session(), b"", train=True, cohort=9))
    assert text.startswith(f"PolicyRefused: policy.{says}")


def test_what_was_begun_in_time_is_finished_out_of_it(tmp_path, store):
    site = Gated(tmp_path, store, rules={"hours": "20:00-21:00"})
    session = site.session()
    server, deliveries = site.until_masked(session)
    for name in NAMES:
        reply = site.stage(name, "masked", session, deliveries[name], train=True)
        said = site.said(reply, Masked)
        server.take(said, site.vault.weights(stages.CID.parse(said.vector)).tensor("masked"))
    survivors = server.close_masked()
    site.now += timedelta(hours=1)
    reply = site.stage("alpha", "confirm", session, survivors.to_bytes())
    assert site.said(reply, Confirm).by == "alpha"
    site.round = 2
    assert "policy.hours" in refusal(site, site.stage("alpha", "advertise", site.session()))


def test_a_stage_is_not_replayed(site):
    session = site.session()
    assert reason(site.stage("alpha", "advertise", session)) == ""
    assert refusal(site, site.stage("alpha", "advertise", session)).startswith("Replayed: ")


# ---- the log


def test_what_a_training_leaves_is_kept_before_its_line_is_written(site):
    kept = []

    def full(*told) -> None:
        kept.append((*told[:3], site.events))
        raise ConfigError("no room")

    site.kept = full
    assert reason(site.ask_alpha()) == "ConfigError: no room"
    assert kept == [("coordinator", site.run, 1, ["began"])]
    assert site.events == ["began", "failed"]
    site.ask_alpha("query.capabilities", model=None)
    assert len(kept) == 1


def test_what_fails_around_it_is_noted_once(site):
    with pytest.raises(EdgeError), site.gate.noting() as told:
        told["kind"] = "query.odd\nline"
        raise EdgeError("cannot be read")
    site.ask_alpha()
    old = message_from_bytes(message_to_bytes(crossed(site)))
    use_gate(site.gate)
    try:
        with pytest.raises(Replayed), site.gate.noting() as told:
            client.app(old, site.contexts["alpha"])
    finally:
        use_gate(None)
    assert site.events == ["failed", "began", "trained", "refused"]
    first = site.entries[0].fields
    assert first == {"kind": "query.odd line", "error": "EdgeError", "reason": "cannot be read"}


def test_what_cannot_be_written_down_is_not_answered(tmp_path, store, caplog):
    site = Gated(tmp_path, store)
    site.log.mkdir(parents=True)
    for kind in ("train", "evaluate"):
        text = reason(site.ask_alpha(kind))
        assert text.startswith("ActivityError: this site cannot write down what it is asked")
        assert str(tmp_path) not in text and str(site.log) in caplog.text


def test_where_positions_cannot_be_read_nothing_is_answered(site, trainings):
    (site.folder / "site").mkdir()
    (site.folder / "site" / "state").write_text("")
    text = reason(site.ask_alpha())
    assert text.startswith("ActivityError: ") and str(site.folder) not in text
    assert trainings == [] and site.events == ["failed"]


def test_the_count_of_examples_is_not_asked_for_where_nothing_is_learnt(site):
    site.ask_alpha("query.capabilities", model=None)
    site.grid.announce(site.model)
    assert [reason(reply) for reply in site.grid._grid.pull_messages([])] == ["", "", ""]
    assert site.counted == 0
    site.round = 2
    content = RecordDict({"config": ConfigRecord(site.ask)})
    site.grid.stamp = Stamp(site.run, 2)
    site.grid.send_and_receive([site.grid.create_message(content, "train", 2, "")])
    assert site.counted == 1
