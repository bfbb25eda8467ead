"""Checkpoints, configurations and reports that hold what nobody would write by accident."""

import csv
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from measuring import measured
from typer.testing import CliRunner

from vilavt_core.checkpoint import inspect_checkpoint
from vilavt_core.checkpoint.layout import Checkpoint
from vilavt_core.checkpoint.writing import staged_folder
from vilavt_core.cli import app
from vilavt_core.cli.showing import printable_json
from vilavt_core.data.annotations import Annotations
from vilavt_core.data.dataset import Lengths, Measure
from vilavt_core.data.unpack import DONE, unpack
from vilavt_core.ending import say
from vilavt_core.errors import CheckpointError, DataError, EpisodeError, EvaluationError
from vilavt_core.failures import PrintableFormatter, quoted
from vilavt_core.json_text import parse_json
from vilavt_core.outputs import whole_file
from vilavt_core.presets import Limits
from vilavt_core.prompts import PromptSet
from vilavt_core.settings import SETTINGS, ChatSettings, preset_of
from vilavt_core.yaml_config import parse_change, read_keys
from vilavt_eval.report import _write_rows
from vilavt_eval.result_file import RunFiles
from vilavt_eval.sharding import Shard

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


INDEXES = {
    "no map": {},
    "lists": {"weight_map": {"a": []}},
    "objects": {"weight_map": {"a": {"b": 1}, "c": None}},
    "outside": {"weight_map": {"a": "../a.safetensors", "b": "/b"}},
    "hundreds of thousands of files": {"weight_map": {f"a{n}": f"{n}.safetensors" for n in range(200_000)}},
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_nobody_wrote_is_told(tmp_path, name):
    folder = folder_of(tmp_path, {"model_type": "vilavt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEXES[name]))
    is_told(folder)
    assert len(str(inspect_checkpoint(folder).problems)) < 10_000


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


JSON = {
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep enough": b"[" * 500 + b"]" * 500,
    "digits": b'{"preset": ' + b"9" * 5000 + b"}",
    "bytes": b"\xff\xfe\x00",
    "empty": b"",
}


@pytest.mark.parametrize("name", JSON)
def test_a_hostile_json_text_is_a_value_error(name):
    found, seconds, grown = measured(lambda: parse_json(JSON[name]))
    assert isinstance(found, ValueError)
    assert seconds < 3
    assert grown < 100 * 2**20


@pytest.mark.parametrize("name", JSON)
def test_every_reader_of_json_names_the_file_that_is_hostile(tmp_path, name):
    for path, read in {
        SETTINGS: lambda _: preset_of(tmp_path),
        "a.json": Annotations,
        "a.jsonl": lambda path: list(Annotations(path)),
        "n.jsonl": lambda path: RunFiles(tmp_path, "n", {}).answered(),
    }.items():
        (tmp_path / path).write_bytes(JSON[name] + b"\n")
        found, _, _ = measured(lambda read=read, path=path: read(tmp_path / path))
        if path != "a.jsonl" or name != "empty":  # a line without anything is no record
            assert isinstance(found, CheckpointError | DataError | EvaluationError)
            assert path in str(found)
            assert len(str(found)) < 500
        (tmp_path / path).unlink()


VALUES = [*WRONG, None, float("nan"), "\x1b[2J", "x" * 1_000_000]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_settings_of_a_checkpoint_of_wrong_types_are_told(tmp_path, value):
    for key in ("preset", "limits", "note", "\x1b[2J"):
        (tmp_path / SETTINGS).write_text(json.dumps({key: value}))
        found, _, _ = measured(lambda: preset_of(tmp_path))
        if not (key == "note" and isinstance(value, str)) and not (key == "limits" and value == {}):
            assert isinstance(found, CheckpointError)
            assert len(str(found)) < 1000


@pytest.mark.parametrize(
    "value", [value for value in VALUES if value not in (5, 1.5, None, 10**40)], ids=lambda value: repr(value)[:20]
)
@pytest.mark.parametrize("name", list(Limits.__dataclass_fields__))
def test_limits_of_a_checkpoint_of_wrong_types_are_told(tmp_path, name, value):
    (tmp_path / SETTINGS).write_text(json.dumps({"limits": {name: value}}))
    found, _, _ = measured(lambda: preset_of(tmp_path))
    assert isinstance(found, CheckpointError)
    assert f"Limits.{name} is" in str(found)
    assert len(str(found)) < 1000


def test_a_limit_that_counts_is_a_whole_number():
    with pytest.raises(EpisodeError, match=r"max_turns is 1\.5, it must be a whole number"):
        Limits(max_turns=1.5)
    assert Limits(max_turns=np.int64(2), max_pixels=np.float32(1e6)).max_turns == 2


@pytest.mark.parametrize("kind", ["pipe", "dangling", "folder"])
def test_settings_that_are_no_file_are_not_passed_over(tmp_path, kind):
    path = tmp_path / SETTINGS
    {"pipe": os.mkfifo, "dangling": lambda path: path.symlink_to("nowhere"), "folder": Path.mkdir}[kind](path)
    with pytest.raises(CheckpointError, match=r"vilavt_chat\.json is no file"):
        preset_of(tmp_path)


ROW = {"question_id": "1", "response": "A"}


@pytest.mark.parametrize("value", [1.5, True, [], ["x"], {}, {"a": 1}], ids=repr)
def test_a_run_is_not_resumed_from_rows_without_a_name(tmp_path, value):
    lines = [{"run": {"format": 1}}, {**ROW, "question_id": value}]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        EvaluationError, match=r"n\.jsonl, line 2: question_id is .* it must be a text or a whole number"
    ):
        RunFiles(tmp_path, "n", {}).answered()


def planted(path: Path) -> Path:
    """A link where a file is going to be written, to one that must not be."""
    precious = path.parent / "precious"
    precious.write_text("kept")
    path.symlink_to(precious)
    return precious


def test_no_planted_link_is_written_through(tmp_path):
    for number, write in enumerate((_write_whole, _save_settings, _save_lengths, _merge_rows, _unpack)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("a", SETTINGS, "a.npz", "n.jsonl", DONE):
            for partial in (
                f".{name}.partial",
                f"{name}.partial",
                f".{name}.{os.getpid()}",
                f".{name}.{os.getpid()}.partial",
            ):
                planted(folder / partial)
        write(folder)
        assert (folder / "precious").read_text() == "kept"


def _write_whole(folder: Path) -> None:
    with whole_file(folder / "a") as file:
        file.write(b"new")
    assert (folder / "a").read_bytes() == b"new"


def _save_settings(folder: Path) -> None:
    assert ChatSettings(note="x").save(folder).is_file()


def _save_lengths(folder: Path) -> None:
    Lengths.of([Measure(1, 1, 0, 0, 1)]).save(folder / "a.npz")
    assert Lengths.load(folder / "a.npz").tokens.tolist() == [1]


def _merge_rows(folder: Path) -> None:
    files = RunFiles(folder, "n", {})
    with files.writer(Shard(0, 1)) as writer:
        writer.write(ROW)
    assert files.merge(["1"])


def _unpack(folder: Path) -> None:
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr("a", "new")
    assert unpack(folder).failures == []
    assert (folder / "a").read_text() == "new"


def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as file:
        file.write(b"new"[: 1 // 0])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"x" * 1000, "other", "short", "words", "pickle"])
def test_damaged_lengths_of_an_earlier_start_are_told(tmp_path, content):
    path, ones = tmp_path / "a.npz", np.ones(3, np.int64)
    columns = dict.fromkeys(("tokens", "trained", "image_tokens", "images", "turns", "cut_from", "pictures"), ones)
    problems = np.array("{}")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        odd = {"short": ones[:2], "words": np.array(["x"] * 3), "pickle": np.array([{}] * 3)}.get(content, ones)
        columns = {"tokens": ones} if content == "other" else {**columns, "images": odd}
        np.savez(path, problems=problems, **columns)
    with pytest.raises(DataError, match=r"a\.npz: no lengths of samples"):
        Lengths.load(path)


@pytest.mark.parametrize("name", [".", "./.", "z.zip", "./z.zip", DONE])
def test_an_entry_that_is_no_file_of_its_own_is_refused(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr(name, "evil")
        archive.writestr("b", "good")
    (failure,) = unpack(folder).failures
    assert "is no name for a file" in failure
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["in", "in/z.zip"]


def test_a_point_in_the_name_of_an_entry_is_passed_over(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("./a/./b", "good")
    assert unpack(tmp_path).failures == []
    assert (tmp_path / "a" / "b").read_text() == "good"


KILLED = """
import os, sys
from vilavt_core.checkpoint import writing

renamed, rename = [], os.rename

def killed(*names):
    if len(renamed) == int(sys.argv[2]):
        os._exit(9)
    renamed.append(names)
    rename(*names)

os.rename = killed
with writing.staged_folder(sys.argv[1], force=True) as partial:
    (partial / "config.json").write_text('{"model_type": "new"}')
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_checkpoint_whose_replacement_was_killed_is_there_or_told_where(tmp_path, renames, caplog):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "config.json").write_text('{"model_type": "old"}')
    code = subprocess.run([sys.executable, "-c", KILLED, str(target), str(renames)], timeout=120).returncode
    assert code == (0 if renames == 2 else 9)
    if renames != 1:
        assert json.loads((target / "config.json").read_text())["model_type"] == ("new" if renames else "old")
        return
    with pytest.raises(CheckpointError, match=r"mine was being replaced when its process was killed") as caught:
        Checkpoint.open(target)
    (former,) = tmp_path.glob("mine.replaced-*")
    (new,) = tmp_path.glob("mine.partial-*")
    assert str(former) in str(caught.value)
    assert str(new) in str(caught.value)
    with caplog.at_level(logging.WARNING), staged_folder(target) as partial:
        (partial / "config.json").write_text("{}")
    assert str(former) in caplog.text
    assert json.loads((former / "config.json").read_text())["model_type"] == "old"


def test_a_relative_name_of_a_folder_that_was_being_replaced_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine.replaced-7").mkdir(parents=True)
    result = CliRunner().invoke(app, ["inspect", "runs/mine"])
    assert isinstance(result.exception, CheckpointError)
    assert "was being replaced" in str(result.exception)


def test_a_log_line_does_nothing_to_the_terminal():
    record = logging.LogRecord("a", logging.WARNING, "", 1, "bad\x1b[2J%s\x9b2J", ("\x07",), None)
    line = PrintableFormatter().format(record)
    assert line.isprintable()


def test_json_on_a_terminal_is_exact_and_does_nothing_to_it():
    value = {"answer": "\x1b[2J\x9b2J\x7f 猫 \n"}
    text = printable_json(value)
    assert json.loads(text) == value
    assert text.isprintable()
    assert "猫" in text


EVIL = "\x1b[2J\x9b2J[/bold]\x07"


def test_what_commands_print_of_files_does_nothing_to_the_terminal(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "prompts.json").write_text(json.dumps({"name": EVIL, "version": EVIL, EVIL: 1}))
    for name, text in PromptSet.load("default").templates.items():
        (tmp_path / "set" / f"{name}.txt").write_text(text + EVIL)
    results = tmp_path / "r"
    results.mkdir()
    run = {"run": {"format": 1, "model": EVIL, "benchmark": EVIL}}
    rows = [run, {"question_id": EVIL, "response": EVIL, "answer": EVIL, "problem_type": EVIL, "category": EVIL}]
    (results / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    (tmp_path / "bad.jsonl").write_text(json.dumps({EVIL: EVIL, "images": [EVIL], "conversations": EVIL}) + "\n")
    commands = [
        ["prompts", "show", str(tmp_path / "set")],
        ["score", str(results)],
        ["score", str(results), "--out", str(tmp_path / "out")],
        ["view", str(results), "--out", str(tmp_path / "pages")],
        ["inspect", str(folder_of(tmp_path, {"model_type": EVIL, "architectures": [EVIL]}, shard({EVIL: EVIL})))],
        ["doctor", "--model", str(tmp_path)],
    ]
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert all(c.isprintable() or c == "\n" for c in result.output), command
