"""deploy/: every file parses, every command in it is one that click knows, and the files agree with each other."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from swarm.state import states_of
from tests.helm_templates import Chart, parse
from tests.said_commands import ROOT, commands_of, fault

DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "swarmtune"
JOIN = "swarm1:" + "A" * 40
EXTRA = {
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "imagePullSecrets": [{"name": "pull"}],
}
VALUES: dict[str, dict[str, Any]] = {
    "plain": {"join": JOIN},
    "outside": {"join": JOIN, "hostPort": True, "options": ["--max-memory", "8GB", "--quantize", "int8"]},
    "secret": {"existingSecret": "theirs", "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}], **EXTRA},
}


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their words, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    """The [Service] section: a key may come several times."""
    found: dict[str, list[str]] = {}
    section = (DEPLOY / "swarmtune.service").read_text().split("[Service]")[1].split("[Install]")[0]
    for line in section.splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def rendered(values: dict[str, Any]) -> dict[str, Any]:
    chart = Chart(CHART, values)
    files = (path.name for path in (CHART / "templates").glob("*.yaml"))
    documents = (yaml.safe_load(chart.render(name)) for name in files)
    return {document["kind"]: document for document in documents if document}


def test_the_image_has_all_packages_and_ends_as_somebody_who_is_not_root(dockerfile: list[tuple[str, str]]) -> None:
    copied = {words.split()[0] for kind, words in dockerfile if kind == "COPY"}
    assert {"blocks/", "peers/", "averaging/", "swarm/"} <= copied
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for kind, words in dockerfile:
        if kind == "COPY" and not words.startswith("--from"):
            for source in words.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.rstrip("/") in allowed, f".dockerignore keeps {source} out"
    stages = [number for number, (kind, _) in enumerate(dockerfile) if kind == "FROM"]
    users = [words for kind, words in dockerfile[stages[-1] :] if kind == "USER"]
    assert users == ["10001:10001"]


def test_the_image_says_how_it_is(dockerfile: list[tuple[str, str]]) -> None:
    last = dict(dockerfile)
    assert json.loads(last["ENTRYPOINT"]) == ["swarm"]
    assert not fault(json.loads(last["CMD"]))
    check = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    compile(check[-1], "HEALTHCHECK", "exec")
    assert "SWARM_PORT=31330" in last["ENV"]
    assert last["EXPOSE"] == "31330"
    assert json.loads(last["VOLUME"]) == ["/state", "/runs"]


def test_both_kinds_of_torch_can_be_built(dockerfile: list[tuple[str, str]]) -> None:
    torch = next(words for kind, words in dockerfile if kind == "RUN" and "index" in words)
    assert "ARG DEVICE=cpu" in [" ".join(each) for each in dockerfile]
    for device in ("cpu", "cuda"):
        ran = subprocess.run(
            ["sh", "-c", f'pip() {{ echo pip "$@"; }}; DEVICE={device}; {torch}'],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("whl/cpu" in ran.stdout) == (device == "cpu"), ran.stdout
    assert subprocess.run(["sh", "-c", f"DEVICE=tpu; {torch}"], capture_output=True, check=False).returncode == 1


def test_three_peers_and_a_gateway_are_composed_of_known_commands(compose: dict[str, Any]) -> None:
    services = compose["services"]
    peers = {name: service for name, service in services.items() if str(service.get("command")).startswith("join ")}
    assert set(peers) == {"first", "second", "third"}
    for name, service in services.items():
        for words in _said(service):
            assert not fault(words), f"{name}: {fault(words)}"
        for volume in [*service["volumes"]]:
            assert volume.split(":")[0] in compose["volumes"], volume
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    for name, service in peers.items():
        assert f"--announce /dns4/{name}/tcp/31330" in service["command"], "others dial it by its service's name"
        assert "--port 31330" in service["command"], "the image's health check looks there"
    states = [volume for service in services.values() for volume in service["volumes"] if volume.endswith(":/state")]
    assert len(set(states)) == len(states) - 1, "a state belongs to one peer; only `init` shares that of the first"
    assert not [words for words in _said(services["init"]) if words[0] != "init"]


def _said(service: dict[str, Any]) -> list[list[str]]:
    command = service["command"]
    if isinstance(command, str):
        return [shlex.split(command)]
    return [words for line in command for words in commands_of(line.replace("$$", "$"))]


def test_what_waits_for_another_service_waits_for_one_that_is_there(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert name in services
            assert condition["condition"] in ("service_healthy", "service_completed_successfully")


def test_the_unit_starts_a_known_command_with_its_state_where_it_may_write(unit: dict[str, list[str]]) -> None:
    settings = configparser.ConfigParser()
    settings.read_string("[conf]\n" + (DEPLOY / "swarmtune.conf").read_text())
    options = settings["conf"]["swarm_options"]
    line = unit["ExecStart"][0].replace("${SWARM_JOIN}", JOIN).replace("$SWARM_OPTIONS", options)
    program, *words = shlex.split(line)
    assert program.endswith("/bin/swarm")
    assert not fault(words), fault(words)
    state = Path(words[words.index("--state") + 1])
    assert state.parent == Path("/var/lib") / unit["StateDirectory"][0]
    environment = dict(word.split("=", 1) for word in unit["Environment"][0].split())
    assert environment["XDG_DATA_HOME"] == "/var/lib"  # so that `swarm id` finds the same machine
    assert environment["HF_HOME"].startswith("/var/cache/" + unit["CacheDirectory"][0])
    assert "143" in unit["SuccessExitStatus"]  # what `swarm` ends with after SIGTERM


def test_the_unit_is_hardened_and_leaves_what_a_peer_needs(unit: dict[str, list[str]]) -> None:
    for key in ("NoNewPrivileges", "DynamicUser", "PrivateTmp", "PrivateDevices", "ProtectHome", "LockPersonality"):
        assert unit[key] == ["yes"], key
    assert unit["CapabilityBoundingSet"] == [""]
    assert "AF_NETLINK" in unit["RestrictAddressFamilies"][0], "p2pd asks for this machine's addresses"
    assert "ProcSubset" not in unit, "free memory is read in /proc/meminfo"
    assert "MemoryDenyWriteExecute" not in unit, "torch compiles kernels at run time"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize(
    "words", [["verify"], ["security", "--offline=yes", "--threshold=20"]], ids=lambda words: words[0]
)
def test_systemd_has_nothing_against_the_unit(words: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "swarmtune.service"
    text = (DEPLOY / "swarmtune.service").read_text()
    copy.write_text(text.replace("/opt/swarmtune/bin/swarm", sys.executable))  # it wants to see the program
    ran = subprocess.run(
        ["systemd-analyze", "--no-pager", *words, str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout[-500:] + ran.stderr
    assert words[0] != "verify" or not ran.stderr, ran.stderr


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_renders_to_kubernetes_objects(name: str) -> None:
    found = rendered(VALUES[name])
    assert set(found) == {"StatefulSet", "Service"} | ({"Secret"} if name != "secret" else set())
    for document in found.values():
        assert {"apiVersion", "kind", "metadata"} <= set(document)
        assert document["metadata"]["name"] == "lab-swarmtune"
    stateful, service = found["StatefulSet"]["spec"], found["Service"]["spec"]
    labels = stateful["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert stateful["selector"]["matchLabels"].items() <= labels.items()
    assert stateful["serviceName"] == found["Service"]["metadata"]["name"]
    assert service["clusterIP"] == "None"
    pod = stateful["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claims = {claim["metadata"]["name"] for claim in stateful["volumeClaimTemplates"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert set(mounts) == set(volumes) | claims
    secret = found["Secret"]["metadata"]["name"] if "Secret" in found else "theirs"
    assert volumes["join"]["secret"]["secretName"] == secret


@pytest.mark.parametrize("name", VALUES)
def test_the_pods_run_a_known_command_as_the_image_expects_it(name: str, dockerfile: list[tuple[str, str]]) -> None:
    pod = rendered(VALUES[name])["StatefulSet"]["spec"]["template"]["spec"]
    peer = pod["containers"][0]
    words = peer["args"]
    assert all(isinstance(word, str) for word in words)
    assert not fault(words), fault(words)
    mounts = {mount["mountPath"] for mount in peer["volumeMounts"]}
    assert {str(Path(words[1]).parent), str(Path(words[words.index("--state") + 1]).parent)} <= mounts
    port = peer["ports"][0]
    assert int(words[words.index("--port") + 1]) == port["containerPort"]
    assert ("hostPort" in port) == (name == "outside")
    announced = words[words.index("--announce") + 1]
    assert announced.startswith(
        "/ip4/$(NODE_ADDRESS)/tcp/" if name == "outside" else "/dns4/$(POD_NAME).lab-swarmtune."
    )
    known = {each["name"] for each in peer["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(words))) <= known
    user = next(words for kind, words in reversed(dockerfile) if kind == "USER").split(":")[0]
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert peer["securityContext"]["readOnlyRootFilesystem"] is True
    if name == "secret":
        assert pod["nodeSelector"] == EXTRA["nodeSelector"]
        assert pod["tolerations"] == EXTRA["tolerations"]
        assert "HTTPS_PROXY" in known


def test_the_chart_asks_for_a_join_string() -> None:
    with pytest.raises(ValueError, match="give the run's join string"):
        rendered({})


def test_the_values_fit_their_schema() -> None:
    """Helm checks the whole of it; here, that neither has what the other does not know."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    for name in ("image", "persistence"):
        assert set(values[name]) == set(schema["properties"][name]["properties"])
    kinds = {"integer": int, "string": str, "array": list, "object": dict, "boolean": bool}
    for name, value in values.items():
        assert isinstance(value, kinds[schema["properties"][name]["type"]]), name
    assert re.search(schema["properties"]["join"]["pattern"], JOIN)
    assert not re.search(schema["properties"]["join"]["pattern"], "a typo")


def test_the_notes_name_the_objects_and_a_known_command() -> None:
    notes = Chart(CHART, {"join": JOIN}).render("NOTES.txt")
    assert "statefulset/lab-swarmtune" in notes
    assert "{{" not in notes
    said = re.findall(r"-- swarm (.*)", notes)
    assert said
    assert not [fault(shlex.split(words)) for words in said if fault(shlex.split(words))]


def test_the_renderer_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="has no end"):
        parse("{{ if .Values.x }}")
    with pytest.raises(ValueError, match="not understood"):
        parse("{{ if .a }}{{ else if .b }}{{ end }}")
    with pytest.raises(ValueError, match="no values"):
        Chart(CHART, {"replica": 1})


def test_pausing_finds_no_peer_of_the_service_by_chance(tmp_path: Path) -> None:
    """The unit's state is beside the usual places, so that `swarm pause` without a name leaves a service alone."""
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "identity").touch()
    assert not states_of(tmp_path)
