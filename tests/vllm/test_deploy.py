"""What the files of deploy/ name is what this server has: its flags, routes, labels and times. That it exports every
metric that they name is in test_server.py, where a server runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import vllm
import yaml
from typer.main import get_command
from vllm.engine.arg_utils import EngineArgs

from vilavt_core.cli.doctor import doctor
from vilavt_core.protocol import FinishReason
from vilavt_core.sizing import Machine
from vilavt_vllm import compat, support

if problem := support.server_problem(vllm.__version__):
    pytest.skip(problem, allow_module_level=True)

from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ModuleNotFoundError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

from vilavt_vllm.server.command import parser, read_command_line
from vilavt_vllm.server.gate import CLOSING, OPEN, SAYING, STOPPING
from vilavt_vllm.server.options import VLLM_DEFAULTS, ServerOptions

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = {path.name: path.read_text() for path in DEPLOY.iterdir()}
PAGE = (ROOT / "docs" / "deploy.md").read_text()


def pod() -> dict:
    (found,) = (one for one in yaml.safe_load_all(FILES["kubernetes.yaml"]) if one["kind"] == "Deployment")
    return found["spec"]["template"]["spec"]["containers"][0]


def command_lines() -> dict[str, list[str]]:
    """What `vilavt-serve` is given, by where it is written."""
    unit = re.search(r"(?m)^ExecStart=\S+ (.*)$", FILES["vilavt-serve@.service"])[1]
    unit = unit.replace("%i", "8000").replace("${CHECKPOINT}", "/model").replace("$VILAVT_FLAGS", "")
    found = {"unit": shlex.split(unit)}
    for name in ("Containerfile", "Containerfile.cpu"):
        found[name] = json.loads(re.search(r"(?m)^ENTRYPOINT (.*)$", FILES[name])[1])[3:]
    found["pod"] = found["Containerfile"] + pod()["args"]
    for i, line in enumerate(re.findall(r"(?m)^(?:podman run|  -v) .*vilavt-serve(?::cpu)? (--.*)$", PAGE)):
        found[f"page {i}"] = found["Containerfile"] + shlex.split(line)
    return found


@pytest.mark.parametrize("where, words", command_lines().items(), ids=[*command_lines()])
def test_every_command_line_is_taken(where, words):
    line = read_command_line(words)
    assert line.checkpoint == "/model"
    args = compat.server_arguments(["--model", line.checkpoint, *line.rest], VLLM_DEFAULTS)
    assert args.port == 8000
    assert args.host == ("127.0.0.1" if where == "unit" else "0.0.0.0")
    assert args.shutdown_timeout == 120


def test_the_page_shows_how_both_images_are_started():
    assert sum(where.startswith("page") for where in command_lines()) == 2


def test_every_flag_that_the_page_names_exists():
    named = set(re.findall(r"`(--[a-z][a-z-]+[a-z])", PAGE))
    containers = {"--stop-timeout", "--build-arg"}
    ours = {word for action in parser()._actions for word in action.option_strings}
    vllms = set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)
    command = typer.Typer()
    command.command()(doctor)
    plan = {word for option in get_command(command).params for word in option.opts}
    assert named >= {"--shutdown-timeout", "--max-conversations", "--reserve"}
    assert named - containers - ours - vllms - plan == set()


def test_probes_ask_routes_that_exist_and_need_no_key():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "vilavt,vilavt_loop")
        server = build_app(compat.server_arguments(["--model", "none"], VLLM_DEFAULTS), ("generate",), None)
    routes = {route.path for route in server.routes}
    probes = {pod()[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    checks = set(re.findall(r"request\('GET', '(\S+)'\)", FILES["Containerfile"] + FILES["Containerfile.cpu"]))
    behind = set(re.findall(r"location = (\S+)", FILES["nginx.conf"]))
    assert probes | checks | behind == {"/health"}
    assert probes <= routes & set(OPEN)
    assert "/v1/chat/completions" in routes
    assert "location /v1/ {" in FILES["nginx.conf"]
    assert "/metrics" in OPEN


def test_a_server_is_gone_when_the_files_say_so():
    assert SAYING + STOPPING + CLOSING <= 10  # what grace periods add to --shutdown-timeout


def test_nginx_takes_what_the_server_takes():
    size = re.search(r"client_max_body_size (\d+)m;", FILES["nginx.conf"])[1]
    assert int(size) * 1024**2 == ServerOptions.max_body_bytes


def test_labels_in_rules_and_board_have_values_that_occur():
    text = FILES["alerts.yaml"] + FILES["grafana.json"]
    ends = {value for found in re.findall(r'finish=~?\\?"([\w|]+)', text) for value in found.split("|")}
    assert ends
    assert ends <= {*FinishReason, "aborted", "error", "refused"}
    assert set(re.findall(r'history=\\?"(\w+)', text + PAGE)) <= {"kept", "state", "rebuilt"}


def test_the_plan_assumes_the_share_of_memory_that_vllm_takes():
    assert Machine().utilization == EngineArgs.gpu_memory_utilization
