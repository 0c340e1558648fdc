"""What lies in the store when it is sealed, and what becomes of damaged envelopes."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parties import COORDINATOR, NAMES, Parties, blocks
from quickstart import make_app

from fedipfs.errors import (
    BlockCorrupt,
    ConfigError,
    EnvelopeError,
    EnvelopeTampered,
    EnvelopeTruncated,
    EnvelopeVersion,
    KeyFileError,
    NotRecipient,
    NotSealed,
    SignatureWrong,
    WeightsError,
)
from fedipfs.exchange import (
    StoredArrays,
    Vault,
    choose_seal,
    default,
    default_vault,
    from_numpy,
    specs_of,
    store_arrays,
)
from fedipfs.exchange.compressing import compress_model
from fedipfs.ipld import CID, RAW, unixfs
from fedipfs.store import FolderStore, dag
from fedipfs.trust import (
    Identity,
    Member,
    Opener,
    PublicIdentity,
    TrustList,
    envelope,
    is_sealed,
)
from fedipfs.trust.party import Party
from fedipfs.weights.compression import Spec

SECRET = np.frombuffer(b"weights that nobody else may see" * 4, "f4").copy()
MODEL = {"encoder.secret-layer": SECRET, "head": np.arange(8, dtype="f4")}


@pytest.fixture
def parties(tmp_path, store):
    return Parties(tmp_path, store)


def put(vault: Vault, tensors=MODEL, **options) -> CID:
    return vault.put_weights(specs_of(from_numpy(tensors)).values(), tensors.__getitem__, **options)


def rounds(parties: Parties, count: int = 2) -> None:
    """Rounds of a federation whose updates still show the model's bytes, if not sealed."""
    arrays = ArrayRecord({name: Array(array) for name, array in MODEL.items()})
    grid = parties.grid(make_app(parties.mod))
    for number in range(1, count + 1):
        config = ConfigRecord({"server-round": number, "hyper-parameter": "momentum-0.9"})
        content = RecordDict({"arrays": arrays, "config": config})
        nodes = grid.get_node_ids()
        replies = grid.send_and_receive(
            [grid.create_message(content, "train", node, "") for node in nodes]
        )
        assert not any(reply.has_error() for reply in replies)
    vault = parties.coordinator
    vault.put_record({"accuracy": 0.5, "clients": list(NAMES)}, private=True)
    vault.put_record({"optimizer": "momentum-0.9"})
    parties.vaults["alpha"].put_bytes(b"what alpha remembers: accuracy")


TELLING = [
    SECRET.tobytes()[:16],
    b"encoder.secret-layer",
    b"accuracy",
    b"momentum-0.9",
    b"train_loss",
    b"num-examples",
    b"optimizer",
    b"__metadata__",
    b'"dtype"',
    b"alpha",
    b"coordinator",
]


def test_nothing_of_what_is_sealed_can_be_read_in_the_store(parties):
    rounds(parties)
    held = blocks(parties.store)
    assert len(held) > 20
    for block in held.values():
        assert [word for word in TELLING if word in block] == []


def test_the_search_finds_what_is_not_sealed(tmp_path, store):
    """The same words, in the same place, without sealing: the test above can fail."""
    parties = Parties(tmp_path, store, "none")
    rounds(parties)
    everything = b"".join(blocks(store).values())
    missing = {b"train_loss", b"num-examples", b"__metadata__", b"coordinator"}
    assert {word for word in TELLING if word not in everything} <= missing


def test_updates_are_sealed_and_models_are_plain_where_that_is_chosen(tmp_path, store):
    parties = Parties(tmp_path, store, "updates")
    model, record = put(parties.coordinator), parties.coordinator.put_record({"lr": 0.1})
    np.testing.assert_array_equal(Vault(store).weights(model).tensor("head"), MODEL["head"])
    assert Vault(store).get_record(record) == {"lr": 0.1}
    for vault, private in ((parties.vaults["alpha"], False), (parties.coordinator, True)):
        cid = put(vault, private=private)
        assert is_sealed(next(iter(dag.cat(store, cid))))
        with pytest.raises(NotSealed, match="no keys here"):
            Vault(store).weights(cid)
    (leaf,) = {c for c in dag.walk(store, model) if SECRET.tobytes() in store.get(c)}
    assert leaf.codec == RAW


def test_models_of_one_participant_are_sealed_though_others_are_plain(tmp_path, store):
    parties = Parties(tmp_path, store, "updates")
    coordinator, sender = parties.coordinator, parties.keys[COORDINATOR].public
    vault = coordinator.sealing_all()
    assert vault is coordinator.sealing_all() is vault.sealing_all()
    kept = store_arrays(vault, from_numpy(MODEL))
    for cid in (kept.cid, vault.put_record({"lr": 0.1})):
        assert is_sealed(next(iter(dag.cat(store, cid))))
        with pytest.raises(NotSealed, match="no keys here"):
            Vault(store).leaves(cid)
    for name in (COORDINATOR, *NAMES):
        got = parties.vaults[name].weights(kept.cid, sender=sender).tensor("head")
        np.testing.assert_array_equal(got, MODEL["head"])
    assert store_arrays(coordinator, kept) is kept  # handed on as it is
    plain = store_arrays(coordinator, from_numpy(MODEL))
    assert store_arrays(vault, plain).cid != plain.cid  # but not the other way round


def test_what_is_made_of_a_sealed_model_is_sealed(tmp_path, store):
    """Also after a resume, when it is opened by its CID alone."""
    coordinator = Parties(tmp_path, store, "updates").coordinator
    for vault, sealed in ((coordinator.sealing_all(), True), (coordinator, False)):
        again = StoredArrays.open(coordinator, store_arrays(vault, from_numpy(MODEL)).cid)
        smaller = compress_model(again, Spec.parse("int8"))
        for each in (again, smaller, StoredArrays.open(coordinator, smaller.cid)):
            assert is_sealed(next(iter(dag.cat(store, each.cid)))) == sealed
            assert (each.vault is coordinator) == (not sealed)


@pytest.mark.parametrize("seal", ["none", "all"])
def test_otherwise_models_are_sealed_as_ever(tmp_path, store, seal):
    parties = Parties(tmp_path, store, seal)
    for vault in parties.vaults.values():
        assert vault.sealing_all() is vault


@pytest.mark.parametrize("seal", ["updates", "all"])
def test_equal_content_shares_no_block(tmp_path, store, seal):
    parties = Parties(tmp_path, store, seal)
    large = {"w": np.zeros(600_000, "f4")}
    seen: set[CID] = set()
    for vault in (parties.vaults["alpha"], parties.vaults["alpha"], parties.vaults["beta"]):
        found = set(dag.walk(store, put(vault, large)))
        assert not found & seen
        seen |= found


def test_two_federations_leave_no_equal_block(tmp_path):
    held = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        store = FolderStore(tmp_path / name / "store", durable=False)
        rounds(Parties(tmp_path / name, store))
        held.append(set(blocks(store)))
    assert not held[0] & held[1]


# ---- who can open what


def test_models_open_for_those_they_are_sealed_to_and_updates_for_the_coordinator(parties):
    model = put(parties.coordinator)
    update = put(parties.vaults["alpha"])
    sender = parties.keys["alpha"].public
    for name in (COORDINATOR, *NAMES):
        values = parties.vaults[name].weights(model).tensor("head")
        np.testing.assert_array_equal(values, MODEL["head"])
    parties.coordinator.weights(update, sender=sender)
    for name in NAMES:  # its maker included
        with pytest.raises(NotRecipient, match=name):
            parties.vaults[name].weights(update)


def test_what_is_private_opens_for_its_owner_only(parties):
    for owner in (COORDINATOR, *NAMES):
        cid = parties.vaults[owner].put_bytes(b"mine")
        record = parties.vaults[owner].put_record({"mine": 1}, private=True)
        assert parties.vaults[owner].get_bytes(cid) == b"mine"
        assert parties.vaults[owner].get_record(record) == {"mine": 1}
        for other in {COORDINATOR, *NAMES} - {owner}:
            with pytest.raises(NotRecipient):
                parties.vaults[other].get_bytes(cid)
            with pytest.raises(NotRecipient):
                parties.vaults[other].get_record(record)


def test_a_sender_that_is_not_its_sealer_is_refused(parties):
    update = put(parties.vaults["alpha"])
    with pytest.raises(SignatureWrong, match="sealed by another than beta"):
        parties.coordinator.weights(update, sender=parties.keys["beta"].public)


def test_a_borrowed_sealing_key_makes_no_copy_ones_own(parties):
    """In a list without alpha, mallory gives alpha's sealing key as its own."""
    update, alpha = put(parties.vaults["alpha"]), parties.keys["alpha"].public
    posing = PublicIdentity("mallory", Identity.new("mallory").public.signing, alpha.sealing)
    listed = TrustList([Member(posing, "participant")])
    party = Party(parties.keys[COORDINATOR], "coordinator", listed)
    with pytest.raises(SignatureWrong, match="sealed by another than mallory"):
        Vault(parties.store, party, "all").weights(update, sender=posing)


@pytest.mark.parametrize(
    ("name", "seal", "refused"),
    [
        (COORDINATOR, "none", False),
        (COORDINATOR, "updates", True),
        (COORDINATOR, "all", True),
        ("alpha", "none", False),
        ("alpha", "updates", False),
        ("alpha", "all", True),
    ],
)
def test_plain_content_of_the_other_side_counts_where_it_may_be_plain(parties, name, seal, refused):
    vault, cid = parties.vault(name, seal=seal), put(Vault(parties.store))
    sender = parties.keys["beta" if name == COORDINATOR else COORDINATOR].public
    if refused:
        with pytest.raises(NotSealed, match=f"seal={seal}"):
            vault.weights(cid, sender=sender)
    else:
        vault.weights(cid, sender=sender)
    vault.weights(cid)  # one's own choice


def test_keys_are_needed_to_seal(store):
    with pytest.raises(ConfigError, match="seal=all needs keys"):
        Vault(store, None, "all")
    with pytest.raises(ConfigError, match="seal=some is not one of none, updates, all"):
        Vault(store, None, "some")


@pytest.mark.parametrize(
    ("seal", "shared", "because", "expected"),
    [
        (None, False, None, "none"),
        (None, True, None, "all"),
        (None, True, "the data are public", "all"),
        ("none", False, None, "none"),
        ("none", True, "the data are public", "none"),
        ("updates", True, None, "updates"),
        ("all", False, None, "all"),
    ],
)
def test_the_default_depends_on_who_reaches_the_store(seal, shared, because, expected):
    assert choose_seal(seal, shared=shared, because=because) == expected


@pytest.mark.parametrize("because", [None, "", "  "])
def test_nothing_sealed_in_a_shared_store_needs_a_reason(because):
    with pytest.raises(ConfigError, match="unsealed_because=") as caught:
        choose_seal("none", shared=True, because=because)
    assert "\n" not in str(caught.value)


# ---- sizes


def test_the_bound_on_bytes_is_that_of_the_content(parties):
    for size in (1, envelope.PLAIN - 1, envelope.PLAIN, envelope.PLAIN + 1, 2 * envelope.CHUNK):
        content = bytes(size)
        for vault in (parties.vault(COORDINATOR, seal="none"), parties.coordinator):
            cid = vault.put_bytes(content, private=False)
            leaves = parties.coordinator.leaves(cid, max_bytes=size)
            assert b"".join(map(leaves.leaf, range(len(leaves.sizes)))) == content
            with pytest.raises(WeightsError, match=f"{size - 1}"):
                parties.coordinator.leaves(cid, max_bytes=size - 1)


def test_too_large_an_envelope_is_refused_from_its_root_alone(parties):
    cid = parties.coordinator.put_bytes(bytes(4 << 20), private=False)
    before = parties.store.counters.copy()
    with pytest.raises(WeightsError, match="at most"):
        parties.coordinator.leaves(cid, max_bytes=1000)
    assert parties.store.counters.get_blocks - before.get_blocks == 1


def test_an_empty_file_can_be_sealed(parties):
    cid = parties.coordinator.put_bytes(b"")
    assert parties.coordinator.get_bytes(cid) == b""
    assert parties.coordinator.get_bytes(Vault(parties.store).put_bytes(b"")) == b""


# ---- damage


PIECES = [3 * envelope.CHUNK + 77, 2 * envelope.PLAIN, 1000]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A vault, files of some sizes, and per file its leaves as stored."""
    folder = tmp_path_factory.mktemp("sealed")
    parties = Parties(folder, FolderStore(folder / "store", durable=False))
    rng, files = np.random.default_rng(0), []
    for size in PIECES:
        content = rng.bytes(size)
        cid = parties.coordinator.put_bytes(content, private=False)
        files.append((content, list(dag.cat(parties.store, cid))))
    return parties, files


def _corruptions(files):
    """Leaves of a file after one or two changes, made of valid pieces and of bytes."""
    every = [leaf for _, leaves in files for leaf in leaves] + [b"x", bytes(envelope.CHUNK)]

    @st.composite
    def corrupted(draw):
        leaves = list(draw(st.sampled_from(files))[1])
        for _ in range(draw(st.integers(1, 2))):
            at = draw(st.integers(0, len(leaves) - 1))
            match draw(st.sampled_from(["swap", "drop", "cut", "flip", "order", "add", "empty"])):
                case "swap":
                    leaves[at] = draw(st.sampled_from(every))
                case "drop" if len(leaves) > 1:
                    del leaves[at]
                case "cut":
                    leaves[at] = leaves[at][: draw(st.integers(0, len(leaves[at])))]
                case "flip":
                    if leaves[at]:
                        where = draw(st.integers(0, len(leaves[at]) - 1))
                        changed = bytearray(leaves[at])
                        changed[where] ^= 1 << draw(st.integers(0, 7))
                        leaves[at] = bytes(changed)
                case "order":
                    leaves = draw(st.permutations(leaves))
                case "add":
                    leaves.insert(at, draw(st.sampled_from(every)))
                case "empty":
                    leaves.insert(at, b"")
        return leaves

    return corrupted()


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_envelope_never_gives_other_content(sealed, data):
    parties, files = sealed
    leaves = data.draw(_corruptions(files))
    cid = dag.add(parties.store, leaves)
    sender = parties.keys[COORDINATOR].public
    contents = [content for content, _ in files]
    try:
        opened = parties.vaults["alpha"].leaves(cid, sender=sender)
        got = b"".join(map(opened.leaf, range(len(opened.sizes))))
    except (EnvelopeError, SignatureWrong):  # the latter for another sender in the header
        return
    # Two changes may undo each other, or make another of the files whole.
    assert got in contents
    assert [leaf for leaf in leaves if leaf] in [stored for _, stored in files]


@pytest.mark.parametrize("other", [b"x", b"x" * 100, None])
def test_a_link_to_another_block_is_refused(parties, other):
    """The node's sizes are right, but one of its links leads elsewhere."""
    cid = parties.coordinator.put_bytes(bytes(3 << 20), private=False)
    leaves = list(dag.cat(parties.store, cid))
    elsewhere = parties.store.put(leaves[2] if other is None else other)

    def put(block, codec):
        real = parties.store.put(block, codec)
        return elsewhere if bytes(block) == leaves[1] else real

    opened = parties.coordinator.leaves(unixfs.build(leaves, put))
    error = EnvelopeTampered if other is None else WeightsError
    with pytest.raises(error, match=r"chunk 0 was changed|its parent says"):
        opened.leaf(0)
    assert opened.leaf(1) == bytes(envelope.PLAIN)


def test_a_damaged_block_is_named_before_it_is_opened(parties):
    cid = parties.coordinator.put_bytes(bytes(3 << 20), private=False)
    leaf = list(dag.walk(parties.store, cid))[2]
    (path,) = (parties.store.path / "blocks").rglob(f"*{str(leaf)[1:]}*")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    opened = parties.coordinator.leaves(cid)
    with pytest.raises(BlockCorrupt, match=str(leaf)):
        opened.leaf(0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda leaves: leaves[:1], EnvelopeTruncated),
        (lambda leaves: leaves[:-1], EnvelopeTruncated),
        (lambda leaves: [leaves[0][:-1], *leaves[1:]], EnvelopeTruncated),
        (lambda leaves: [leaves[0] + b"?", *leaves[1:]], EnvelopeTampered),
        (lambda leaves: [*leaves, b"?"], EnvelopeError),
        (lambda leaves: [leaves[0], leaves[2], leaves[1], *leaves[3:]], EnvelopeTampered),
        (lambda leaves: [leaves[0].replace(b"\0\1", b"\0\7", 1), *leaves[1:]], EnvelopeVersion),
        (lambda leaves: leaves[1:], NotSealed),
    ],
)
def test_each_damage_has_its_name(parties, change, error):
    cid = parties.coordinator.put_bytes(bytes(range(256)) * 9000, private=False)
    damaged = dag.add(parties.store, change(list(dag.cat(parties.store, cid))))
    sender = parties.keys[COORDINATOR].public
    with pytest.raises(error):
        opened = parties.vaults["alpha"].leaves(damaged, sender=sender)
        [opened.leaf(index) for index in range(len(opened.sizes))]


def test_the_leaves_of_a_sealed_file_open_alone_in_any_order(parties):
    content = np.random.default_rng(1).bytes(3 * envelope.CHUNK)
    cid = parties.coordinator.put_bytes(content, private=False)
    opened = parties.vaults["beta"].leaves(cid)
    order = [3, 0, 2, 1]
    got = {index: opened.leaf(index) for index in order}
    assert b"".join(got[index] for index in sorted(got)) == content
    head = next(iter(dag.cat(parties.store, cid)))
    assert Opener(head, parties.keys["beta"]).sender == parties.keys[COORDINATOR].public.sender_id


def test_the_keys_that_the_environment_names(tmp_path, monkeypatch):
    closed, plain, trust = (tmp_path / name for name in ("closed.key", "plain.key", "trust.toml"))
    Identity.new("locked").save(closed, b"correct horse")
    Identity.new("open").save(plain)
    TrustList([Member(Identity.new("acme").public, "coordinator")]).save(trust)
    monkeypatch.setattr(default, "_chosen", [])  # by tests before
    monkeypatch.setenv("FEDIPFS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("FEDIPFS_SEAL", "all")
    monkeypatch.setenv("FEDIPFS_TRUST", str(trust))
    monkeypatch.setenv("FEDIPFS_IDENTITY", str(closed))
    monkeypatch.delenv("FEDIPFS_PASSPHRASE", raising=False)
    with pytest.raises(KeyFileError, match="is encrypted: set FEDIPFS_PASSPHRASE"):
        default_vault("participant")
    monkeypatch.setenv("FEDIPFS_PASSPHRASE", "correct horse")
    assert default_vault("participant").party.name == "locked"
    monkeypatch.setenv("FEDIPFS_IDENTITY", str(plain))
    assert default_vault("participant").party.name == "open"  # it needs no passphrase


# ---- a limit of what is read


@pytest.mark.parametrize("seal", ["none", "all"])
def test_files_beyond_a_vaults_limit_are_not_read(tmp_path, store, seal):
    parties = Parties(tmp_path, store, seal)
    small, large = np.zeros(100, "f4"), np.zeros(100_000, "f4")
    cids = [put(parties.coordinator, {"w": values}) for values in (small, large)]
    full = parties.vaults["alpha"]
    limited = Vault(full.store, full.party, full.seal, limit=100_000)
    for vault in (limited, limited.only_for(COORDINATOR), limited.sealing_all()):
        assert len(vault.weights(cids[0]).tensor("w")) == 100
        with pytest.raises(WeightsError, match="bytes"):
            vault.weights(cids[1])
        with pytest.raises(WeightsError, match="bytes"):
            vault.leaves(cids[1], max_bytes=10**9)
    assert len(full.weights(cids[1]).tensor("w")) == 100_000


class Ahead(FolderStore):
    """A store that notes what it is asked to fetch."""

    fetched: list[CID]

    def fetch(self, root: CID) -> None:
        self.fetched.append(root)


def test_leaves_that_may_be_larger_than_they_say_are_not_fetched_ahead(tmp_path):
    store = Ahead(tmp_path, durable=False)
    store.fetched = []
    leaves = [bytes([number]) * 1000 for number in range(40)]
    scattered = unixfs.build(leaves, store.put)
    whole = unixfs.build([b"".join(leaves)], store.put)
    limited = Vault(store, limit=1_000_000)
    for cid in (scattered, whole):
        limited.fetch(cid)
    assert store.fetched == [whole]
    Vault(store).fetch(scattered)
    assert store.fetched == [whole, scattered]
    assert b"".join(map(limited.leaves(scattered).leaf, range(40))) == b"".join(leaves)
