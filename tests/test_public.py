"""What the package promises: its public names."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fedipfs

PUBLIC = {
    "CID",
    "CidGrid",
    "FedAvg",
    "FedIPFSError",
    "FolderStore",
    "Task",
    "Weights",
    "__version__",
    "cid_mod",
    "load_model",
    "open_store",
    "use_store",
}


def test_the_public_names_are_exactly_these():
    assert set(fedipfs.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_is_there_and_documented(name):
    assert getattr(fedipfs, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = fedipfs.nothing


def test_importing_the_package_imports_nothing_that_is_slow():
    code = (
        "import sys, fedipfs; "
        "print([m for m in ('torch','flwr','numpy','hydra','sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
