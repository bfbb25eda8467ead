"""The four distributions: one version, complete archives, light imports."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["vilavt_hf", "vilavt_vllm", "vilavt_rl", "vilavt_vlmeval"]
VERSION = (ROOT / "VERSION").read_text().strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_all_packages_have_the_version_of_the_workspace(package):
    assert version(package.replace("_", "-")) == VERSION
    code = f"import {package}; print({package}.__version__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == VERSION


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_a_host_package_asks_for_this_series_of_vilavt_hf(package):
    series = ".".join(VERSION.split(".")[:2])
    assert f"vilavt-hf~={series}.0" in requires(package.replace("_", "-"))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_built_from_the_source_archive_is_complete(package, tmp_path):
    """`python -m build` makes the source archive first and the wheel from it."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT / package)]
    subprocess.run(build, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    (wheel,) = tmp_path.glob("*.whl")
    assert VERSION in archive.name
    assert VERSION in wheel.name
    with tarfile.open(archive) as tar:
        assert any(name.endswith("/LICENSE") for name in tar.getnames())
    names = zipfile.ZipFile(wheel).namelist()
    assert f"{package}/py.typed" in names
    if package == "vilavt_hf":
        assert "vilavt_core/prompts/default/prompts.json" in names
        assert {"vilavt_core/py.typed", "vilavt_eval/py.typed"} <= set(names)
        assert "vilavt_core/_examples/vilavt-tiny/model.safetensors" in names
        assert "vilavt_core/_examples/pictures/questions.json" in names
        assert "vilavt_core/recipes/vilavt_7b_sft.yaml" in names
        assert "vilavt_eval/benchmarks/VSI-Bench.yaml" in names
        assert "vilavt_eval/presets/default.yaml" in names
        assert "vilavt_hf/train/parallel/fsdp2.json" in names
    if package == "vilavt_rl":
        assert "vilavt_rl/constraints/easyr1.txt" in names


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_a_host_shell_imports_nothing_heavy(package):
    code = (
        f"import sys, {package}; assert not {{'torch', 'transformers', 'vllm', 'verl', 'vlmeval'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
