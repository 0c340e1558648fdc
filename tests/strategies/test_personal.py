"""Layers that stay at the client: used there, kept there, and seen nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import tied
import torch
from fleet import Fleet
from flwr.app import RecordDict

from fedipfs.clients.personal import put_on
from fedipfs.errors import ConfigError, RunFailed
from fedipfs.exchange import to_torch

HEAD = ["3.*"]  # of digits' perceptron
DATA = {"partition": "dirichlet", "validation": 0.2}


def own(fleet: Fleet, node: int) -> dict[str, torch.Tensor]:
    """What a client keeps."""
    return to_torch(fleet.raw.contexts[node].state["personal"])


def values(state) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in to_torch(state).items()}


def test_the_shared_layers_are_averaged_and_the_personal_ones_stay(store):
    fleet = Fleet(store, clients=3, data=DATA)
    first = values(fleet.model)
    strategy = fleet.build("fedper", personal=HEAD)
    for number in (1, 2):
        got = fleet.play(strategy, number, number)
        examples = [reply.content["metrics"]["num-examples"] for reply in fleet.replies]
        for name in ("1.weight", "1.bias"):
            updates = [fleet.update(node)[name].double() for node in (2, 3, 4)]
            mean = sum(n * u for n, u in zip(examples, updates, strict=True)) / sum(examples)
            torch.testing.assert_close(got[name], mean.float())
            assert not torch.equal(got[name], first[name])
        for name in ("3.weight", "3.bias"):
            assert torch.equal(got[name], first[name])
            for node in (2, 3, 4):
                assert torch.equal(fleet.update(node)[name], first[name])
                assert not torch.equal(own(fleet, node)[name], first[name])
        assert not torch.equal(own(fleet, 2)["3.bias"], own(fleet, 3)["3.bias"])


def test_a_client_goes_on_with_its_own_layers(store):
    """Two rounds of one client equal plain training: nothing of it is put back in between."""
    models = {}
    for name, options in (("fedavg", {}), ("fedper", {"personal": HEAD})):
        fleet = Fleet(store, clients=1)
        strategy = fleet.build(name, **options)
        models[name] = fleet.play(strategy, 1, 2)
        if options:
            models[name] = {**models[name], **own(fleet, 2)}
    for name, expected in models["fedavg"].items():
        assert torch.equal(models["fedper"][name], expected)


def test_personal_values_never_reach_the_store(store):
    fleet = Fleet(store, clients=3, data=DATA)
    strategy = fleet.build("fedper", personal=HEAD)
    fleet.play(strategy, 1, 2)
    # Without what clients keep for themselves (their state, which is theirs alone): play once
    # more, and look at all blocks that came with the answers.
    before = {path for path in store.path.glob("blocks/**/*") if path.is_file()}
    messages = strategy.configure_train(3, fleet.model, _config(fleet), fleet.grid)
    replies = list(fleet.grid.send_and_receive(messages))
    assert len(replies) == 3 and not any(reply.has_error() for reply in replies)
    blocks = [
        path.read_bytes()
        for path in store.path.glob("blocks/**/*")
        if path.is_file() and path not in before
    ]
    assert blocks
    for node in (2, 3, 4):
        for name, tensor in own(fleet, node).items():
            for row in tensor.numpy().reshape(len(tensor), -1):
                needle = row.tobytes()[:64] if row.size > 1 else tensor.numpy().tobytes()
                assert not any(needle in block for block in blocks), name
        shared = to_torch(
            next(r for r in replies if r.metadata.src_node_id == node).content["arrays"]
        )
        needle = shared["1.weight"].numpy()[0].tobytes()[:64]
        assert any(needle in block for block in blocks)  # the search does find what is there


def _config(fleet: Fleet):
    from flwr.app import ConfigRecord

    return ConfigRecord({"run-config": fleet.run_config})


def test_clients_evaluate_with_their_own_layers_once_they_have_some(store):
    fleet = Fleet(store, clients=3, data={**DATA, "alpha": 0.1}, epochs=2)
    strategy, plain = fleet.build("fedper", personal=HEAD), fleet.build("fedavg")
    assert fleet.evaluate(strategy) == fleet.evaluate(plain)  # as it came in
    assert not any(context.state for context in fleet.raw.contexts.values())
    fleet.play(strategy, 1, 2)
    personal, common = fleet.evaluate(strategy), fleet.evaluate(plain)
    for node in (2, 3, 4):
        assert personal[node]["accuracy"] > common[node]["accuracy"] + 0.2, node
    assert strategy.needs_federated_evaluation


def test_what_an_update_says_of_personal_layers_is_not_read(store):
    from fedipfs.exchange import Exchange, from_torch

    fleet = Fleet(store, clients=3)
    strategy = fleet.build("fedper", personal=HEAD)
    first = values(fleet.model)

    def poison(reply) -> None:
        if reply.metadata.src_node_id == 3:
            content = Exchange(store).swap_in(reply.content)
            state = to_torch(content["arrays"])
            state["3.weight"] = torch.full_like(state["3.weight"], 666.0)
            content["arrays"] = from_torch(state)
            reply.content = Exchange(store).swap_out(content)

    fleet.raw.tamper = poison
    got = fleet.play(strategy)
    assert torch.equal(got["3.weight"], first["3.weight"])


def test_fedbn_keeps_the_whole_of_its_norm_layers(store):
    fleet = Fleet(store, clients=2, options={"norm": True}, data=DATA)
    first = values(fleet.model)
    strategy = fleet.build("fedbn")
    got = fleet.play(strategy, 1, 2)
    norm = {name for name in first if name.startswith("2.")}
    assert set(own(fleet, 2)) == norm == {
        f"2.{each}" for each in ("weight", "bias", "running_mean", "running_var",
                                 "num_batches_tracked")
    }  # fmt: skip
    for name in first:
        assert torch.equal(got[name], first[name]) == (name in norm)
    assert own(fleet, 2)["2.num_batches_tracked"] > 0


def test_the_answer_fits_a_message(store):
    fleet = Fleet(store, clients=2)
    strategy = fleet.build("fedper", personal=HEAD)
    fleet.play(strategy)
    assert fleet.raw.arrays_crossed == 0
    assert max(fleet.raw.sizes) < 2000


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fedper", {"personal": ["9.*"]}, r"'9\.\*', which matches no tensor.*3\.weight"),
        ("fedper", {"personal": ["3.*", "head.*"]}, r"'head\.\*', which matches no tensor"),
        ("fedper", {"personal": ["*"]}, r"nothing would be learnt together"),
        ("fedper", {"personal": ["1.*", "3.*"]}, r"nothing would be learnt together"),
        ("fedper", {"personal": []}, r"strategy\.personal=\[\] must be a list"),
        ("fedper", {"personal": "3.*"}, r"must be a list of patterns"),
        ("fedper", {"personal": [3]}, r"must be a list of patterns"),
        ("fedper", {"personal": ["3.*"] * 400}, r"more than 1024 bytes"),
        ("fedbn", {}, r"task's has none; add some"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(store, name, options, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Fleet(store, clients=2).build(name, **options)
    assert "\n" not in str(caught.value)


TIED = f"{tied.__file__}:Tied"


@pytest.mark.parametrize(
    ("personal", "names"),
    [
        (["decoder.*"], "'decoder.weight' at the clients, and it is shared as 'encoder.weight'"),
        (["*.bias", "encoder.weight"], "'encoder.weight'.*'decoder.weight'"),
        (["encoder.shift"], "'encoder.shift'.*'decoder.shift'"),
    ],
)
def test_tied_weights_do_not_leave_under_their_other_name(store, personal, names):
    fleet = Fleet(store, TIED, clients=2)
    with pytest.raises(ConfigError, match=names):
        fleet.build("fedper", personal=personal)
    state = RecordDict()
    with pytest.raises(ConfigError, match="the weights are tied"):  # whoever may ask for it
        put_on(tied.TiedModel(), personal, state)
    fleet.build("fedper", personal=["head.*"])
    strategy = fleet.build("fedavg")
    ask = strategy.configure_train

    def asking(*args):
        args[2]["personal"] = personal
        return ask(*args)

    strategy.configure_train = asking
    with pytest.raises(RunFailed, match="the weights are tied"):
        fleet.play(strategy)
    assert not any(context.state for context in fleet.raw.contexts.values())


@pytest.mark.parametrize("personal", [["head.*"], ["*.weight", "*coder.shift"]])
def test_tied_weights_that_stay_or_go_together_are_right(store, personal):
    fleet = Fleet(store, TIED, clients=2)
    strategy = fleet.build("fedper", personal=personal)
    fleet.play(strategy, 1, 2)
    assert not strategy.excluded
    assert "head.weight" in own(fleet, 2)


def test_other_strategies_leave_the_clients_memory_empty(store):
    fleet = Fleet(store, clients=2)
    fleet.play(fleet.build("fedavg"))
    assert not any(context.state for context in fleet.raw.contexts.values())
    assert np.isfinite(fleet.metrics["train_loss"])
