"""`vilavt doctor`: what is wrong is named with its remedy, and one broken part does not hide the others."""

import json
import re
import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vilavt_core import doctor
from vilavt_core.cli import app
from vilavt_core.doctor import Check, Status
from vilavt_core.versions import OURS
from vilavt_hf.doctor import checks as hf_checks

runner = CliRunner()


@pytest.fixture
def hosts(monkeypatch):
    """Stands for the entry points of installed packages: `hosts({name: checks})`."""

    class Entry:
        def __init__(self, name, checks):
            self.name, self.checks = name, checks

        def load(self):
            if isinstance(self.checks, Exception):
                raise self.checks
            return self.checks

    def installed(checks):
        entries = [Entry(*item) for item in checks.items()]
        checkpoint_entries = [Entry("vilavt-hf", hf_checks)]
        groups = {doctor.GROUP: entries, doctor.CHECKPOINT_GROUP: checkpoint_entries}
        monkeypatch.setattr(metadata, "entry_points", lambda group: groups.get(group, []))

    installed({})
    return installed


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_sound_installation_and_checkpoint_pass(hosts, tiny_checkpoint):
    result = runner.invoke(app, ["doctor", "--model", str(tiny_checkpoint), "--load", "--json"])
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 0, result.output
    general = {"packages", "transformers", "extras", "device", "Auto classes"}
    assert set(found) == general | {"checkpoint", "processor", "weights"}
    assert metadata.version("transformers") in found["transformers"]["detail"]
    (tokens,) = re.findall(r"answer a question, with (\d+) tokens", found["weights"]["detail"])
    assert 0 < int(tokens) <= 512  # of a model that never stops


def test_a_damaged_checkpoint_is_named_with_a_remedy_and_exit_code_1(hosts, tiny_checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    shutil.rmtree(broken / "query_tokenizer")
    result = runner.invoke(app, ["doctor", "--model", str(broken)])
    assert result.exit_code == 1
    assert "query_tokenizer" in result.output
    assert "Auto classes" in result.output
    found = by_name(doctor.examine(broken))
    assert found["checkpoint"].status is Status.FAILED
    assert found["checkpoint"].remedy
    assert found["Auto classes"].status is Status.OK


def test_hosts_add_their_checks_and_a_broken_one_hides_nobody(hosts, tmp_path):
    asked = []

    def checks(checkpoint, load):
        asked.append((checkpoint, load))
        yield Check("theirs", Status.NOTE, "slow")
        raise OSError("no driver")

    hosts({"host": checks, "other": ImportError("no module named other")})
    found = by_name(doctor.examine())
    assert asked == [(None, False)]
    assert found["theirs"].status is Status.NOTE
    assert (found["host"].status, found["host"].detail) == (Status.FAILED, "OSError: no driver")
    assert "no module named other" in found["other"].detail


@pytest.mark.parametrize(
    "version, status", [("0.31.9", "failed"), ("0.32.0", "ok"), ("0.33.1", "ok"), ("0.34", "failed")]
)
def test_versions_are_compared_by_number(version, status):
    check = doctor.in_range("vllm", version, (0, 32), (0, 34), "vllm>=0.32,<0.34")
    assert check.status == status
    assert bool(check.remedy) == (status == "failed")


@pytest.mark.parametrize(
    "version, status, said",
    [
        ("4.56.9", "failed", "accepted from 4.57 to below 6.0"),
        ("4.57.6", "ok", "tested from 4.57 to 5.23"),
        ("5.0.0rc1", "ok", "tested from 4.57 to 5.23"),
        ("5.23.9", "ok", "tested from 4.57 to 5.23"),
        ("5.24.0", "note", "not tested: accepted from 4.57 to below 6.0, tested from 4.57 to 5.23"),
        ("5.100", "note", "not tested"),
        ("6.0.0", "failed", "accepted from 4.57 to below 6.0"),
        ("main", "failed", "accepted from"),
    ],
)
def test_a_version_that_is_accepted_is_not_called_tested(version, status, said):
    check = doctor.in_range(
        "transformers", version, (4, 57), (6, 0), "transformers>=4.57,<6", tested=((4, 57), (5, 23))
    )
    assert (check.status, bool(check.remedy)) == (status, status == "failed")
    assert check.detail.startswith(f"{version}, {said}")


def test_the_versions_of_transformers_are_those_of_the_package_and_of_its_tests():
    root = Path(__file__).parents[2]
    low, high = ("{}.{}".format(*bound) for bound in doctor.TRANSFORMERS)
    needs = tomllib.loads((root / "vilavt_hf" / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={low},<{high.removesuffix('.0')}" in needs
    found = sorted(path.stem for path in (root / "tests" / "constraints").glob("transformers-*.txt"))
    oldest, newest = (tuple(map(int, name.partition("-")[2].split(".")[:2])) for name in found)
    assert doctor.TESTED_TRANSFORMERS[0] == oldest
    assert newest <= doctor.TESTED_TRANSFORMERS[1] < doctor.TRANSFORMERS[1]


def test_packages_of_different_releases_are_refused(hosts, monkeypatch):
    versions = {"vilavt-hf": "0.1.0", "vilavt-vllm": "0.2.0"}

    def version(package):
        if package in OURS and package not in versions:
            raise metadata.PackageNotFoundError
        return versions.get(package, "5.0.0")

    monkeypatch.setattr(metadata, "version", version)
    check = next(iter(doctor.examine()))
    assert check.status is Status.FAILED
    assert "vilavt-vllm 0.2.0" in check.detail


def test_load_needs_a_model():
    assert runner.invoke(app, ["doctor", "--load"]).exit_code == 2
