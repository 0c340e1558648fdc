"""Signed messages between real parties: all of it crosses, and nothing that was tampered with."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from grids import DirectGrid
from parties import COORDINATOR, NAMES, Parties
from quickstart import make_app, plain_app

from fedipfs import CidGrid
from fedipfs.errors import ConfigError, EdgeError, FormatError, NotRecipient, TrustListError
from fedipfs.exchange import (
    Exchange,
    Stamp,
    Vault,
    from_numpy,
    signed_bytes,
    signing,
    specs_of,
    stamp_of,
)
from fedipfs.store import dag
from fedipfs.trust import Identity, Member, TrustList
from fedipfs.trust.party import Party

HOUR = timedelta(hours=1)


@pytest.fixture
def parties(tmp_path, store):
    return Parties(tmp_path, store)


def model() -> ArrayRecord:
    rng = np.random.default_rng(0)
    arrays = {"z.weight": rng.normal(size=(8, 4)).astype("f4"), "a.bias": np.ones(4, "f4")}
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def ask(grid: CidGrid, number: int = 1, kind: str = "train") -> list[Message]:
    """The replies of all nodes to one message."""
    content = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": number})})
    messages = [grid.create_message(content, kind, node, "") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages))


def reasons(replies: list[Message]) -> list[str]:
    """By node, why a reply was refused; "" for a good one."""
    return [reply.error.reason if reply.has_error() else "" for reply in replies]


def only(number: int, tamper: Callable[[Message], None]) -> Callable[[Message], None]:
    """`tamper`, applied to the messages from and to one node."""
    return lambda message: (
        tamper(message)
        if number in (message.metadata.src_node_id, message.metadata.dst_node_id)
        else None
    )


def assert_refused(replies: list[Message], refusal: str, words: str = "") -> None:
    """Beta's reply was refused for that reason; the others' count."""
    first, second, third = reasons(replies)
    assert second.startswith(f"{refusal}: "), second
    assert words in second
    assert len(second) <= 500 and "\n" not in second
    assert (first, third) == ("", "")


# ---- what crosses


@pytest.mark.parametrize("seal", ["none", "updates", "all"])
@pytest.mark.parametrize("strategy", [FlowerFedAvg, FedAdam])
def test_strategies_give_the_same_with_keys_as_plain_flower(tmp_path, store, seal, strategy):
    parties = Parties(tmp_path, store, seal)
    grid = parties.grid(make_app(parties.mod))
    ours = strategy().start(grid=grid, initial_arrays=model(), num_rounds=2)
    plain = strategy().start(grid=DirectGrid(plain_app, 3), initial_arrays=model(), num_rounds=2)
    for name, array in plain.arrays.items():
        np.testing.assert_allclose(ours.arrays[name].numpy(), array.numpy(), rtol=1e-6, atol=1e-6)
    assert ours.evaluate_metrics_clientapp.keys() == plain.evaluate_metrics_clientapp.keys()
    link = grid._grid
    assert link.arrays_crossed == 0
    assert len(link.crossed) == 2 * 3 * 2 * 2
    for message in link.crossed:
        record = message.content["fedipfs"]
        assert len(record["signature"]) == 64
        assert record["by"] in (*NAMES, COORDINATOR)
        for values in message.content.values():
            assert all(len(value) <= 1024 for value in values.values() if hasattr(value, "__len__"))
    assert max(link.sizes) < 1000


def test_without_keys_the_messages_are_what_they_were(store):
    app = make_app(lambda m, c, n: Parties.mod(keyless, m, c, n))
    keyless = type("Keyless", (), {"vaults": {"x": Vault(store)}, "name_of": lambda s, n: "x"})()
    grid = CidGrid(DirectGrid(app, 3), store)
    assert reasons(ask(grid)) == ["", "", ""]
    for message in grid._grid.crossed:
        assert set(message.content["fedipfs"]) == {"cid:arrays", "order:arrays"}
    assert grid.signed == {}


def test_an_app_that_hands_back_the_model_as_it_came(parties):
    """Its update is then sealed by the coordinator: it must become the participant's own."""
    app = make_app(parties.mod, lambda message, context, call_next: echo(message))
    grid = parties.grid(app)
    replies = ask(grid)
    assert reasons(replies) == ["", "", ""]
    for reply in replies:
        for name, array in model().items():
            np.testing.assert_array_equal(reply.content["arrays"][name].numpy(), array.numpy())


def echo(message: Message) -> Message:
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)


@pytest.mark.parametrize("seal", ["updates", "all"])
def test_an_update_that_becomes_the_model_is_sealed_anew(tmp_path, store, seal):
    """A strategy may choose one update: the participants cannot open it as it was handed in."""
    parties = Parties(tmp_path, store, seal)
    grid = parties.grid(make_app(parties.mod))
    chosen = ask(grid)[1].content["arrays"]
    content = RecordDict({"arrays": chosen, "config": ConfigRecord({"server-round": 2})})
    messages = [grid.create_message(content, "train", node, "") for node in grid.get_node_ids()]
    assert reasons(list(grid.send_and_receive(messages))) == ["", "", ""]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0])
def test_any_metric_can_be_signed(parties, value):
    def answer(message, context, call_next):
        reply = call_next(message, context)
        reply.content["metrics"]["strange"] = value
        reply.content["metrics"]["several"] = [value, 1.0]
        reply.content["more"] = ConfigRecord({"t": True, "b": b"\x01\x55\x00\x00", "n": 2**64 - 1})
        reply.content["more"]["empty"] = ""
        return reply

    replies = ask(parties.grid(make_app(parties.mod, answer)))
    assert reasons(replies) == ["", "", ""]
    metrics = replies[0].content["metrics"]
    np.testing.assert_array_equal(metrics["strange"], value)
    assert replies[0].content["more"]["b"] == b"\x01\x55\x00\x00"


def test_a_nan_and_its_name_are_signed_as_different_things():
    def signed(value) -> bytes:
        return signed_bytes(RecordDict({"m": ConfigRecord({"x": value})}))

    values = [float("nan"), float("inf"), float("-inf"), "nan", 1, 1.0, True, 0, False, b"nan"]
    assert len({signed(value) for value in values}) == len(values)


# ---- what the coordinator refuses, changed on its way


def _reply(key: str, **changes) -> Callable[[Message], None]:
    return lambda reply: reply.content[key].update(changes)


def _flip(reply: Message) -> None:
    record = reply.content["fedipfs"]
    signature = record["signature"]
    record["signature"] = signature[:-1] + bytes((signature[-1] ^ 1,))


def _drop(*fields: str) -> Callable[[Message], None]:
    def tamper(reply):
        for field in fields:
            del reply.content["fedipfs"][field]

    return tamper


OTHER_CID = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
TAMPERED = [
    (_reply("fedipfs", **{"cid:arrays": OTHER_CID}), "SignatureWrong"),
    (_reply("fedipfs", **{"order:arrays": OTHER_CID}), "SignatureWrong"),
    (_reply("fedipfs", **{"cid:more": OTHER_CID}), "SignatureWrong"),
    (_reply("metrics", train_loss=0.4), "SignatureWrong"),
    (_reply("metrics", train_loss=0), "SignatureWrong"),
    (_reply("metrics", bonus=1.0), "SignatureWrong"),
    (lambda reply: reply.content["metrics"].pop("train_loss"), "SignatureWrong"),
    (lambda reply: reply.content.update(new=ConfigRecord({})), "SignatureWrong"),
    (lambda reply: reply.content.pop("metrics"), "SignatureWrong"),
    (lambda reply: reply.content.pop("fedipfs"), "SignatureMissing"),
    (_drop("signature"), "SignatureMissing"),
    (_drop("by"), "SignatureWrong"),
    (_drop("run"), "SignatureWrong"),
    (_drop("round"), "SignatureWrong"),
    (_drop("to"), "SignatureWrong"),
    (_flip, "SignatureWrong"),
    (_reply("fedipfs", signature=b""), "SignatureWrong"),
    (_reply("fedipfs", signature="text"), "SignatureWrong"),
    (_reply("fedipfs", signature=b"\1" * 64), "SignatureWrong"),
    (_reply("fedipfs", by="gamma"), "SignatureWrong"),
    (_reply("fedipfs", by=7), "SignatureWrong"),
    (_reply("fedipfs", round=2), "SignatureWrong"),
    (_reply("fedipfs", round=-1), "SignatureWrong"),
    (_reply("fedipfs", round=True), "SignatureWrong"),
    (_reply("fedipfs", run="another"), "SignatureWrong"),
    (_reply("fedipfs", to="train 4"), "SignatureWrong"),
    (_reply("fedipfs", to=3), "SignatureWrong"),
    (_reply("fedipfs", run=""), "SignatureWrong"),
    (_reply("fedipfs", run="x" * 1000), "SignatureWrong"),
    (_reply("fedipfs", **{"signature:": b"x"}), "SignatureWrong"),
]


@pytest.mark.parametrize(("tamper", "refusal"), TAMPERED)
@pytest.mark.parametrize("named", [True, False])
def test_a_changed_reply_is_refused_by_name_and_the_others_count(parties, tamper, refusal, named):
    grid = parties.grid(make_app(parties.mod), named=named)
    grid._grid.tamper = only(3, tamper)
    assert_refused(ask(grid), refusal)
    assert set(grid.signed) == {2, 4}


@pytest.mark.parametrize("by", ["nobody", "\n", "x" * 900, COORDINATOR])
def test_an_organization_that_is_not_a_participant_is_unknown(parties, by):
    grid = parties.grid(make_app(parties.mod), named=False)
    grid._grid.tamper = only(3, _reply("fedipfs", by=by))
    assert_refused(ask(grid), "SignerUnknown")


def test_a_reply_of_an_earlier_round_is_refused(parties):
    grid, kept = parties.grid(make_app(parties.mod)), {}
    grid._grid.tamper = only(3, lambda reply: kept.setdefault("content", reply.content))
    assert reasons(ask(grid, 1)) == ["", "", ""]
    grid._grid.tamper = only(3, lambda reply: setattr(reply, "content", kept["content"]))
    assert_refused(ask(grid, 2), "SignatureWrong", "another run, round or node")


def test_a_reply_of_another_run_is_refused(parties):
    app, kept = make_app(parties.mod), {}
    before = parties.grid(app)
    before.stamp = Stamp("run one", 1)
    before._grid.tamper = only(3, lambda reply: kept.setdefault("content", reply.content))
    assert reasons(ask(before)) == ["", "", ""]
    grid = parties.grid(app)
    grid.stamp = Stamp("run two", 1)
    grid._grid.tamper = only(3, lambda reply: setattr(reply, "content", kept["content"]))
    assert_refused(ask(grid), "SignatureWrong")


def test_a_reply_of_another_run_of_the_same_number_is_refused(parties):
    """The SuperLink numbers the runs of Flower apps: it may hand out one number twice."""
    app, kept = make_app(parties.mod), {}
    before = parties.grid(app)
    before._grid.tamper = only(3, lambda reply: kept.setdefault("content", reply.content))
    assert reasons(ask(before)) == ["", "", ""]
    grid = parties.grid(app)
    grid._grid.tamper = only(3, lambda reply: setattr(reply, "content", kept["content"]))
    assert_refused(ask(grid), "SignatureWrong", "another run, round or node")


def test_a_reply_that_names_another_node_as_its_own_is_refused(parties):
    def tamper(reply):
        reply.metadata.__dict__["_src_node_id"] = 4

    grid = parties.grid(make_app(parties.mod), named=False)
    grid._grid.tamper = only(3, tamper)
    replies = ask(grid)
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3, 4]
    assert reasons(replies) == ["", "node 4 answered what was asked of this one", ""]


def test_a_node_knows_itself_which_it_is(parties):
    """Whoever carries the messages says for whom each is, too."""
    grid = parties.grid(make_app(parties.mod))
    grid._grid.contexts[3].node_id = 4
    assert_refused(ask(grid), "SignatureWrong", "another run, round or node")


def test_an_update_is_sealed_to_the_coordinator_that_asked_alone(parties):
    """Beta works with another coordinator, too."""
    rival, path = Identity.new("rival"), parties.lists["beta"]
    TrustList([*TrustList.load(path).members, Member(rival.public, "coordinator")]).save(path)
    replies = ask(parties.grid(make_app(parties.mod)))
    assert reasons(replies) == ["", "", ""]
    theirs = Vault(parties.store, Party(rival, "coordinator", path), "all")
    with pytest.raises(NotRecipient):
        theirs.leaves(replies[1].content["arrays"].cid)
    for_all = parties.vaults["beta"].put_bytes(b"x", private=False)
    assert theirs.get_bytes(for_all) == b"x"


@pytest.mark.parametrize("named", [True, False])
def test_one_reply_does_not_count_for_two_nodes(parties, named):
    """Whoever carries the messages could else give one organization the weight of all."""
    grid, kept = parties.grid(make_app(parties.mod), named=named), {}

    def tamper(reply):
        if reply.metadata.src_node_id == 2:
            kept["content"] = reply.content
        if reply.metadata.src_node_id == 3:
            reply.content = kept["content"]

    grid._grid.tamper = tamper
    assert_refused(ask(grid), "SignatureWrong")


def test_an_answer_to_train_is_none_to_evaluate(parties):
    grid, kept = parties.grid(make_app(parties.mod), named=False), {}
    grid._grid.tamper = only(3, lambda reply: kept.setdefault("content", reply.content))
    assert reasons(ask(grid, kind="train")) == ["", "", ""]
    grid._grid.tamper = only(3, lambda reply: setattr(reply, "content", kept["content"]))
    assert_refused(ask(grid, kind="evaluate"), "SignatureWrong")


# ---- what the coordinator refuses of a participant that has keys and lies


def liar(parties: Parties, lie: Callable[[Message, Stamp], RecordDict]):
    """An app in which beta answers what `lie(honest reply, stamp)` gives."""

    def mod(message, context, call_next):
        stamp = stamp_of(message.content)
        reply = parties.mod(message, context, call_next)
        if message.metadata.dst_node_id == 3:
            reply.content = lie(reply, stamp)
        return reply

    return make_app(mod)


def answer(vault: Vault, reply: Message, stamp: Stamp) -> RecordDict:
    """New arrays, put into `vault` and signed with its keys."""
    content = RecordDict({"metrics": reply.content["metrics"], "arrays": model()})
    return Exchange(vault).swap_out(content, stamp)


def signed(vault: Vault, reply: Message, stamp: Stamp, cid: object) -> RecordDict:
    """The reply with another reference, signed with the vault's keys."""
    references = ConfigRecord({"cid:arrays": str(cid)})
    content = RecordDict({"metrics": reply.content["metrics"], "fedipfs": references})
    signing.sign(vault, content, stamp)
    return content


def test_the_update_of_another_is_not_ones_own(parties):
    """Beta signs the CID of what alpha sealed, which it cannot open."""
    seen = {}
    grid = parties.grid(
        liar(parties, lambda r, stamp: signed(parties.vaults["beta"], r, stamp, seen["cid"]))
    )
    grid._grid.tamper = only(2, lambda r: seen.update(cid=r.content["fedipfs"]["cid:arrays"]))
    assert_refused(ask(grid), "SignatureWrong", "sealed by another than beta")


def test_the_model_is_not_an_update(parties):
    """The CID that came, signed and sent back; a participant must seal what it hands in."""
    vault, sent = parties.vaults["beta"], {}
    grid = parties.grid(liar(parties, lambda r, stamp: signed(vault, r, stamp, sent["cid"])))
    grid._grid.forge = lambda message: sent.update(cid=message.content["fedipfs"]["cid:arrays"])
    assert_refused(ask(grid), "SignatureWrong", "sealed by another than beta")


@pytest.mark.parametrize("seal", ["all", "updates"])
def test_an_update_must_be_sealed(tmp_path, store, seal):
    parties = Parties(tmp_path, store, seal)
    plain = parties.vault("beta", seal="none")
    grid = parties.grid(liar(parties, lambda reply, stamp: answer(plain, reply, stamp)))
    assert_refused(ask(grid), "NotSealed")


def test_an_update_sealed_to_others_cannot_be_opened(parties):
    vault = parties.vault("beta")
    vault.party.audience = lambda only: [parties.keys["gamma"].public]
    grid = parties.grid(liar(parties, lambda reply, stamp: answer(vault, reply, stamp)))
    assert_refused(ask(grid), "NotRecipient", COORDINATOR)


def test_a_participant_with_other_keys_than_listed_is_refused(parties):
    parties.vaults["beta"] = parties.vault("beta", key=Identity.new("beta"))
    grid = parties.grid(make_app(parties.mod))
    assert_refused(ask(grid), "NotRecipient")  # it cannot even open the model

    vault = parties.vault("beta", key=parties.vaults["beta"].party.identity)
    parties.vaults["beta"] = parties.vault("beta", key=parties.keys["beta"])
    grid = parties.grid(liar(parties, lambda reply, stamp: answer(vault, reply, stamp)))
    assert_refused(ask(grid), "SignatureWrong")


def test_the_keys_of_one_organization_do_not_sign_for_another(parties):
    """Gamma's keys in an identity that says beta."""
    gamma = parties.keys["gamma"]
    posing = Identity("beta", gamma._signing, gamma._sealing)
    vault = parties.vault("beta", key=posing)
    for named in (True, False):
        app = liar(parties, lambda reply, stamp: answer(vault, reply, stamp))
        assert_refused(ask(parties.grid(app, named=named)), "SignatureWrong")


def test_a_coordinator_does_not_answer_as_participant(parties):
    keys = parties.keys[COORDINATOR]
    vault = Vault(parties.store, Party(keys, "participant", parties.lists["beta"]), "all")
    vault.party.audience = lambda only: [parties.keys["alpha"].public, keys.public]
    grid = parties.grid(
        liar(parties, lambda reply, stamp: answer(vault, reply, stamp)), named=False
    )
    assert_refused(ask(grid), "SignerUnknown", "as participant")


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (lambda leaves: leaves[:-1], "EnvelopeTruncated"),
        (lambda leaves: [*leaves[:-2], leaves[-1]], "EnvelopeTampered"),
        (lambda leaves: [leaves[0], *leaves[:0:-1]], "EnvelopeTampered"),
        (lambda leaves: [leaves[0], leaves[1][:-1] + b"?", *leaves[2:]], "EnvelopeTampered"),
        (
            lambda leaves: [leaves[0].replace(b"\0\1", b"\0\2", 1), *leaves[1:]],
            "EnvelopeVersion",
        ),
        (lambda leaves: [leaves[0][:-9], *leaves[1:]], "EnvelopeTruncated"),
        (lambda leaves: leaves[1:], "NotSealed"),
    ],
)
def test_a_damaged_envelope_is_refused_by_name(parties, spoil, refusal):
    """Damaged by its sender, so that signature and hashes fit."""
    vault = parties.vaults["beta"]
    large = {"z.weight": np.zeros((1024, 600), "f4"), "a.bias": np.ones(4, "f4")}

    def lie(reply, stamp):
        cid = vault.put_weights(specs_of(from_numpy(large)).values(), large.__getitem__)
        leaves = spoil([*dag.cat(parties.store, cid)])
        return signed(vault, reply, stamp, dag.add(parties.store, leaves))

    grid = parties.grid(liar(parties, lie))
    content = RecordDict({"arrays": from_numpy(large), "config": ConfigRecord({"server-round": 1})})
    messages = [grid.create_message(content, "train", node, "") for node in grid.get_node_ids()]
    assert_refused(list(grid.send_and_receive(messages)), refusal)


# ---- whom the coordinator trusts may change between rounds


def _only_as_coordinator(parties: Parties) -> None:
    members = [
        Member(one.identity, "coordinator") if one.identity.organization == "beta" else one
        for one in parties.members()
    ]
    TrustList(members).save(parties.lists[COORDINATOR])


def _forget(parties: Parties) -> None:
    members = [one for one in parties.members() if one.identity.organization != "beta"]
    TrustList(members).save(parties.lists[COORDINATOR])


NOW = datetime.now(UTC)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda p: p.relist(COORDINATOR, "beta", revoked=NOW - HOUR), "SignerRevoked"),
        (lambda p: p.relist(COORDINATOR, "beta", valid_to=NOW - HOUR), "SignerExpired"),
        (lambda p: p.relist(COORDINATOR, "beta", valid_from=NOW + 24 * HOUR), "SignerExpired"),
        (_only_as_coordinator, "SignerUnknown"),
        (_forget, "SignerUnknown"),
    ],
)
def test_a_change_of_the_trust_list_counts_at_once(tmp_path, store, change, refusal):
    parties = Parties(tmp_path, store, "updates")  # so that beta can read the model
    grid = parties.grid(make_app(parties.mod))
    assert reasons(ask(grid, 1)) == ["", "", ""]
    change(parties)
    assert_refused(ask(grid, 2), refusal, "beta")
    TrustList(parties.members()).save(parties.lists[COORDINATOR])
    assert reasons(ask(grid, 3)) == ["", "", ""]


def test_a_revoked_member_cannot_open_the_next_model(parties):
    grid = parties.grid(make_app(parties.mod))
    assert reasons(ask(grid, 1)) == ["", "", ""]
    parties.relist(COORDINATOR, "beta", revoked=NOW - HOUR)
    assert_refused(ask(grid, 2), "NotRecipient")


def test_a_trust_list_that_breaks_meanwhile_stops_the_round(parties):
    grid = parties.grid(make_app(parties.mod))
    parties.lists[COORDINATOR].write_text("format = ?")
    with pytest.raises(TrustListError, match=r"coordinator\.toml is not TOML"):
        ask(grid)


# ---- what a participant refuses, before it trains


def _as_sender(parties: Parties, name: str, role: str) -> Vault:
    key = parties.keys[name]
    return Vault(parties.store, Party(key, role, parties.lists[COORDINATOR]), parties.seal)


def sent_by(vault: Vault) -> Callable[[Message], None]:
    """Replaces a message by one that `vault` signed and, as it does, sealed."""

    def forge(message: Message) -> None:
        stamp = stamp_of(message.content)
        content = RecordDict({"arrays": model(), "config": message.content["config"]})
        message.content = Exchange(vault).swap_out(content, stamp)

    return forge


def _unsealed(parties: Parties) -> Callable[[Message], None]:
    return sent_by(parties.vault(COORDINATOR, seal="none"))


def _to_others(parties: Parties) -> Callable[[Message], None]:
    vault = parties.vault(COORDINATOR)
    vault.party.audience = lambda only: [parties.keys["gamma"].public]
    return sent_by(vault)


def _resealed(parties: Parties) -> Callable[[Message], None]:
    """The coordinator's signature on what gamma sealed."""
    vault = parties.vault("gamma")
    vault.party.audience = lambda only: [parties.keys["beta"].public]
    cid = vault.put_bytes(b"x", private=False)

    def forge(message):
        message.content["fedipfs"]["cid:arrays"] = str(cid)
        stamp = stamp_of(message.content)
        for field in ("signature", "by"):
            del message.content["fedipfs"][field]
        signing.sign(parties.coordinator, message.content, stamp)

    return forge


FORGED = [
    (lambda p: lambda m: m.content.pop("fedipfs"), "SignatureMissing"),
    (lambda p: _drop("signature"), "SignatureMissing"),
    (lambda p: _flip, "SignatureWrong"),
    (lambda p: _drop("round"), "SignatureWrong"),
    (lambda p: _drop("to"), "SignatureWrong"),
    (lambda p: _reply("fedipfs", to="train 4"), "SignatureWrong"),
    (lambda p: _reply("config", **{"server-round": 2}), "SignatureWrong"),
    (lambda p: _reply("config", **{"proximal-mu": 0.0}), "SignatureWrong"),
    (lambda p: _reply("fedipfs", **{"cid:arrays": OTHER_CID}), "SignatureWrong"),
    (lambda p: sent_by(_as_sender(p, "alpha", "participant")), "SignerUnknown"),
    (lambda p: sent_by(_as_sender(p, "alpha", "coordinator")), "SignerUnknown"),
    (lambda p: sent_by(p.vault(COORDINATOR, key=Identity.new(COORDINATOR))), "SignatureWrong"),
    (lambda p: sent_by(p.vault(COORDINATOR, key=Identity.new("stranger"))), "SignerUnknown"),
    (_unsealed, "NotSealed"),
    (_to_others, "NotRecipient"),
    (_resealed, "SignatureWrong"),
]


@pytest.mark.parametrize(("forge", "refusal"), FORGED)
def test_a_participant_refuses_before_it_trains(parties, forge, refusal):
    trained = []
    app = make_app(parties.mod, lambda m, c, call: trained.append(c.node_id) or call(m, c))
    grid = parties.grid(app)
    grid._grid.forge = only(3, forge(parties))
    assert_refused(ask(grid), refusal)
    assert trained == [2, 4]


@pytest.mark.parametrize(
    ("dates", "refusal"),
    [({"revoked": NOW - HOUR}, "SignerRevoked"), ({"valid_to": NOW - HOUR}, "SignerExpired")],
)
def test_a_coordinator_that_beta_no_longer_trusts_gets_nothing_from_it(parties, dates, refusal):
    trained = []
    app = make_app(parties.mod, lambda m, c, call: trained.append(c.node_id) or call(m, c))
    grid = parties.grid(app)
    parties.relist("beta", COORDINATOR, **dates)
    assert_refused(ask(grid), refusal)
    assert trained == [2, 4]


def test_a_message_for_another_node_is_refused(parties):
    """Whoever carries the messages could else have one organization train twice."""
    grid, kept = parties.grid(make_app(parties.mod)), {}

    def forge(message):
        if message.metadata.dst_node_id == 2:
            kept["content"] = message.content
        if message.metadata.dst_node_id == 3:
            message.content = kept["content"]

    grid._grid.forge = forge
    assert_refused(ask(grid), "SignatureWrong")


# ---- what has no place in either


def test_a_coordinator_alone_in_its_list_is_told_whom_it_lacks(parties):
    TrustList(one for one in parties.members() if one.role == "coordinator").save(
        parties.lists["beta"]
    )
    members = [one for one in parties.members() if one.role == "coordinator"]
    TrustList(members).save(parties.lists["alpha"])
    with pytest.raises(ConfigError, match="no valid participant to seal to"):
        Vault(
            parties.store,
            Party(parties.keys[COORDINATOR], "coordinator", parties.lists["alpha"]),
            "all",
        ).put_record({})


def test_a_run_that_cannot_be_named_is_an_error_of_the_coordinator(parties):
    grid = parties.grid(make_app(parties.mod))
    grid.stamp = Stamp("x" * 200, 1)
    with pytest.raises(FormatError, match="run="):
        ask(grid)


def test_the_key_of_the_signature_is_reserved(parties):
    content = RecordDict({"fedipfs": ConfigRecord({"run": "mine"})})
    with pytest.raises(EdgeError, match="reserved"):
        Exchange(parties.coordinator).swap_out(content, Stamp("run", 1))
    with pytest.raises(EdgeError, match="needs its run and round"):
        Exchange(parties.coordinator).swap_out(RecordDict())
