"""Ensembles under one CID: put, pinned, loaded in one line; and what strangers may put there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from parties import Parties, blocks

import fedipfs
from fedipfs import tasks, weights
from fedipfs.errors import (
    BlockNotFound,
    ConfigError,
    FedIPFSError,
    NotRecipient,
    SignatureWrong,
    WeightsError,
)
from fedipfs.exchange import (
    Recipe,
    Vault,
    from_torch,
    get_ensemble,
    put_arrays,
    put_ensemble,
    tensors_of,
)
from fedipfs.exchange.ensemble import ENSEMBLE, MAX_MEMBERS
from fedipfs.ipld import CID, DAG_CBOR, dagcbor
from fedipfs.store import dag
from fedipfs.tasks.ensemble import Ensemble
from fedipfs.tasks.small import Digits

DIGITS = "fedipfs.tasks.small:Digits"
INPUTS = torch.linspace(-1, 1, 3 * 64).reshape(3, 8, 8)
WIDTHS = (4, 12)


def module(hidden: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return Digits(hidden).model()


MODULES = [module(hidden, seed) for seed, hidden in enumerate(WIDTHS)]
RECIPE = Recipe(DIGITS, tuple({"hidden": hidden} for hidden in WIDTHS), (3.0, 1.0), "soft")


def put(where, recipe: Recipe = RECIPE) -> CID:
    members = [put_arrays(where, from_torch(each.state_dict()))[0] for each in MODULES]
    return put_ensemble(where, members, recipe)


def same(loaded: torch.nn.Module, voting: str = "soft") -> None:
    with torch.no_grad():
        expected = Ensemble(MODULES, [3, 1], voting)(INPUTS)
        torch.testing.assert_close(loaded(INPUTS), expected)
    assert not loaded.training


# ---- in one line


def test_an_ensemble_is_loaded_in_one_line(store):
    cid = put(store)
    same(fedipfs.load_model(cid, store))
    same(fedipfs.load_model(str(cid), str(store.path)))
    fedipfs.use_store(store)
    same(fedipfs.load_model(cid))


def test_hard_voting_is_remembered(store):
    cid = put(store, Recipe(DIGITS, RECIPE.options, RECIPE.weights, "hard"))
    same(fedipfs.load_model(cid, store), "hard")


def test_a_plain_model_is_loaded_in_one_line(store):
    cid, _ = put_arrays(store, from_torch(MODULES[0].state_dict()))
    ways = (
        {"task": DIGITS, "options": {"hidden": 4}},
        {"task": Digits(4)},
    )
    for way in ways:
        loaded = fedipfs.load_model(cid, store, **way)
        assert torch.equal(loaded(INPUTS), MODULES[0](INPUTS))
        assert not loaded.training


def test_a_task_given_takes_the_place_of_the_recorded_one(store):
    cid = put(store, Recipe("nowhere:Nothing", RECIPE.options, RECIPE.weights))
    same(fedipfs.load_model(cid, store, task=DIGITS))
    same(fedipfs.load_model(cid, store, task=Digits(99)))  # the record has the members' options


def test_the_record_links_its_members(store):
    cid = put(store)
    record = dag.get_record(store, cid)
    assert record["type"] == ENSEMBLE == "fedipfs/ensemble/v1"
    reached = set(dag.walk(store, cid))
    assert set(record["members"]) < reached
    store.pin(cid, "kept")
    store.gc(0)
    same(fedipfs.load_model(cid, store))
    members, recipe = get_ensemble(store, cid)
    assert (members, recipe) == (record["members"], RECIPE)


def test_members_of_another_precision_than_the_tasks_are_refused(store):
    half = module(4, 7).to(torch.bfloat16)
    member, _ = put_arrays(store, from_torch(half.state_dict()))
    cid = put_ensemble(store, [member], Recipe(DIGITS, ({"hidden": 4},), (1.0,)))
    with pytest.raises(WeightsError, match=r"does not fit its task.*BF16"):
        fedipfs.load_model(cid, store)


# ---- as one file


def test_one_file_holds_the_whole_ensemble(store, tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        for piece in tensors_of(store, put(store)).file():
            file.write(piece)
    state = safetensors.torch.load_file(path)
    ensemble = Ensemble([Digits(4).model(), Digits(12).model()], [1, 1])
    ensemble.load_state_dict(state)
    same(ensemble.eval())
    same(fedipfs.load_model(dag.add_file(store, path), store))  # and says what it is
    assert state["weights"].tolist() == [0.75, 0.25]


def test_the_file_streams(store):
    """Only one tensor is held at a time: pieces are no larger than a leaf."""
    tensors = tensors_of(store, put(store))
    assert max(memoryview(piece).nbytes for piece in tensors.file()) <= 1 << 20
    data = b"".join(tensors.file())
    assert set(safetensors.torch.load(data)) == set(tensors.names)


def test_the_file_of_a_plain_model_is_itself(store):
    cid, _ = put_arrays(store, from_torch(MODULES[0].state_dict()))
    assert b"".join(tensors_of(store, cid).file()) == b"".join(dag.cat(store, cid))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "{}", '{"task": 3}', "null"])
def test_a_file_whose_recipe_is_malformed_is_refused(store, text):
    specs = [weights.TensorSpec("w", "F32", (1,))]
    pieces = weights.chunks(specs, lambda _: np.zeros(1, "f4"), {"fedipfs.ensemble": text})
    cid = dag.add(store, pieces)
    with pytest.raises(WeightsError, match=r"metadata|details of an ensemble"):
        fedipfs.load_model(cid, store)


# ---- sealed


@pytest.mark.parametrize("seal", ["all", "updates"])
def test_where_the_coordinator_seals_participants_load_it_all_the_same(tmp_path, store, seal):
    parties = Parties(tmp_path, store, seal)
    cid = put(parties.coordinator)
    for name in parties.names:
        same(fedipfs.load_model(cid, parties.vaults[name]))
    same(fedipfs.load_model(cid, parties.coordinator))
    stranger = Parties(tmp_path / "..", store, seal).vaults["alpha"]
    if seal == "all":
        with pytest.raises(NotRecipient):
            fedipfs.load_model(cid, stranger)


def test_a_sealed_record_shows_its_links_and_no_more(tmp_path, store):
    parties = Parties(tmp_path, store, "all")
    cid = put(parties.coordinator)
    record = dag.get_record(store, cid)
    assert set(record) == {"type", "members", "details"}
    assert type(record["details"]) is CID
    for word in (b"Digits", b"hidden", b"soft", b"members.0"):
        assert [one for one, block in blocks(store).items() if word in block] == []
    store.pin(cid, "kept")
    store.gc(0)
    same(fedipfs.load_model(cid, parties.vaults["alpha"]))


@pytest.mark.parametrize("seal", ["all", "updates"])
def test_members_that_another_sealed_are_refused_where_it_is_said_who_names_them(
    tmp_path, store, seal
):
    parties = Parties(tmp_path, store, seal)
    site, hub = parties.vaults["alpha"], parties.keys["coordinator"].public
    same(fedipfs.load_model(put(parties.coordinator), site, sender=hub))
    # What a site had sealed for itself alone.
    own, _ = put_arrays(site, from_torch(MODULES[0].state_dict()), private=True)
    recipe = Recipe(DIGITS, ({"hidden": 4},), (1.0,))
    cid = put_ensemble(parties.coordinator, [own], recipe)
    for each, options in ((cid, {}), (own, {"task": DIGITS, "options": {"hidden": 4}})):
        fedipfs.load_model(each, site, **options)
        with pytest.raises(SignatureWrong, match="sealed by another than coordinator"):
            fedipfs.load_model(each, site, sender=hub, **options)


# ---- what strangers wrote


def record(store, **changes) -> CID:
    value = {**dag.get_record(store, put(store)), **changes}
    return store.put(dagcbor.encode(value), DAG_CBOR)


def details(**changes):
    return {**RECIPE.plain(), **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "fedipfs/round/v1"},
        {"type": None},
        {"members": []},
        {"members": ["bafy"]},
        {"members": {"a": 1}},
        {"members": None},
        {"details": None},
        {"details": []},
        {"details": details(weights=[1.0])},
        {"details": details(weights=[1.0, -1.0])},
        {"details": details(weights=[0, 0])},
        {"details": details(weights=[True, True])},
        {"details": details(weights=["1", "2"])},
        {"details": details(weights=[2**63, 1])},
        {"details": details(weights={"0": 1.0})},
        {"details": details(options=[{}])},
        {"details": details(options=["{}", "{}"])},
        {"details": details(options=[{"hidden": 4}])},
        {"details": details(task=None)},
        {"details": details(task=b"x")},
        {"details": details(voting=1)},
        {"details": {"task": DIGITS}},
    ],
)
def test_a_malformed_record_is_a_named_error(store, changes):
    with pytest.raises(WeightsError):
        fedipfs.load_model(record(store, **changes), store)


def test_values_that_are_no_ensembles_are_named_errors(store):
    for value in (None, 3, "text", [], {}, {"type": [ENSEMBLE]}):
        with pytest.raises(WeightsError, match="is no ensemble"):
            fedipfs.load_model(dag.put_record(store, value), store)


def test_another_voting_is_refused(store):
    with pytest.raises(ConfigError, match="voting=loud is unknown"):
        fedipfs.load_model(record(store, details=details(voting="loud")), store)


def test_too_many_members_are_refused_unread(store):
    many = MAX_MEMBERS + 1
    missing = CID.of(b"missing")
    cid = record(
        store,
        members=[missing] * many,
        details=details(options=[{}] * many, weights=[1.0] * many),
    )
    with pytest.raises(WeightsError, match=f"1 to {MAX_MEMBERS} members"):
        fedipfs.load_model(cid, store)


@pytest.mark.parametrize(
    "target", ["os:path", "subprocess:Popen", "/tmp/evil.py:Task", "fedipfs.store:Store", "x"]
)
def test_a_task_that_is_not_allowed_is_not_imported(store, target):
    with pytest.raises(ConfigError, match=r"not allowed here|should be module:Class"):
        fedipfs.load_model(record(store, details=details(task=target)), store)


def test_a_task_of_the_callers_own_must_be_allowed(store, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from fedipfs.tasks.small import Digits\nclass Mine(Digits):\n    pass\n")
    cid = put(store, Recipe(f"{file}:Mine", RECIPE.options, RECIPE.weights))
    with pytest.raises(ConfigError, match="not allowed here"):
        fedipfs.load_model(cid, store)
    same(fedipfs.load_model(cid, store, allowed=[str(file)]))


def test_a_plain_model_without_its_task_says_what_is_missing(store):
    cid, _ = put_arrays(store, from_torch(MODULES[0].state_dict()))
    with pytest.raises(ConfigError, match="is a plain model: say which with task="):
        fedipfs.load_model(cid, store)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([{"hidden": 4}, {"hidden": 13}], "does not fit its task"),
        ([{"hidden": 10**15}, {"hidden": 12}], "does not fit its task"),  # petabytes
        ([{"hidden": -1}, {"hidden": 12}], "cannot be made"),
        ([{"hidden": "4"}, {"hidden": 12}], "cannot be made"),
        ([{"hidden": None}, {"hidden": 12}], "cannot be made"),
        ([{"width": 4}, {"hidden": 12}], "do not fit"),
        ([{}, {}], "does not fit its task"),
    ],
)
def test_options_that_do_not_fit_the_members_are_refused_before_memory_is_taken(
    store, options, error
):
    with pytest.raises(FedIPFSError, match=error) as caught:
        fedipfs.load_model(record(store, details=details(options=options)), store)
    assert isinstance(caught.value, WeightsError | ConfigError)


FUSSY = """
from fedipfs.tasks.small import Digits

class Fussy(Digits):
    made = []

    def model(self):
        model = super().model()
        float(model[1].weight.sum())  # which torch's meta device cannot say
        Fussy.made.append(model[1].out_features)
        return model
"""


def test_options_of_a_record_are_not_tried_out_with_memory(store, tmp_path):
    file = tmp_path / "fussy.py"
    file.write_text(FUSSY)
    task, allowed = f"{file}:Fussy", [str(file)]
    cid = put(store, Recipe(task, RECIPE.options, RECIPE.weights))
    with pytest.raises(WeightsError, match="cannot be made on torch's meta device") as caught:
        fedipfs.load_model(cid, store, allowed=allowed)
    assert "\n" not in str(caught.value)
    cls = type(tasks.load(task, {}, allowed=allowed))
    assert cls.made == []
    same(fedipfs.load_model(cid, store, task=task, allowed=allowed))  # the caller's own word
    member = put_arrays(store, from_torch(MODULES[0].state_dict()))[0]
    alone = put_ensemble(store, [member], Recipe(task, ({"hidden": 4},), (1.0,)))
    fedipfs.load_model(alone, store, allowed=allowed, options={"hidden": 4})
    with pytest.raises(WeightsError, match="are not those in options="):
        fedipfs.load_model(alone, store, allowed=allowed, options={"hidden": 5})
    plain = fedipfs.load_model(member, store, task=task, options={"hidden": 4}, allowed=allowed)
    assert plain[1].out_features == 4


def test_pieces_of_an_ensemble_are_read_only(store):
    tensors = tensors_of(store, put(store))
    for name in tensors.names:
        assert not any(piece.flags.writeable for piece in tensors.pieces(name))
    assert tensors.tensor("weights").flags.writeable


def test_a_member_that_declares_too_much_is_refused(store):
    with pytest.raises(WeightsError, match=r"bytes, not .* at most"):
        fedipfs.load_model(put(store), store, max_bytes=4000)


def test_members_are_bounded_together(store):
    sizes = [weights.Weights(store, cid).nbytes for cid in get_ensemble(store, put(store))[0]]
    assert fedipfs.load_model(put(store), store, max_bytes=sum(sizes))
    with pytest.raises(WeightsError, match="at most"):
        fedipfs.load_model(put(store), store, max_bytes=sum(sizes) - 1)


def test_a_missing_member_is_named(store):
    members, _ = get_ensemble(store, put(store))
    gone = CID.of(b"gone")
    with pytest.raises(BlockNotFound, match=str(gone)):
        fedipfs.load_model(record(store, members=[members[0], gone]), store)


def test_members_that_are_no_weights_are_named_errors(store):
    text = dag.add(store, [b"no safetensors at all"])
    other = put(store)
    for member in (text, other):
        with pytest.raises(FedIPFSError):
            fedipfs.load_model(record(store, members=[member, member]), store)


def test_a_recipe_that_could_not_be_read_back_is_not_stored(store):
    for recipe in (
        Recipe(DIGITS, (), ()),
        Recipe(DIGITS, ({},), (math.nan,)),
        Recipe(DIGITS, ({},), (math.inf,)),
        Recipe(DIGITS, ({}, {}), (1.0,)),
    ):
        with pytest.raises(WeightsError):
            put_ensemble(Vault(store), [], recipe)
