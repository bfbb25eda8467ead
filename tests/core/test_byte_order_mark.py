"""Files that an editor has saved with a byte order mark are read as those without one, whoever reads them."""

import json
import shutil
from pathlib import Path

import pytest

from vilavt_core.checkpoint import Checkpoint
from vilavt_core.data.annotations import Annotations
from vilavt_core.errors import VilavtError
from vilavt_core.prompts import PromptSet
from vilavt_core.settings import preset_of
from vilavt_core.yaml_config import read_keys
from vilavt_eval.definition import load_benchmark
from vilavt_eval.questions import Questions

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(params=["utf-8", "utf-8-sig"])
def save(request):
    """`save(path, text)`, without and with the mark."""

    def write(path: Path, text: str) -> Path:
        path.write_text(text, encoding=request.param)
        return path

    return write


@pytest.mark.parametrize("name", ["records.jsonl", "records.json"])
def test_records_of_a_training_set(save, tmp_path, name):
    records = [{"a": "ä"}, {"a": 2}]
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    assert list(Annotations(save(tmp_path / name, text))) == records


def test_yaml_keys(save, tmp_path):
    assert read_keys(save(tmp_path / "run.yaml", "first: 1\nsecond: ä\n"), VilavtError) == {"first": 1, "second": "ä"}


def test_questions_and_definition_of_a_benchmark(save, tmp_path):
    """As a file of JSON lines, defined by YAML."""
    own = {"base": "ERQA", "file": "own.jsonl"}
    benchmark = load_benchmark(save(tmp_path / "own.yaml", json.dumps(own)))
    keys = benchmark.keys
    record = {keys.images: ["a.png"], keys.question: "<image> Which? A. one B. two", keys.answer: "A"}
    record |= {key: "x" for key in (keys.id, benchmark.report.category) if key}
    record |= {keys.type: next(iter(benchmark.types))} if keys.type else {}
    (question,) = Questions(benchmark, save(tmp_path / "own.jsonl", json.dumps(record) + "\n"))
    assert "Which?" in question.text


def test_a_prompt_set(save, tmp_path):
    stock = PromptSet.load("default")
    folder = tmp_path / "prompts"
    shutil.copytree(EXAMPLES / "vilavt-tiny" / "prompts", folder)
    for file in folder.iterdir():
        save(file, file.read_text(encoding="utf-8"))
    assert PromptSet.load(folder).sha256 == PromptSet.load(EXAMPLES / "vilavt-tiny" / "prompts").sha256 != stock.sha256


def test_settings_and_configuration_of_a_checkpoint(save, tmp_path):
    for file in (EXAMPLES / "vilavt-tiny").iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in ("vilavt_chat.json", "config.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).unlink()
        save(tmp_path / name, text)
    assert preset_of(tmp_path) == preset_of(EXAMPLES / "vilavt-tiny")
    assert Checkpoint.open(tmp_path).require_sound().config == Checkpoint.open(EXAMPLES / "vilavt-tiny").config
