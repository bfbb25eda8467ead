"""How the toolkit learns our names: from a wheel, from an editable install, by the wrapper; and what others notice."""

import json
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

import vilavt_core

PACKAGE = Path(__file__).parents[2] / "vilavt_vlmeval"
NAMES = ["ViLaVT-7B", "ViLaVT-7B-vLLM", "ViLaVT-SFT-7B", "ViLaVT-Tiny"]
LIST = "import vlmeval.config as c; print(sorted(c.supported_VLM), end='')"
FILES = {
    "vlmeval/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {'Other': 1}\n",
    "vlmeval/vlm/__init__.py": "",
}
RUNNER = """
import sys
assert "torch" not in sys.modules, "the runner must choose a GPU before torch is imported"
from vlmeval.config import supported_VLM
print(__name__, sorted(supported_VLM), sys.argv[1:])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A bare environment with vilavt_core and none of its dependencies; `install(kind)` installs us into it, and
    `uninstall()`.
    """
    root = tmp_path_factory.mktemp("environment")
    venv.create(root / "env", with_pip=False)
    python = root / "env" / "bin" / "python"
    (root / "core").mkdir()
    (root / "core" / "vilavt_core").symlink_to(Path(vilavt_core.__file__).parent)

    class Site:
        packages = Path(
            subprocess.run(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )

        def pip(self, *arguments):
            command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
            # As `run` does: pip looks for compiled files where this environment says they are.
            clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
            subprocess.run([*command, *arguments], check=True, capture_output=True, env=clean)

        def install(self, kind):
            out = root / kind
            out.mkdir()
            build = f"from hatchling.build import build_{kind}; build_{kind}({str(out)!r})"
            subprocess.run([sys.executable, "-c", build], cwd=PACKAGE, check=True, capture_output=True)
            self.pip("install", "--no-deps", "--no-index", *map(str, out.glob("*.whl")))

        def uninstall(self):
            self.pip("uninstall", "--yes", "vilavt-vlmeval")

        def run(self, *arguments, path=None, **environment):
            clean = {k: v for k, v in os.environ.items() if not k.startswith(("VILAVT_", "PYTHON"))}
            clean |= {"PYTHONPATH": str(path)} if path else {}
            return subprocess.run([python, *arguments], capture_output=True, text=True, env=clean | environment)

    (Site.packages / "core.pth").write_text(f"{root / 'core'}\n")
    return Site()


def fake(folder: Path, **more: str) -> Path:
    """A VLMEvalKit of a few lines."""
    for name, text in {**FILES, **more}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(site, request):
    before = set(site.packages.rglob("*"))
    site.install(request.param)
    yield site
    site.uninstall()
    assert set(site.packages.rglob("*")) == before, "uninstalling left something behind"


def test_an_installed_package_registers_its_names(installed, tmp_path):
    listed = installed.run("-c", LIST, path=fake(tmp_path))
    assert listed.stdout == str(sorted(["Other", *NAMES])), listed.stderr


def test_the_environment_can_switch_the_hook_off(installed, tmp_path):
    assert installed.run("-c", LIST, path=fake(tmp_path), VILAVT_VLMEVAL_AUTOLOAD="0").stdout == "['Other']"


def test_an_interpreter_start_imports_nothing_of_ours(installed):
    show = "import sys; print(*sorted(sys.modules)); print(*(type(f).__name__ for f in sys.meta_path))"
    modules, finders = installed.run("-c", show).stdout.splitlines()
    assert not [name for name in modules.split() if "vilavt" in name or name in ("torch", "vlmeval")]
    assert "VilavtVlmeval" in finders


def test_the_hook_is_gone_once_it_has_registered(installed, tmp_path):
    code = "import vlmeval.config, sys; print('VilavtVlmeval' in [type(f).__name__ for f in sys.meta_path])"
    assert installed.run("-c", code, path=fake(tmp_path)).stdout == "False\n"


def test_a_hook_that_outlives_the_package_harms_nobody(installed, tmp_path):
    """A worktree that was moved away, a half-finished installation."""
    hidden = "import sys; sys.modules['vilavt_vlmeval'] = None; " + LIST
    assert installed.run("-c", hidden, path=fake(tmp_path)).stdout == "['Other']"


def test_the_wrapper_runs_the_runner_of_a_package_and_of_a_checkout(installed, tmp_path):
    package = fake(tmp_path / "package", **{"vlmeval/run.py": RUNNER})
    checkout = fake(tmp_path / "checkout", **{"run.py": RUNNER})
    for path in (package, checkout):
        done = installed.run("-m", "vilavt_vlmeval", "--model", "x", path=path, VILAVT_VLMEVAL_AUTOLOAD="0")
        assert done.stdout == f"__main__ {sorted(['Other', *NAMES])} ['--model', 'x']\n", done.stderr


def test_the_wrapper_says_what_is_missing(installed, tmp_path):
    nothing = installed.run("-m", "vilavt_vlmeval")
    assert nothing.returncode == 1
    assert "no vlmeval in this environment; pip install ms-vlmeval" in nothing.stderr
    no_runner = installed.run("-m", "vilavt_vlmeval", path=fake(tmp_path))
    assert "has no run.py, neither inside nor beside it" in no_runner.stderr


def test_a_toolkit_that_we_cannot_register_with_goes_on(installed, tmp_path):
    other = fake(tmp_path, **{"vlmeval/config.py": "models = {}\n"})
    done = installed.run("-c", "import vlmeval.config; print('went on')", path=other)
    assert done.stdout == "went on\n"
    assert "vilavt-vlmeval: cannot register with VLMEvalKit: AttributeError" in done.stderr


def test_an_error_of_the_toolkit_stays_its_own(installed, tmp_path):
    broken = fake(tmp_path, **{"vlmeval/config.py": "1 / 0\n"})
    done = installed.run("-c", "import vlmeval.config", path=broken)
    assert "ZeroDivisionError" in done.stderr
    assert "vilavt" not in done.stderr.replace(str(installed.packages), "").split("ZeroDivisionError")[-1]


def test_looking_for_the_module_without_importing_it_does_not_use_the_hook_up(installed, tmp_path):
    code = "from importlib.util import find_spec; find_spec('vlmeval.config'); " + LIST
    assert installed.run("-c", code, path=fake(tmp_path)).stdout == str(sorted(["Other", *NAMES]))


def test_a_name_that_the_toolkit_has_is_left_alone(installed, tmp_path):
    config = "supported_VLM = {'ViLaVT-7B': 'theirs'}\n"
    code = "import vlmeval.config as c; print(c.supported_VLM['ViLaVT-7B'])"
    done = installed.run("-c", code, path=fake(tmp_path, **{"vlmeval/config.py": config}))
    assert done.stdout == "theirs\n"
    assert "ViLaVT-7B of its own; it is left alone" in done.stderr


def test_the_runner_can_set_verbose_on_our_entries(installed, tmp_path):
    code = "import vlmeval.config as c; e = c.supported_VLM['ViLaVT-Tiny']; print(e.keywords, e.func.__module__)"
    done = installed.run("-c", code, path=fake(tmp_path))
    assert done.stdout == "{'name': 'ViLaVT-Tiny', 'verbose': False, 'checkpoint': 'tiny'} vilavt_vlmeval.register\n"


def test_the_entry_point_is_declared():
    (entry,) = metadata.entry_points(group="vlmeval.models")
    assert (entry.name, entry.value) == ("vilavt", "vilavt_vlmeval.register:register")


def test_importing_all_of_us_leaves_gradients_on():
    code = (
        "import torch, vilavt_vlmeval.adapter, vilavt_vlmeval.register, vilavt_vlmeval.settings; "
        "import sys; assert 'vlmeval' not in sys.modules; assert torch.is_grad_enabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_of_ours_imports_torch_before_the_runner_has_chosen_a_gpu():
    """The runner sets CUDA_VISIBLE_DEVICES for each of several ranks; it must not be read before."""
    names = ("__main__", "_autoload", "adapter", "compat", "doctor", "errors", "messages", "register", "settings")
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module("vilavt_vlmeval." + name)
assert not {{"torch", "transformers", "vlmeval"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_doctor_finds_the_toolkit_without_importing_it(monkeypatch):
    from vilavt_vlmeval import _autoload
    from vilavt_vlmeval.doctor import checks

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delenv(_autoload.SWITCH, raising=False)
    _autoload.install()
    found = {check.name: check for check in checks(None, False)}
    assert {check.status for check in found.values()} == {"ok"}, found
    assert "ms-vlmeval 0.0.20" in found["vlmeval"].detail
    assert found["vlmeval runner"].detail.endswith("vlmeval/run.py")
    monkeypatch.setenv(_autoload.SWITCH, "0")
    (last,) = (check for check in checks(None, False) if check.name == "vlmeval names")
    assert (last.status, last.remedy) == ("note", "start evaluations with `python -m vilavt_vlmeval`")
    assert "vlmeval" not in sys.modules


def test_vlmutil_lists_our_names_and_the_toolkit_knows_every_benchmark_of_the_readme(toolkit, tmp_path):
    section = (PACKAGE / "README.md").read_text().split("## Benchmarks")[1].split("Tested on")[0]
    wanted = {name for row in re.findall(r"\n\| [^|]+ \| ([^|]+) \|", section) for name in re.findall("`([^`]+)`", row)}
    wanted.remove("--data")
    assert len(wanted) > 10
    code = (
        "import json, sys; from vlmeval.tools import cli; sys.argv[1:] = ['mlist', 'all']; cli(); "
        "from vlmeval.dataset import SUPPORTED_DATASETS as images, supported_video_datasets as videos; "
        "print(json.dumps([*images, *videos]))"
    )
    toolkit.run(tmp_path, "-c", code)
    *names, known = (line for line in toolkit.log(tmp_path, whole=True).splitlines() if line[:1] in "[V")
    assert set(NAMES) <= set(names)
    assert wanted <= set(json.loads(known))


def test_the_toolkit_sets_a_benchmark_s_frames_and_rate_one_after_the_other(toolkit, tmp_path):
    """As `infer_data` does before a message: a benchmark has one of the two, the model keeps a value for either."""
    code = """
import json
from vilavt_vlmeval.vlm import ViLaVT

model = ViLaVT(checkpoint="tiny", video_files=True, trace_dir=None)
asked = []
model.adapter.answer = lambda question, dataset: asked.append(question.images[0].wanted) or ""
for frames, rate in ((16, -1), (0, 2), (32, -1), (32, -1), (0, 2)):
    if frames > 0:
        model.nframe = frames if model.nframe != frames else model.nframe
        model.fps = None
    else:
        model.nframe = None
        model.fps = rate if model.fps != rate else model.fps
    model.generate_inner([{"type": "video", "value": "a.mp4"}, {"type": "text", "value": "?"}])
print("FOUND", json.dumps([model.VIDEO_LLM, asked]))
"""
    toolkit.run(tmp_path, "-c", code)
    (line,) = (line for line in toolkit.log(tmp_path, whole=True).splitlines() if line.startswith("FOUND"))
    expected = [{"frames": 16}, {"fps": 2}, {"frames": 32}, {"frames": 32}, {"fps": 2}]
    assert json.loads(line.removeprefix("FOUND ")) == [True, expected]
