"""The four distributions: one version, complete archives, light imports."""

import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from importlib.metadata import requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["vilavt_hf", "vilavt_vllm", "vilavt_rl", "vilavt_vlmeval"]
VERSION = (ROOT / "VERSION").read_text().strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_all_packages_have_the_version_of_the_workspace(package):
    assert version(package.replace("_", "-")) == VERSION
    assert importlib.import_module(package).__version__ == VERSION


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_a_host_package_asks_for_this_series_of_vilavt_hf(package):
    series = ".".join(VERSION.split(".")[:2])
    assert f"vilavt-hf~={series}.0" in requires(package.replace("_", "-"))


@dataclass(frozen=True)
class Built:
    """The archives of one distribution."""

    package: str
    archive: Path
    wheel: Path
    """Made of the archive."""
    direct: Path
    """The wheel made of the checkout."""

    @property
    def names(self) -> set[str]:
        """Files of the wheel."""
        return set(zipfile.ZipFile(self.wheel).namelist())

    def metadata(self) -> Message:
        """What an index shows of it."""
        (name,) = (name for name in self.names if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(zipfile.ZipFile(self.wheel).read(name))


@pytest.fixture(scope="module", params=PACKAGES)
def built(request, tmp_path_factory) -> Built:
    """`python -m build` makes the source archive first and the wheel from it; `--wheel` makes it of the checkout."""
    folder = tmp_path_factory.mktemp(request.param)
    build = [sys.executable, "-m", "build", "--no-isolation", str(ROOT / request.param)]
    subprocess.run([*build, "--outdir", str(folder / "both")], check=True, capture_output=True)
    subprocess.run([*build, "--outdir", str(folder / "direct"), "--wheel"], check=True, capture_output=True)
    (archive,) = folder.glob("both/*.tar.gz")
    (wheel,) = folder.glob("both/*.whl")
    (direct,) = folder.glob("direct/*.whl")
    return Built(request.param, archive, wheel, direct)


def test_the_wheel_built_from_the_source_archive_is_complete(built):
    assert VERSION in built.archive.name
    assert VERSION in built.wheel.name
    with tarfile.open(built.archive) as tar:
        assert any(name.endswith("/LICENSE") for name in tar.getnames())
    assert f"{built.package}/py.typed" in built.names
    if built.package == "vilavt_hf":
        assert "vilavt_core/prompts/default/prompts.json" in built.names
        assert {"vilavt_core/py.typed", "vilavt_eval/py.typed"} <= built.names
        assert "vilavt_core/_examples/vilavt-tiny/model.safetensors" in built.names
        assert "vilavt_core/_examples/pictures/questions.json" in built.names
        assert "vilavt_core/recipes/vilavt_7b_sft.yaml" in built.names
        assert "vilavt_core/templates/page.html" in built.names
        assert "vilavt_core/templates/model_card.md" in built.names
        assert "vilavt_eval/benchmarks/VSI-Bench.yaml" in built.names
        assert "vilavt_eval/presets/default.yaml" in built.names
        assert "vilavt_hf/train/parallel/fsdp2.json" in built.names
    if built.package == "vilavt_rl":
        assert "vilavt_rl/constraints/easyr1.txt" in built.names


def test_the_wheel_of_the_source_archive_holds_what_that_of_the_checkout_holds(built):
    sizes = [
        {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
        for wheel in (built.wheel, built.direct)
    ]
    assert sizes[0] == sizes[1]


def test_a_wheel_holds_all_of_our_modules_and_nothing_else(built):
    source = ROOT / built.package / "src"
    ours = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and ".egg-info" not in path.parts
    }
    information = f"{built.package}-{VERSION}.dist-info/"
    rest = {name for name in built.names - ours if not name.startswith((information, "vilavt_core/_examples/"))}
    assert ours <= built.names
    assert rest == set()
    assert f"{information}licenses/LICENSE" in built.names
    assert {Path(name).suffix for name in built.names} & {".pyc", ".so", ".bin", ".pt", ".pkl"} == set()


def test_archives_are_small(built):
    assert max(path.stat().st_size for path in (built.archive, built.wheel)) <= 12e6


def test_an_index_can_show_a_package_by_its_metadata(built):
    metadata = built.metadata()
    assert metadata["Author"] == "The authors of the ViLaVT plug-ins"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"]
    assert metadata["Keywords"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2602.11073"]
    classifiers = metadata.get_all("Classifier")
    assert "Programming Language :: Python :: 3.11" in classifiers
    assert [one for one in classifiers if one.startswith("License")] == []  # the expression says it


def test_a_long_description_has_no_link_that_leads_nowhere_on_an_index(built):
    text = built.metadata().get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    relative = [link for found in links for link in found if link and not link.startswith(("https://", "#"))]
    assert relative == [], "an index has no other page of ours: name it in backticks, as `docs/rl.md`"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_extras_of_a_readme_are_those_of_the_package(package):
    text = (ROOT / package / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    table = text.split("| extra | installs | for |\n| --- | --- | --- |\n")[1].split("\n\n")[0] if extras else ""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    shown = {name.strip("`"): installs.replace("`", "").split(", ") for name, installs, _ in rows}
    assert shown == {
        extra: [re.split(r"[<>=~]", one if one.startswith("vilavt-") else one.partition("[")[0])[0] for one in needs]
        for extra, needs in extras.items()
    }


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_a_host_shell_imports_nothing_heavy(package):
    code = (
        f"import sys, {package}; assert not {{'torch', 'transformers', 'vllm', 'verl', 'vlmeval'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["vilavt_core", "vilavt_eval", *PACKAGES])
def test_a_warning_given_to_a_module_of_ours_is_an_error(package):
    code = "import warnings; warnings.warn('this name will go', DeprecationWarning)"
    with pytest.raises(DeprecationWarning, match="this name will go"):
        exec(code, {"__name__": f"{package}.some_module"})
    with warnings.catch_warnings(record=True) as told:
        exec(code, {"__name__": "some_library.some_module"})  # what libraries say among themselves ends nothing
    assert len(told) == 1
