"""The CPU image: podman builds it as docs/deploy.md says and starts it, without a network, for the tiny model. It
answers, passes its own health check, runs without root, and ends on a SIGTERM.
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif("VILAVT_IMAGE" not in os.environ, reason="builds an image of 4 GB: `nox -s image` runs it"),
    pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed"),
    pytest.mark.timeout(7200),
]
ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
IMAGE = "vilavt-serve:cpu-test"
BUILD_ARGS = shlex.split(os.environ.get("VILAVT_IMAGE_BUILD_ARGS", ""))
"""More for `podman build`: `--build-arg TORCH_INDEX=…` of a mirror, say."""
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ASKED = json.loads((EXAMPLES / "pictures" / "questions.json").read_text())[0]
START, STOP = 900, 140
"""Seconds: what HEALTHCHECK and docs/deploy.md give a server."""


def podman(*words: str, check: bool = True) -> str:
    """What a command of podman prints."""
    done = subprocess.run(["podman", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)  # stderr: pytest shows it
    assert not check or done.returncode == 0, f"podman {shlex.join(words)} ended with {done.returncode}"
    return done.stdout


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The name of the built image."""
    podman("build", "--format", "docker", "-f", "deploy/Containerfile.cpu", "-t", IMAGE, *BUILD_ARGS, ".")
    yield IMAGE
    podman("rmi", "--force", IMAGE)


@pytest.fixture(scope="module")
def container(image) -> Iterator[str]:
    """The id of a container in which the server has begun to answer."""
    options = ["--network", "none", "--shm-size", "2g", "--stop-timeout", str(STOP), "--health-interval", "disable"]
    for name, value in SMALL.items():
        options += ["--env", f"{name}={value}"]
    for folder, there in (("vilavt-tiny", "/model"), ("pictures", "/pictures")):
        options += ["--volume", f"{EXAMPLES / folder}:{there}:ro"]
    name = podman("run", "--detach", *options, image, "--dtype", "float32", "--enforce-eager").strip()
    try:
        end = time.monotonic() + START
        while not healthy(name):
            assert state(name)["Running"], f"the server ended:\n{logs(name)}"
            assert time.monotonic() < end, f"the server did not start within {START} s:\n{logs(name)}"
            time.sleep(1)
        yield name
    finally:
        podman("rm", "--force", "--time", "0", name)


def state(name: str) -> dict:
    return json.loads(podman("inspect", name))[0]["State"]


def logs(name: str) -> str:
    done = subprocess.run(["podman", "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout[-4000:]


def healthy(name: str) -> bool:
    """Whether the image's HEALTHCHECK passes."""
    return subprocess.run(["podman", "healthcheck", "run", name], stderr=subprocess.DEVNULL).returncode == 0


def test_the_server_answers_a_question(container):
    command = ("vilavt", "ask", "--model", "http://127.0.0.1:8000/v1", "--json")
    said = podman("exec", container, *command, "--image", f"/pictures/{ASKED['image']}", ASKED["question"])
    assert json.loads(said)["answer"] == ASKED["answer"]


def test_every_process_is_the_user_of_the_image(container):
    _, *users = podman("top", container, "user").split()
    assert len(users) > 2, "tini, the server and its engine"
    assert set(users) == {"vilavt"}
    assert podman("exec", container, "id", "-u").strip() == "10001"


def test_a_sigterm_ends_the_server_in_the_ordinary_way(container):
    podman("stop", container)  # SIGTERM, and SIGKILL after --stop-timeout
    ended = state(container)
    assert (ended["ExitCode"], ended["OOMKilled"]) == (0, False), logs(container)
