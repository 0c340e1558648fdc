"""docs/deploy: every file is what its reader takes it for, and names nothing that there is not."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import yaml

ROOT = Path(__file__).parents[1]
KITS = ROOT / "docs" / "deploy"
PAGE = (KITS / "README.md").read_text(encoding="utf-8")
UNITS = sorted((KITS / "systemd").glob("*.service"))
COMPOSE = sorted((KITS / "docker").glob("compose.*.yaml"))
DOCKERFILES = sorted(
    each for each in (KITS / "docker").glob("Dockerfile.*") if each.suffix != ".dockerignore"
)
MANIFESTS = sorted((KITS / "kubernetes").glob("*.yaml"))
EXPOSURE = 2.0  # of 10, by systemd-analyze security
KUBERNETES = ("1.30", "1.37")


def names(path: Path) -> str:
    return path.name


def program(name: str, why: str) -> str:
    """A program beside this Python or on the path; else the test is left out, and says so."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {why}")
    return found


def run(*command: object, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, **more
    )


# ---- what is named is there


@cache
def group(name: str) -> click.Group:
    """The commands of `fedipfs`, `fedipfs-server` or `fedipfs-client`."""
    places = {
        "fedipfs": "fedipfs.cli",
        "fedipfs-server": "fedipfs.server.commands",
        "fedipfs-client": "fedipfs.clients.__main__",
    }
    module = importlib.import_module(places[name])
    groups = [each for each in vars(module).values() if isinstance(each, click.Group)]
    assert len(groups) == 1, f"{module.__name__} has {len(groups)} groups of commands"
    return groups[0]


def check_command(words: list[str], where: str) -> None:
    """The command and the options that `words` name must be there."""
    found: click.Command = group(words[0])
    rest = words[1:]
    while isinstance(found, click.Group) and rest:
        assert rest[0] in found.commands, f"{where}: {' '.join(words)}: no command {rest[0]}"
        found, rest = found.commands[rest[0]], rest[1:]
    known = {opt for each in found.params for opt in (*each.opts, *each.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert option in known, f"{where}: {' '.join(words)}: no option {option}"


_NAMED = re.compile(r"\b(fedipfs(?:-server|-client)?) +([a-z][^#`|;,)&'\"\\\n]*)")
_IN_COMPOSE = re.compile(r"-f (compose\.\S+) run --rm (\w+) ([^#`|;\n]+)")


def named_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line in the kits, with the file it is in."""
    for path in sorted(KITS.rglob("*")):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        if path == KITS / "README.md":  # code only: prose has the same words
            text = "\n".join(re.findall(r"```[a-z]*\n.*?```|`[^`\n]+`", text, re.S))
        for match in _NAMED.finditer(text):
            yield path.name, [match[1], *match[2].split()]
        for file, service, words in _IN_COMPOSE.findall(text):
            if program_ := entry_point(services(file)[service]["image"]):
                yield path.name, [program_, *words.split()]
    for path in COMPOSE:
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            if program_ := entry_point(service["image"]):
                yield f"{path.name}: {name}", [program_, *service.get("command", ["up"])]
    for path, pod in pods():
        for container in pod["containers"]:
            if program_ := entry_point(container["image"]):
                yield f"{path.name}: {container['name']}", [program_, *container["args"]]
    for path in DOCKERFILES:
        found = dict(instructions(path))
        words = [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]
        yield path.name, words


def entry_point(image: str) -> str | None:
    """The program that one of our images runs."""
    return {"fedipfs-coordinator": "fedipfs-server", "fedipfs-site": "fedipfs-client"}.get(
        image.partition(":")[0]
    )


def test_every_command_and_option_that_is_named_exists():
    found = list(named_commands())
    said = {" ".join(words[:2]) for _, words in found}
    assert said >= {
        *(f"fedipfs-server {word}" for word in ("init", "up", "admit", "members", "renew")),
        *(f"fedipfs-client {word}" for word in ("init", "join", "check", "run", "worker", "node")),
        *("fedipfs privacy", "fedipfs store", "fedipfs keys", "fedipfs doctor"),
    }
    for where, words in found:
        check_command(words, where)


def test_every_run_that_is_shown_can_be_composed():
    from fedipfs.cli.doctor import composed

    runs = [
        shlex.split(match[1])
        for path in (*COMPOSE, KITS / "README.md")
        for match in re.finditer(r"python -m fedipfs\.server (\+[^#`\n]+)", path.read_text())
    ]
    assert len(runs) >= 3
    for words in runs:
        assert composed(words)["engine"]["name"] == "deploy"


def test_the_programs_are_installed_by_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    started = {
        name
        for path in (KITS / "systemd").iterdir()
        for name in re.findall(r"/opt/fedipfs/bin/([\w-]+)", path.read_text())
    }
    started |= {json.loads(dict(instructions(each))["ENTRYPOINT"])[0] for each in DOCKERFILES}
    assert started == {"fedipfs-server", "fedipfs-client"} <= scripts.keys()


def test_the_page_names_every_file_and_its_links_lead_somewhere():
    for path in KITS.rglob("*"):
        if path.is_file() and not path.name.endswith((".dockerignore", ".gitignore", "README.md")):
            assert path.name in PAGE, f"README.md does not say what {path.name} is"
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert link.startswith("https://") or (KITS / link).exists(), link
    heads = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads_of(PAGE)}
    assert {*re.findall(r"\]\(#([^)]+)\)", PAGE)} <= heads


def heads_of(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", text, re.M)


# ---- systemd


_PLAIN = "[Unit]\nDefaultDependencies=no\n"
_AROUND = {  # what units of the system need around them
    **{f"{each}.target": _PLAIN for each in ("basic", "sysinit", "shutdown", "multi-user")},
    **{each: _PLAIN for each in ("network-online.target", "system.slice", "-.slice")},
    "-.mount": "[Mount]\nWhat=none\nWhere=/\n",
    "tmp.mount": "[Mount]\nWhat=tmpfs\nWhere=/tmp\n",
    "systemd-journald.socket": "[Socket]\nListenStream=/run/journal\n",
    "systemd-journald.service": "[Service]\nExecStart=/bin/sh\n",
}


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A root folder with these units, what they start, and the targets that they name."""
    with tempfile.TemporaryDirectory(prefix="fedipfs-units-") as folder:
        top = Path(folder)
        units = top / "etc/systemd/system"
        drop_in = units / "fedipfs-worker.service.d"
        drop_in.mkdir(parents=True)
        for unit in UNITS:
            shutil.copy(unit, units)
        shutil.copy(KITS / "systemd/passphrase.conf", drop_in)
        for name, text in _AROUND.items():
            (units / name).write_text(text)
        for unit in (*UNITS, KITS / "systemd/passphrase.conf"):
            for path in re.findall(r"^ExecStart=(/\S+)", unit.read_text(), re.M):
                target = top / path.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("#!/bin/sh\n")
                target.chmod(0o755)
        yield top


@pytest.mark.parametrize("unit", UNITS, ids=names)
def test_systemd_finds_nothing_wrong_with_a_unit(root, unit):
    analyze = program("systemd-analyze", "units are not verified")
    found = run(analyze, "verify", "--man=no", f"--root={root}", unit.name, cwd=root)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_systemd_would_find_a_word_that_it_does_not_know(root, tmp_path):
    analyze = program("systemd-analyze", "units are not verified")
    shutil.copytree(root, tmp_path / "root")
    unit = tmp_path / "root/etc/systemd/system/fedipfs-worker.service"
    unit.write_text(unit.read_text().replace("IPAddressDeny=", "IPAddressesDeny="))
    found = run(analyze, "verify", "--man=no", f"--root={tmp_path / 'root'}", unit.name)
    assert "IPAddressesDeny" in found.stderr


@pytest.mark.parametrize("unit", UNITS, ids=names)
def test_a_unit_exposes_little(root, unit):
    analyze = program("systemd-analyze", "units are not rated")
    command = (analyze, "security", "--offline=true", "--no-pager", f"--root={root}", unit.name)
    found = run(*command)
    rated = re.search(r"Overall exposure level for \S+: ([0-9.]+)", found.stdout)
    assert rated, found.stderr
    assert float(rated[1]) <= EXPOSURE


def settings(unit: str) -> dict[str, list[str]]:
    """A unit's settings, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in (KITS / "systemd" / unit).read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_only_the_worker_may_read_the_data_and_it_reaches_this_machine_alone():
    worker, node = settings("fedipfs-worker.service"), settings("fedipfs-node.service")
    assert worker["IPAddressDeny"] == ["any"] and worker["IPAddressAllow"] == ["localhost"]
    assert worker["User"] != node["User"] and worker["SupplementaryGroups"] == node["Group"]
    assert node["InaccessiblePaths"] == ["-/srv/fedipfs-data"]
    assert "fedipfs-worker" not in " ".join(node["Group"] + node.get("SupplementaryGroups", []))
    assert "-o root -g fedipfs-worker -m 0750 /srv/fedipfs-data" in PAGE
    assert "MemoryDenyWriteExecute" in node and "MemoryDenyWriteExecute" not in worker


def test_the_users_are_made_as_the_units_want_them(tmp_path):
    sysusers = program("systemd-sysusers", "users are not made")
    (tmp_path / "etc").mkdir()
    made = run(sysusers, f"--root={tmp_path}", KITS / "systemd/fedipfs.sysusers.conf")
    assert made.returncode == 0, made.stderr
    users = {line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    groups = dict(line.split(":")[::3] for line in (tmp_path / "etc/group").read_text().split())
    for unit in UNITS:
        found = settings(unit.name)
        assert found["User"][0] in users and found["Group"][0] in groups
    assert groups["fedipfs-node"] == "fedipfs-worker"


def test_the_drop_in_hands_the_passphrase_over(tmp_path):
    (command,) = re.findall(
        r"^ExecStart=/bin/sh -c '(.+)'$", (KITS / "systemd/passphrase.conf").read_text(), re.M
    )
    (tmp_path / "passphrase").write_text("a word or $two\n")
    script, started = command.replace("$$", "$").rsplit("exec ", 1)
    assert started in settings("fedipfs-worker.service")["ExecStart"]
    shown = run(
        *("/bin/sh", "-c", script + "exec printenv FEDIPFS_PASSPHRASE"),
        env={"CREDENTIALS_DIRECTORY": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert shown.stdout == "a word or $two\n"


# ---- Docker


def instructions(path: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=names)
def test_hadolint_finds_nothing_wrong(path):
    found = run(program("hadolint", "Dockerfiles are not linted"), path)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=names)
def test_an_image_copies_what_is_there_and_runs_as_nobody_in_particular(path):
    found = instructions(path)
    copied = [
        word
        for name, rest in found
        if name == "COPY" and "--from=" not in rest
        for word in rest.split()[:-1]
    ]
    ignored = path.with_name(f"{path.name}.dockerignore").read_text().split("\n")
    assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert all((ROOT / word).exists() for word in copied)
    last = dict(found)
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last["USER"])
    assert "HEALTHCHECK" in last
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (version,) = {rest.split(":")[1].split("-")[0] for name, rest in found if name == "FROM"}
    assert wanted == f">={version}"
    assert "-c constraints.txt" in path.read_text()


def test_the_sites_health_check_tells_a_worker_that_listens_from_none():
    (command,) = re.findall(
        r"CMD (\[\"python\", \"-c\".*\])", (KITS / "docker/Dockerfile.site").read_text()
    )
    words = [sys.executable, *json.loads(command)[1:]]
    (manifest,) = [pod for path, pod in pods() if path.name == "site.yaml"]
    probe = manifest["containers"][0]["livenessProbe"]["exec"]["command"]
    assert probe[1:] == words[1:]
    with tempfile.TemporaryDirectory() as folder:
        assert run(*words, env={"FEDIPFS_HOME": folder}).returncode != 0
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/worker.sock")
            listener.listen()
            assert run(*words, env={"FEDIPFS_HOME": folder}).returncode == 0


@pytest.mark.parametrize("path", COMPOSE, ids=names)
def test_a_compose_file_is_as_its_specification_says(path):
    pytest.importorskip("check_jsonschema", reason="compose files are not checked")
    schema = ("--builtin-schema", "vendor.compose-spec")
    found = run(sys.executable, "-m", "check_jsonschema", *schema, path)
    assert found.returncode == 0, found.stdout
    broken = path.read_text().replace("read_only: true", "readonly: true", 1)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(broken)
        file.flush()
        assert run(sys.executable, "-m", "check_jsonschema", *schema, file.name).returncode == 1


@pytest.mark.parametrize("path", COMPOSE, ids=names)
def test_docker_compose_reads_a_compose_file(path):
    command = ["docker", "compose"]
    if not shutil.which("docker") or run(*command, "version").returncode != 0:
        command = [program("docker-compose", "compose files are not read by docker compose")]
    found = run(*command, "-f", path, "config", "--quiet")
    assert (found.returncode, found.stdout) == (0, ""), found.stderr


def services(name: str) -> dict:
    return yaml.safe_load((KITS / "docker" / name).read_text())["services"]


@pytest.mark.parametrize("path", COMPOSE, ids=names)
def test_containers_are_confined(path):
    for name, service in services(path.name).items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name}: which version?"
        assert "privileged" not in service and "cap_add" not in service
        if name != "ipfs":
            assert service["network_mode"] == "service:ipfs"


def test_a_site_publishes_no_port_and_only_its_worker_sees_the_data():
    site = services("compose.site.yaml")
    assert not any("ports" in each or "expose" in each for each in site.values())
    seen = {
        name: {each["target"]: each for each in service["volumes"] if isinstance(each, dict)}
        for name, service in site.items()
    }
    assert [name for name in seen if "/data" in seen[name]] == ["worker"]
    assert seen["worker"]["/data"]["read_only"] is True
    assert seen["node"]["/var/lib/fedipfs"]["read_only"] is True
    assert site["worker"]["user"].split(":")[0] != site["node"]["user"].split(":")[0]
    assert site["worker"]["group_add"] == [site["node"]["user"].split(":")[1]]


# ---- Kubernetes


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


def pods() -> Iterator[tuple[Path, dict]]:
    """The pods of all manifests."""
    for path in MANIFESTS:
        for each in documents(path):
            if each["kind"] == "StatefulSet":
                yield path, each["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=names)
def test_manifests_are_as_the_schemas_of_kubernetes_say(path, version):
    validator = pytest.importorskip("kubernetes_validate", reason="manifests are not validated")
    found = documents(path)
    assert len(found) > 3
    for each in found:
        validator.validate(each, version, strict=True)
    found[-1]["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(validator.ValidationError):
        validator.validate(found[-1], version, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=names)
def test_pods_keep_the_restricted_standard(path):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    found = documents(path)
    (namespace,) = [each["metadata"] for each in found if each["kind"] == "Namespace"]
    assert namespace["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    assert {each["metadata"].get("namespace") for each in found} == {None, namespace["name"]}
    (pod,) = [pod for other, pod in pods() if other == path]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for volume in pod["volumes"]:
        assert {*volume} - {"name"} <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
    for each in (*pod["containers"], *pod["initContainers"]):
        context = each["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]} and context["runAsUser"] > 0
        assert context["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("path", MANIFESTS, ids=names)
def test_what_a_manifest_refers_to_is_there(path):
    found = documents(path)
    (state,) = [each["spec"] for each in found if each["kind"] == "StatefulSet"]
    pod = state["template"]["spec"]
    volumes = {each["name"] for each in pod["volumes"]}
    volumes |= {each["metadata"]["name"] for each in state["volumeClaimTemplates"]}
    mounted = set()
    for each in (*pod["containers"], *pod["initContainers"]):
        mounted |= {mount["name"] for mount in each["volumeMounts"]}
    assert mounted == volumes
    assert state["selector"]["matchLabels"] == state["template"]["metadata"]["labels"]
    assert state["replicas"] == 1
    ports = {port["name"] for each in pod["containers"] for port in each.get("ports", ())}
    for service in (each["spec"] for each in found if each["kind"] == "Service"):
        assert service["selector"] == state["template"]["metadata"]["labels"]
        assert {port["targetPort"] for port in service["ports"]} <= ports
    for each in pod["volumes"]:
        if "secret" in each:
            (secret,) = each["secret"].values()
            assert f"create secret generic {secret} " in PAGE
        if "persistentVolumeClaim" in each:
            assert each["persistentVolumeClaim"]["claimName"] in PAGE


def test_the_secrets_of_a_site_hold_what_its_containers_copy():
    (pod,) = [pod for path, pod in pods() if path.name == "site.yaml"]
    for container, secret in zip(
        pod["initContainers"], ("fedipfs-worker", "fedipfs-node"), strict=True
    ):
        (copied,) = re.findall(r"for name in ([^;]+);", container["args"][0])
        command = PAGE[PAGE.index(f"create secret generic {secret} ") :].split("\nkubectl")[0]
        given = re.findall(r"--from-file=(\S+)", command)
        assert copied.split() == given
        assert ("identity.key" in given) == (secret == "fedipfs-worker")


def policy(name: str) -> dict:
    (found,) = [
        each["spec"]
        for each in documents(KITS / "kubernetes" / name)
        if each["kind"] == "NetworkPolicy"
    ]
    return found


def test_nothing_dials_a_site_and_it_dials_the_coordinators_two_ports():
    assert not [
        each for each in documents(KITS / "kubernetes/site.yaml") if each["kind"] == "Service"
    ]
    site, coordinator = policy("site.yaml"), policy("coordinator.yaml")
    for each in (site, coordinator):
        assert each["podSelector"] == {} and each["policyTypes"] == ["Ingress", "Egress"]
    assert site["ingress"] == [] and coordinator["egress"] == []
    dialled, names_ = ([port["port"] for port in rule["ports"]] for rule in site["egress"])
    assert dialled == [port["port"] for port in coordinator["ingress"][0]["ports"]] == [9092, 4001]
    assert names_ == [53, 53]
    published = services("compose.coordinator.yaml")["ipfs"]["ports"]
    assert {int(port.split(":")[0]) for port in published} == {*dialled}


@pytest.mark.parametrize("path", MANIFESTS, ids=names)
def test_a_manifest_has_the_very_script(path):
    (script,) = [each["data"] for each in documents(path) if each["kind"] == "ConfigMap"]
    assert script == {"federation.sh": (KITS / "kubo-init.sh").read_text()}


# ---- the IPFS node

STAND_IN = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
"""


def calls(folder: Path, **more: str) -> list[str]:
    """What kubo-init.sh calls `ipfs` with: a stand-in that writes it down."""
    bin_, called = folder / "bin", folder / "calls"
    bin_.mkdir()
    (bin_ / "ipfs").write_text(STAND_IN)
    (bin_ / "ipfs").chmod(0o755)
    given = {"PATH": f"{bin_}:/usr/bin:/bin", "CALLS": str(called), "IPFS_PATH": str(folder)}
    done = run("sh", KITS / "kubo-init.sh", env={**given, **more})
    assert (done.returncode, done.stderr) == (0, "")
    return called.read_text().splitlines()


def test_the_script_makes_the_settings_that_the_page_on_ipfs_explains(tmp_path):
    page = (ROOT / "docs/ipfs.md").read_text()
    block = page[page.index("### Configure it") :].split("```")[1]
    shown = [
        " ".join(shlex.split(line, comments=True)[1:])
        for line in block.splitlines()
        if line.startswith("ipfs ")
    ]
    assert len(shown) > 10
    found = calls(tmp_path, FEDIPFS_NODE="coordinator")
    assert sorted(found) == sorted(["init --empty-repo", *shown])
    assert found.index("config profile apply autoconf-off") < found.index("bootstrap rm --all")


def test_at_a_partner_the_node_listens_on_loopback_alone(tmp_path):
    (listens,) = [each for each in calls(tmp_path) if "Addresses.Swarm" in each]
    assert json.loads(listens.split("Addresses.Swarm ")[1]) == ["/ip4/127.0.0.1/tcp/4001"]


def test_a_repository_that_is_there_is_kept(tmp_path):
    (tmp_path / "config").touch()
    assert not [each for each in calls(tmp_path) if each.startswith("init")]


def test_a_real_kubo_takes_the_settings(tmp_path):
    ipfs = program("ipfs", "the script has not met a real Kubo")
    given = {"PATH": f"{Path(ipfs).parent}:/usr/bin:/bin", "IPFS_PATH": str(tmp_path)}
    for _ in range(2):  # again does no harm
        done = run("sh", KITS / "kubo-init.sh", env={**given, "HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "config").read_text())
    assert config["Addresses"]["Swarm"] == ["/ip4/127.0.0.1/tcp/4001"]
    assert config["Addresses"]["API"] == "/ip4/127.0.0.1/tcp/5001"
    assert not config["Bootstrap"] and config["Routing"]["Type"] == "none"
