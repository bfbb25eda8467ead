"""Checkpoints, configurations and reports that hold what nobody would write by accident."""

import csv
import json
import os
from types import SimpleNamespace

import pytest
from measuring import measured
from typer.testing import CliRunner

from vilavt_core.checkpoint import inspect_checkpoint
from vilavt_core.checkpoint.layout import Checkpoint
from vilavt_core.cli import app
from vilavt_core.ending import say
from vilavt_core.errors import CheckpointError, DataError
from vilavt_core.failures import quoted
from vilavt_core.yaml_config import parse_change, read_keys
from vilavt_eval.report import _write_rows

WRONG = (5, -1, 1.5, True, "x", [], ["x", 1], {}, {"a": 1}, [[]], 10**40)
FIELDS = ("vision_config", "text_config", "text_encoder_config", "architectures", "model_type", "tie_word_embeddings")
VISION = ("depth", "hidden_size", "integration_point", "fullatt_block_indexes", "patch_size", "in_chans")


def shard(header, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def folder_of(path, config, weights: bytes | None = None):
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (path / "model.safetensors").write_bytes(shard({}) if weights is None else weights)
    return path


def is_told(folder) -> None:
    """The checkpoint is inspected, with problems, or is refused as one: in seconds, and nothing else is raised."""
    opened, _, _ = measured(lambda: Checkpoint.open(folder))
    found, seconds, grown = measured(lambda: inspect_checkpoint(folder))
    if isinstance(opened, Exception):
        assert isinstance(opened, CheckpointError)
        assert isinstance(found, CheckpointError)
    else:
        assert found.problems
    assert seconds < 30
    assert grown < 200 * 2**20


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("kind", ["vilavt", "qwen2_5_vl", "qwen3"])
def test_a_configuration_of_wrong_types_is_told(tmp_path, name, value, kind):
    folder = folder_of(tmp_path, {"model_type": kind, "vision_config": {"depth": 4}, name: value}, shard(b"["))
    is_told(folder)


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("name", VISION)
def test_a_vision_configuration_of_wrong_types_is_told(tmp_path, name, value):
    is_told(folder_of(tmp_path, {"model_type": "vilavt", "vision_config": {"depth": 4, name: value}}, shard(b"[")))


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "a list": [],
    "a number": 5,
    "deep": b"[" * 100_000,
    "no JSON": b"\xff\xfe",
    "huge number": b'{"a": ' + b"9" * 100_000 + b"}",
    "twice": b'{"a": 1, "a": 2}',
    "metadata": {"__metadata__": [1]},
    "dimensions": {"a": {**ENTRY, "shape": [2**62] * 300_000}},
    "size": {"a": {**ENTRY, "shape": [10**400]}},
    "negative": {"a": {**ENTRY, "shape": [-1]}},
    "type": {"a": {**ENTRY, "dtype": ["F32"]}},
    "null type": {"a": {**ENTRY, "dtype": None}},
    "offsets": {"a": {**ENTRY, "data_offsets": "ab"}},
    "one offset": {"a": {**ENTRY, "data_offsets": [0]}},
    "before": {"a": {**ENTRY, "data_offsets": [4, 0]}},
    "escape": {"\x1b[2J": {**ENTRY, "data_offsets": [0, 5]}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_nobody_wrote_is_told(tmp_path, name):
    is_told(folder_of(tmp_path, {"model_type": "vilavt"}, shard(HEADERS[name], bytes(4))))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "dangling", "loop", "folder"])
def test_what_is_no_file_is_told(tmp_path, name, kind):
    folder = folder_of(tmp_path, {"model_type": "vilavt"}, shard(b"["))
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(name if kind == "loop" else "nowhere")
    is_told(folder)


def test_millions_of_layers_are_refused_before_they_are_counted(tmp_path):
    text = {"hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8, "intermediate_size": 8}
    text |= {"num_key_value_heads": 1, "num_hidden_layers": 3_000_000}
    folder = folder_of(tmp_path, {"model_type": "vilavt", "text_config": text, "text_encoder_config": text})
    is_told(folder)
    assert "3000000, at most 10000 layers" in str(inspect_checkpoint(folder).problems)


def test_what_inspect_prints_does_nothing_to_the_terminal(tmp_path):
    config = {"model_type": "qwen3\x1b[2J", "architectures": ["[/bold]\x1b]0;title\x07"]}
    result = CliRunner().invoke(app, ["inspect", str(folder_of(tmp_path, config))])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "\x1b" not in result.output
    assert "[/bold]" in result.output


YAML = {
    "deep": "[" * 20_000,
    "deep block": "\n".join("  " * n + "a:" for n in range(1500)),
    "huge number": "a: " + "9" * 5000,
    "laughs": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)),
    "merges": "a: &a {x: 1, y: 2}\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join([f'*{chr(97 + n)}'] * 9)}]}}\n" for n in range(12)),
    "itself": "a: &a [*a]",
    "date": "a: 2020-99-99",
    "object": "a: !!python/object/apply:os.system ['true']",
    "control": "a: \x07",
}


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_configuration_is_one_line(tmp_path, name):
    path = tmp_path / "a.yaml"
    path.write_text(YAML[name])
    found, seconds, grown = measured(lambda: read_keys(path, DataError))
    if name == "merges" and not isinstance(found, Exception):
        assert max(map(len, found.values())) == 2  # PyYAML from 6.0.4 on merges a key once
        return
    assert isinstance(found, DataError)
    assert str(path) in str(found)
    assert seconds < 30
    assert grown < 100 * 2**20
    change, seconds, _ = measured(lambda: parse_change(f"a={YAML[name]}", DataError))
    assert isinstance(change, DataError) or name == "control"
    assert seconds < 30


def test_an_ordinary_alias_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert read_keys(tmp_path / "a.yaml", DataError) == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_table_of_rows_holds_no_formula(tmp_path, text):
    row = SimpleNamespace(
        line=1, question_id=text, problem_type=text, category=text, finish=text, strict=-1.0, published=None
    )
    _write_rows([SimpleNamespace(path="a.jsonl", rows=[row])], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        _, cells = csv.reader(file)
    assert cells == ["a.jsonl", "1", *[f"'{text}"] * 4, "-1.0", ""]


def test_an_error_line_does_nothing_to_the_terminal(capsys):
    say("vilavt", "a\x1b[2Jb\nc\x07\N{RIGHT-TO-LEFT OVERRIDE}d")
    line = capsys.readouterr().err
    assert line.rstrip("\n").isprintable()
    assert line.count("\n") == 1


def test_a_quotation_is_short_and_without_addresses():
    assert quoted("x" * 10_000_000) == f"{'x' * 200}… (10000000 characters)"
    assert quoted(f"bad {object()}") == "bad <object object>"
