"""docs/install.md: its commands parse, what they name is there, and what they install runs from a fresh environment."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from published_size import QUERY, TEXT, VISION

from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
INSTALLS = [line for line in COMMANDS if line.startswith("pip install")]
LOCAL = re.compile(r"\./(?P<folder>vilavt_\w+)(?:\[(?P<extras>[\w,-]+)\])?$")
SCRIPTS = {"vilavt_hf": ["vilavt"], "vilavt_vllm": ["vilavt-serve"], "vilavt_rl": ["vilavt-rl"], "vilavt_vlmeval": []}


def project(folder: str) -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("line", INSTALLS)
def test_a_command_names_packages_and_extras_that_exist(line):
    words = shlex.split(line)[2:]
    ours = {project(folder)["name"] for folder in SCRIPTS}
    for word in words:
        if match := LOCAL.match(word):
            extras = set((match["extras"] or "").split(",")) - {""}
            assert extras <= set(project(match["folder"]).get("optional-dependencies", {})), word
        elif word == "dist":
            assert "--find-links" in words
        elif word.startswith("-"):
            assert word in ("--no-deps", "--find-links")
        else:  # a package of the index, with the version that was tested; ours are in dist/ only
            requirement = Requirement(word)
            assert (requirement.name in ours) == ("--find-links" in words) == (not requirement.specifier), word


def test_every_kind_of_user_has_a_section_with_commands():
    titles = [line.removeprefix("## ") for line in PAGE.splitlines() if line.startswith("## ")]
    assert titles[:4] == [
        "For transformers",
        "For vLLM",
        "For reinforcement learning",
        "For VLMEvalKit and lmms-eval",
    ]
    installed = {match["folder"] for line in INSTALLS for word in shlex.split(line) if (match := LOCAL.match(word))}
    assert installed == set(SCRIPTS)


def test_the_extras_of_the_table_are_those_of_the_package():
    table = PAGE.split("| extra | brings |")[1].split("\n\n")[0]
    named = set(re.findall(r"\[(\w+)\]", table))
    assert named == set(project("vilavt_hf")["optional-dependencies"])


def test_sessions_that_a_page_names_are_in_the_noxfile():
    sessions = set(
        re.findall(r"@nox\.session.*\n(?:@nox.*\n)*def (\w+)\(", (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    )
    for page in ("docs/install.md", "CONTRIBUTING.md", "README.md"):
        for several in re.findall(r"nox -s ((?:\w+ ?)+)", (ROOT / page).read_text(encoding="utf-8")):
            assert set(several.split()) <= sessions, (page, several)


def test_the_package_alone_brings_neither_the_web_app_nor_the_reader_of_videos():
    names = {re.split(r"[<>=\[ ]", one)[0] for one in project("vilavt_hf")["dependencies"]}
    assert not names & {"gradio", "av", "openai"}
    extras = project("vilavt_hf")["optional-dependencies"]
    assert [re.split(r"[<>=\[ ]", one)[0] for one in (*extras["web"], *extras["video"])] == ["gradio", "av"]


@pytest.mark.slow
def test_the_documented_packages_run_from_a_fresh_environment(tmp_path):
    """Their dependencies are those of the environment that runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VILAVT_"))}
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    folders = [f"./{folder}" for folder in SCRIPTS]
    build = ["wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(wheels), *folders]
    subprocess.run([*pip, *build], cwd=ROOT, env=clean, check=True)
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    install = ["--python", str(python), "install", "-q", "--no-deps", "--no-index", *map(str, wheels.glob("*.whl"))]
    subprocess.run([*pip, *install], env=clean, check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import vilavt_core.shipped as s; print(s.__file__); print(s.shipped('vilavt-tiny'))"
    module, examples = run(str(python), "-c", code).splitlines()
    assert module.startswith(str(site))
    assert examples.startswith(str(site))
    for script in (name for names in SCRIPTS.values() for name in names):
        assert (python.parent / script).is_file()
    assert "Ask a checkpoint or a server about images" in run(str(python.parent / "vilavt"), "--help")
    assert "complete" in run(str(python.parent / "vilavt"), "inspect", examples)
    assert "vilavt-hf " in run(str(python.parent / "vilavt"), "version")


def test_the_size_of_the_published_models_is_that_of_their_configuration():
    config = VilavtConfig(text_config=TEXT, vision_config=VISION, text_encoder_config=QUERY, tie_word_embeddings=False)
    with torch.device("meta"):
        model = VilavtForConditionalGeneration(config)
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters / 1e9:.2f} billion parameters" in PAGE
    assert f"**{2 * parameters / 1e9:.1f} GB**" in PAGE
    encoder = sum(p.numel() for name, p in model.named_parameters() if "text_encoder" in name)
    added = sum(p.numel() for name, p in model.named_parameters() if "instruct_" in name or "text_proj" in name)
    shown = (
        f"{(parameters - encoder - added) / 1e9:.2f}, query encoder {encoder / 1e9:.2f}, projections {added / 1e9:.2f}"
    )
    assert shown in PAGE
    cache = 2 * TEXT["num_hidden_layers"] * TEXT["num_key_value_heads"] * 128 * 2
    assert f"tokens · {cache:,} +" in PAGE
    assert f"take {8 * 16384 * cache / 1e9:.1f} GB beside the weights" in PAGE
