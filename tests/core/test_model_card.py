"""The model card that every command which makes a checkpoint writes, and its way to the hub, without a network."""

import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from vilavt_core.checkpoint import (
    Score,
    card_text,
    convert_checkpoint,
    fingerprint,
    plan_upload,
    push_to_hub,
    scores_of_report,
    write_build_info,
    write_card,
)
from vilavt_core.checkpoint.card import BEGIN, END, public_command
from vilavt_core.checkpoint.layout import read_json
from vilavt_core.cli import app
from vilavt_core.errors import CheckpointError

TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
SCORE = Score("MMSI-Bench", "strict, %", "31.40", 1000, "vilavt score results --out scores")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A converted checkpoint, with its card."""
    convert_checkpoint(TINY, tmp_path / "made")
    return tmp_path / "made"


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_names_base_preset_weights_and_the_command_and_the_hub_can_read_it(checkpoint):
    text = readme(checkpoint)
    assert "| base | vilavt-tiny |" in text
    assert "| preset | default, 3,136 to 28,224 pixels" in text
    assert f"`{fingerprint(checkpoint)}`" in text
    command = read_json(checkpoint / "provenance.json")["command"]
    assert f"       {public_command(command)}\n" in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "image-text-to-text", None)
    assert "vilavt" in data.tags


def test_what_a_checkpoint_went_through_is_told_from_the_first_step_on(checkpoint, tmp_path):
    write_build_info(
        checkpoint,
        {"made_by": "sft", "base": "Qwen/Some-Base", "config": {"data": {"use": ["sr_91k%25", "vgr"]}}, "step": 40,
         "validation": {"loss": 0.52, "answers_right": 0.75, "questions": 1200}},
        ["vilavt", "sft", "/home/me/run.yaml", "data.root=/data/sets"],
    )  # fmt: skip
    convert_checkpoint(checkpoint, tmp_path / "twice")
    text = readme(tmp_path / "twice")
    assert "| base | made |" in text
    assert "| data | sr_91k%25, vgr |" in text
    assert text.index("1. `sft`") < text.index("vilavt sft run.yaml data.root=sets") < text.index("2. `convert`")
    assert "/home/me" not in text
    write_card(checkpoint)
    text = readme(checkpoint)
    assert ModelCard(text).data.base_model == "Qwen/Some-Base"
    assert "| the run's validation data | loss | 0.52 |  |" in text
    assert "| the run's validation data | answers right | 0.75 | 1,200 |" in text


def test_scores_stand_on_the_card_with_the_command_that_made_them(checkpoint):
    assert "None recorded" in readme(checkpoint)
    text = card_text(checkpoint, [SCORE])
    assert "| MMSI-Bench | strict, % | 31.40 | 1,000 |" in text
    assert "    vilavt score results --out scores\n" in text
    assert "None recorded" not in text


def test_what_people_wrote_stays_and_our_part_is_written_anew(checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    write_card(checkpoint)
    once = readme(checkpoint)
    assert once.startswith("---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    (checkpoint / "README.md").write_text(once + "\nBelow.\n")
    write_card(checkpoint, [SCORE])
    text = readme(checkpoint)
    assert text.startswith("---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    assert text.endswith(f"{END}\n\nBelow.\n")
    assert text.count(BEGIN) == text.count(END) == 1
    assert "31.40" in text
    write_card(checkpoint, [SCORE])
    assert readme(checkpoint) == text


def test_a_card_of_ours_alone_is_written_anew_with_its_head(checkpoint):
    text = readme(checkpoint)
    (checkpoint / "README.md").write_text(text.replace("library_name: transformers", "library_name: peft"))
    assert card_text(checkpoint) == text


def test_a_card_that_was_cut_off_is_not_written_over(checkpoint):
    (checkpoint / "README.md").write_text(f"mine\n{BEGIN}\nsome")
    with pytest.raises(CheckpointError, match=re.escape(END)):
        write_card(checkpoint)
    assert readme(checkpoint).endswith("some")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"{", None])
def test_no_card_is_made_without_a_provenance(checkpoint, content):
    (checkpoint / "provenance.json").unlink()
    if content is not None:
        (checkpoint / "provenance.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"provenance\.json"):
        write_card(checkpoint)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("made_by", "base", "source", "config", "data", "validation", "step", "epoch", "source_provenance")


@settings(max_examples=60)
@given(
    top=st.fixed_dictionaries({}, optional=dict.fromkeys(("command", "created", "packages"), JSON)),
    details=JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON)),
)
def test_whatever_a_provenance_says_the_card_keeps_its_form(tmp_path_factory, top, details):
    folder = tmp_path_factory.mktemp("any") / "checkpoint"
    shutil.copytree(TINY, folder, copy_function=os.link)
    (folder / "provenance.json").unlink()
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "provenance.json").write_text(json.dumps({**top, "details": details}))
    text = write_card(folder).read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.rstrip().endswith(END)
    assert ModelCard(text).data.pipeline_tag == "image-text-to-text"


@pytest.mark.parametrize(
    "command, shown",
    [
        ("vilavt convert /a/b/c ~/d/e x/y", "vilavt convert c e x/y"),
        ("vilavt sft data.root='/a b/c'", "vilavt sft data.root='a b/c'"),
        ("vilavt ask --model https://host/v1", "vilavt ask --model https://host/v1"),
    ],
)
def test_absolute_paths_of_a_command_are_shortened(command, shown):
    assert public_command(command) == shown


# ------------------------------------------------------------------------------------------ to the hub


@pytest.fixture
def hub(monkeypatch) -> list:
    """What the hub is asked for; nothing leaves this machine."""
    asked = []

    class Api:
        def __init__(self, **options):
            pass

        def create_repo(self, repository, **options):
            asked.append(("repo", repository, options))

        def create_branch(self, repository, **options):
            asked.append(("branch", options["branch"]))

        def create_commit(self, repository, operations, **options):
            asked.append(("commit", {o.path_in_repo: o.path_or_fileobj for o in operations}, options))
            return type("Commit", (), {"commit_url": f"https://hub/{repository}/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


def test_a_dry_run_lists_files_sizes_and_card_and_asks_nothing(checkpoint, hub):
    (checkpoint / "optimizer.pt").write_bytes(b"x")
    (checkpoint / ".cache").write_bytes(b"x")
    before = readme(checkpoint)
    done = CliRunner().invoke(app, ["push", str(checkpoint), "me/mine", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert hub == []
    assert readme(checkpoint) == before
    size = (checkpoint / "model.safetensors").stat().st_size
    assert f"{size / 1e6:.2f} MB  model.safetensors" in done.output
    assert "query_tokenizer/tokenizer.json" in done.output
    assert "left out  optimizer.pt" in done.output
    assert "left out  .cache" in done.output
    assert before in done.output


def test_a_push_is_one_commit_of_all_files_with_the_card(checkpoint, hub):
    done = CliRunner().invoke(app, ["push", str(checkpoint), "me/mine", "--private", "--revision", "v1"])
    assert done.exit_code == 0, done.output
    assert done.output.endswith("https://hub/me/mine/commit/1\n")
    (_, repository, options), branch, (_, files, commit) = hub
    assert (repository, options) == ("me/mine", {"private": True, "exist_ok": True})
    assert (branch, commit["revision"]) == (("branch", "v1"), "v1")
    assert files["README.md"] == readme(checkpoint).encode()
    there = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
    assert set(files) == there
    assert Path(files["model.safetensors"]).read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_scores_of_a_report_go_onto_the_card_of_a_push(checkpoint, hub, tmp_path):
    figure = {"score": 0.314, "questions": 1000}
    report = {"command": "vilavt score /x/results --out out", "settings": []}
    report["settings"].append({"benchmark": "MMSI-Bench", "scorer": "strict", "figures": [figure]})
    (tmp_path / "scores.json").write_text(json.dumps(report))
    assert scores_of_report(tmp_path / "scores.json") == [
        Score("MMSI-Bench", "strict, %", "31.40", 1000, "vilavt score results --out out")
    ]
    arguments = ["push", str(checkpoint), "me/mine", "--dry-run", "--scores", str(tmp_path / "scores.json")]
    assert "| MMSI-Bench | strict, % | 31.40 | 1,000 |" in CliRunner().invoke(app, arguments).output


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": []}', '{"command": "c", "settings": [{}]}'])
def test_a_file_of_scores_that_is_none_is_refused_by_name(tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"scores\.json"):
        scores_of_report(tmp_path / "scores.json")


@pytest.mark.parametrize("repository", ["mine", "", "/mine", "me/", "me/mine/more", "me/a b", "../mine"])
def test_what_is_no_hub_id_is_refused_before_anything_is_asked(checkpoint, hub, repository):
    with pytest.raises(CheckpointError, match="OWNER/NAME"):
        push_to_hub(plan_upload(checkpoint), repository)
    assert hub == []


def test_a_folder_that_cannot_be_used_is_not_sent(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        plan_upload(checkpoint)
    with pytest.raises(CheckpointError):
        plan_upload(tmp_path / "no-folder")


def test_what_the_hub_says_is_told_with_a_remedy(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hf auth login"):
        push_to_hub(plan_upload(checkpoint), "me/mine")
