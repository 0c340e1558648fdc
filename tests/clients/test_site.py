"""A site's configuration: what is read, what is refused, and what the command line may change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedipfs.clients.__main__ import main
from fedipfs.clients.home import Home, alone
from fedipfs.clients.site import SiteFile
from fedipfs.errors import ConfigError, RunError
from fedipfs.store import open_store

TEMPLATE = Path(sys.modules["fedipfs.clients.site"].__file__).with_name("site.yaml.in")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDIPFS_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "site.yaml").write_text(TEMPLATE.read_text())
    return Home.default()


def change(home: Home, **values) -> None:
    found = yaml.safe_load(home.site.read_text())
    home.site.write_text(yaml.safe_dump({**found, **values}))


def test_what_init_writes_is_read(home):
    site = SiteFile.load()
    assert site.home == home and site.path == home.site
    assert (site.client.trainer, site.client.threads, site.client.timeout_s) == ("one", 1, 600)
    assert (site.node.poll_s, site.node.port, site.node.group) == (None, None, None)
    assert site.policy.tasks == ("fedipfs.tasks.vision:Mnist",)
    assert site.data.inputs == ("age", "bmi")
    assert not site.shared and site.seal is None


def test_paths_are_relative_to_the_file(home, tmp_path):
    other = tmp_path / "etc"
    other.mkdir()
    (other / "site.yaml").write_text(home.site.read_text())
    site = SiteFile.load(other / "site.yaml")
    assert site.store == {"kind": "folder", "path": str(other / "store")}
    assert site.data.train == (str(other / "data/*.csv"),)
    open_store(site.store)
    assert (other / "store").is_dir()
    kubo = {"address": "/ip4/127.0.0.1/tcp/5001", "credentials": "secret"}
    change(home, store={"kind": "cached", "path": "cache", "kubo": kubo})
    site = SiteFile.load()
    assert site.store["path"] == str(home.path / "cache") and site.shared
    assert site.store["kubo"]["credentials"] == str(home.path / "secret")
    change(home, store="folder:elsewhere")
    assert SiteFile.load().store["path"] == str(home.path / "elsewhere")


def test_words_of_the_command_line_come_last(home):
    words = ["client.trainer=ddp", "client.processes=2", "node.poll_s=0.1", "data.classes=[a,b]"]
    site = SiteFile.load(overrides=[*words, "policy.privacy.epsilon=2", "policy.privacy.delta=0.1"])
    assert (site.client.trainer, site.client.processes, site.node.poll_s) == ("ddp", 2, 0.1)
    assert site.data.classes == ("a", "b")
    assert site.policy.privacy == (2.0, 0.1)
    assert SiteFile.load(overrides=["client.device=null"]).client.device is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["client.trainr=ddp"], r"client\.trainr is not known; did you mean client\.trainer\?"),
        (["clent.trainer=ddp"], r"clent is not known; did you mean client\?"),
        (["client.trainer=dp"], "client.trainer='dp' is not one of one, ddp, fsdp"),
        (["client.trainer"], "should be section.key=value"),
        (["client.threads=0"], "client.threads=0 is not a whole number from 1"),
        (["client.threads=1.5"], "client.threads=1.5 is not a whole number"),
        (["client.timeout_s=null"], "client.timeout_s=None is not a number"),
        (["client.device=tpu"], "client.device='tpu' is not one of cpu, cuda, auto"),
        (["node.poll_s=0.01"], "node.poll_s=0.01 is not a number from 0.05 to 3"),
        (["node.poll_s=true"], "node.poll_s=True is not a number"),
        (["node.port=70000"], "node.port=70000 is not a whole number from 1 to 65535"),
        (["node.group=7"], "node.group=7 is not the name of a group"),
        (["store.kind=s3"], "store kind 's3' is unknown"),
        (["store=null"], "store is missing"),
        (["seal=most"], "seal='most' is not one of none, updates, all"),
        (["store.path.deep=1"], "store.path is 'store' in .*: it has no keys below"),
        (["client=fast"], "client is not a section"),
        (["data=null"], "the section data is missing"),
        (["policy.task=[a:B]"], r"policy\.task is not known; did you mean policy\.tasks\?"),
        (["policy.tasks=[tasks/scans.py:Scans]"], "'tasks/scans.py:Scans' is a file; install it"),
        (["a.b=[1"], r"a\.b=\[1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(home, words, said):
    with pytest.raises(ConfigError, match=said) as error:
        site = SiteFile.load(overrides=words)
        _ = site.data, site.policy
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("store: [", "line 1: not YAML"),
        ("store: {a\x00: 1}", "not YAML"),
        ("- a", "expected the sections store"),
        ("1: 2", "expected the sections store"),
        ("store: !!python/object/apply:os.system [ls]", "not YAML"),
        ("&a [*a]", "expected the sections|not YAML"),
    ],
)
def test_a_file_that_is_none_is_said_so(home, text, said):
    home.site.write_text(text)
    with pytest.raises(ConfigError, match=said):
        SiteFile.load()


def test_a_file_that_is_not_there_is_said_so(home):
    home.site.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*site\.yaml"):
        SiteFile.load()


def test_references_in_the_file_are_its_own_text(home):
    change(home, data={**yaml.safe_load(TEMPLATE.read_text())["data"], "filter": "a == '${b}'"})
    assert SiteFile.load(overrides=["node.port=9"]).data.filter is not None


def test_who_has_not_joined_is_told_how(home):
    with pytest.raises(ConfigError, match="has not joined a federation"):
        SiteFile.load().federation()


def test_a_lock_is_held_by_one(tmp_path):
    path = tmp_path / "new" / "lock"
    with alone(path, "it"), pytest.raises(RunError, match="it runs already"), alone(path, "it"):
        pass
    with alone(path, "it"):
        pass


# ---- the command


@pytest.mark.parametrize("command", ["run", "node", "worker"])
def test_who_has_not_joined_cannot_begin(home, command, capfd, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main([command]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("fedipfs-client: ")
    assert "has not joined" in said[0]


def test_home_and_config_may_be_given(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["node", "--home", str(tmp_path / "other")]) == 2
    assert f"{tmp_path / 'other' / 'site.yaml'}" in capsys.readouterr().err
    monkeypatch.delenv("FEDIPFS_HOME")
    assert main(["node", "--home", str(home.path), "--config", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml" in capsys.readouterr().err


def test_a_log_that_is_not_there_and_one_that_was_changed(home, capsys):
    from fedipfs.clients.activity import Activity

    assert main(["log"]) == 2
    capsys.readouterr()
    activity = Activity(home.activity)
    activity.note("started", organization="north")
    activity.note("trained", round=3, run="bafy", coordinator="hub")
    assert main(["log"]) == 0
    assert "trained round=3 run=bafy coordinator=hub" in capsys.readouterr().out
    # What a coordinator calls its run looks like no other field, or line.
    activity.note("failed", run="x coordinator=other\n#0", round=4)
    assert main(["log"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[-1].endswith('failed run="x coordinator=other #0" round=4')
    assert main(["log", "--verify"]) == 0
    assert "3 lines, all as they were written" in capsys.readouterr().out
    text = home.activity.read_text()
    home.activity.write_text(text.replace("round=3", "round=4"))
    assert main(["log", "--verify"]) != 0
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("fedipfs.clients", ("flwr", "numpy", "torch")),
        ("fedipfs.clients.__main__", ("flwr", "numpy", "torch")),
        ("fedipfs.clients.running", ("flwr", "numpy", "torch")),
        ("fedipfs.clients.stub", ("torch", "scipy", "sklearn", "datasets", "opacus")),
        ("fedipfs.clients.node", ("torch", "scipy", "sklearn", "datasets", "opacus")),
    ],
)
def test_what_a_process_does_not_load(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


def test_the_stub_of_a_node_loads_no_torch_with_the_sites_configuration(home):
    code = "import sys; from fedipfs.clients.site import SiteFile; import fedipfs.clients.node; "
    code += "SiteFile.load(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
