"""The workflows of the hub where the code lives run what `nox` runs, with sessions that exist; its forms are whole."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))


def sessions() -> set[str]:
    """Names of all functions that are sessions."""
    return {
        node.name
        for node in NOXFILE.body
        if isinstance(node, ast.FunctionDef) and any("nox.session" in ast.unparse(one) for one in node.decorator_list)
    }


def default_sessions() -> set[str]:
    """What `nox` runs without being told what: the sessions that `ci` starts."""
    assert 'nox.options.sessions = ["ci"]' in (ROOT / "noxfile.py").read_text(encoding="utf-8")
    (ci,) = (node for node in NOXFILE.body if isinstance(node, ast.FunctionDef) and node.name == "ci")
    return {node.value for node in ast.walk(ci) if isinstance(node, ast.Constant)} & sessions()


def jobs(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def named_sessions(job: dict) -> list[str]:
    """Sessions that a job's steps name, those of its matrix put in."""
    rows = job.get("strategy", {}).get("matrix", {}).get("session", [""])
    commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("nox")]
    filled = [command.replace("${{ matrix.session }}", row) for command in commands for row in rows]
    return [name for command in filled for name in command.removeprefix("nox -s").split()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_session_that_a_workflow_names_exists(path):
    named = [name for job in jobs(path).values() for name in named_sessions(job)]
    assert named
    assert set(named) <= sessions()


@pytest.mark.parametrize("name", ["tests.yml", "nightly.yml"])
def test_the_matrix_runs_each_session_that_nox_runs_once(name):
    (job,) = [job for job in jobs(ROOT / ".github" / "workflows" / name).values() if "lint" in named_sessions(job)]
    assert {"hf_newest", "vllm_cpu"} <= default_sessions()
    assert sorted(named_sessions(job)) == sorted(default_sessions())
    (row,) = [row.split() for row in job["strategy"]["matrix"]["session"] if "vllm_cpu" in row.split()]
    assert row[:-1] == ["hf_newest", "hf_oldest"], "it reads the checkpoints that those have written"


def test_the_nightly_matrix_takes_the_newest_of_everything_and_runs_every_test():
    (step,) = [step for step in jobs(ROOT / ".github/workflows/nightly.yml")["newest"]["steps"] if "env" in step]
    assert step["env"] == {"VILAVT_NEWEST": "1", "VILAVT_NIGHTLY": "1"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_no_more_than_it_must(path):
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    for name, job in flow["jobs"].items():
        assert job["timeout-minutes" if "steps" in job and name != "draft" else "runs-on"], name
        assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)
        runs = " ".join(step.get("run", "") for step in job["steps"])
        assert "github." not in runs  # what strangers name, a branch say, must not become part of a command


@pytest.mark.parametrize(
    "name, before, hooks", [("ruff", "v", {"ruff-check", "ruff-format"}), ("mdformat", "", {"mdformat"})]
)
def test_the_hooks_before_a_commit_use_the_tools_of_the_sessions(name, before, hooks):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (found,) = [repo for repo in config["repos"] if name in repo["repo"]]
    sessions = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    pinned = re.search(rf'^{name.upper()} = "{name}==([\d.]+)"', sessions, re.MULTILINE)
    assert found["rev"] == f"{before}{pinned[1]}"
    assert {hook["id"] for hook in found["hooks"]} == hooks


@pytest.mark.parametrize(
    "name, would_change",
    [("end-of-file-fixer", rb"[^\n]\Z|\n\n\Z|\A\n\Z"), ("trailing-whitespace", rb"[ \t]\r?(\n|\Z)")],
)
def test_the_hooks_before_a_commit_leave_every_file_as_it_is(name, would_change):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (hook,) = [hook for repo in config["repos"] for hook in repo["hooks"] if hook["id"] == name]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [one for one in listed.split("\0") if one and not re.search(hook["exclude"], one)]
    contents = {one: (ROOT / one).read_bytes() for one in files if (ROOT / one).is_file()}
    assert "noxfile.py" in contents
    texts = {one: content for one, content in contents.items() if b"\0" not in content}
    assert [one for one, content in texts.items() if re.search(would_change, content)] == []


@pytest.mark.parametrize("name", ["fault.yml", "wish.yml"])
def test_an_issue_form_has_what_a_form_must_have(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    names = [field["id"] for field in form["body"]]
    assert len(names) == len(set(names))
    assert all(
        field["type"] in ("textarea", "dropdown", "input") and field["attributes"]["label"] for field in form["body"]
    )


def test_the_citation_has_the_version_of_the_workspace_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == (ROOT / "VERSION").read_text(encoding="utf-8").strip()
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in paper["url"]
    assert len(paper["authors"]) == 7
