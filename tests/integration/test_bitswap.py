"""Models between two Kubo nodes, by bitswap, in a private swarm: what partners' nodes do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from daemon_fixtures import need
from kubo_node import KuboNode, available
from safetensors.numpy import load_file

from fedipfs import FolderStore, weights
from fedipfs.ipld import unixfs
from fedipfs.store import dag
from fedipfs.trust import Identity, new_swarm_key, open_stream, seal

pytestmark = pytest.mark.slow
PIECE = 1 << 16


@pytest.fixture
def model() -> dict[str, np.ndarray]:
    """Three tensors, one larger than a leaf, none of a whole number of leaves."""
    rng = np.random.default_rng(1)
    return {
        "conv.weight": rng.standard_normal((64, 3, 3, 3)).astype("f4"),
        "dense.weight": rng.standard_normal((701, 999)).astype("f4"),
        "dense.bias": rng.standard_normal(701).astype("f8"),
    }


def test_a_model_and_a_sealed_one_cross_with_the_cids_we_computed(
    model: dict[str, np.ndarray], store: FolderStore, tmp_path: Path
) -> None:
    need(available())
    coordinator, partner = Identity.new("coordinator"), Identity.new("partner")
    plain = weights.put(store, model)
    file = b"".join(dag.cat(store, plain))
    pieces = seal(unixfs.chunk(file), [partner.public], coordinator.public)
    sealed = dag.add(store, pieces)
    blocks = {cid: store.get(cid) for root in (plain, sealed) for cid in dag.walk(store, root)}
    key = new_swarm_key()
    with (
        KuboNode(tmp_path / "coordinator", swarm_key=key, blocks=blocks) as ours,
        KuboNode(tmp_path / "partner", swarm_key=key) as theirs,
    ):
        theirs.connect(ours.address())
        theirs.download(str(plain), tmp_path / "plain.safetensors")
        theirs.download(str(sealed), tmp_path / "sealed")

    got = load_file(tmp_path / "plain.safetensors")
    assert got.keys() == model.keys()
    for name, values in model.items():
        np.testing.assert_array_equal(got[name], values)
    with open(tmp_path / "sealed", "rb") as stream:
        opened = b"".join(open_stream(iter(lambda: stream.read(PIECE), b""), partner))
    assert opened == file
