"""A checkpoint may name code of its own; none of our loaders runs it, or asks whether it may."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from vilavt_core.errors import CheckpointError
from vilavt_hf import VilavtChat, VilavtProcessor

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "vilavt-tiny"
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
CONFIGS += ("query_tokenizer/tokenizer_config.json",)
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A checkpoint that names a module beside its weights everywhere."""
    folder = tmp_path / "evil"
    shutil.copytree(CHECKPOINT, folder)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil:\n    pass\n"
    named = dict.fromkeys(CLASSES, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in CONFIGS:
        path = folder / name
        if path.is_file():
            (path.parent / "evil.py").write_text(code)
            values = json.loads(path.read_text()) | {"auto_map": named, "tokenizer_class": "Evil"}
            values |= {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"}
            path.write_text(json.dumps(values))

    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "n")
    yield folder
    assert asked == []
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("modules/**/evil.py"))


@pytest.mark.parametrize("load", [VilavtProcessor.from_pretrained, VilavtChat.from_pretrained])
def test_no_code_of_a_checkpoint_runs(evil, load):
    found = _loaded(lambda: load(evil))
    assert not isinstance(found, Exception) or "evil" in str(found)


@pytest.mark.parametrize("name", [name for name in CONFIGS if (CHECKPOINT / name).is_file()])
def test_a_checkpoint_that_names_code_in_one_place_is_loaded_without_it_or_refused(evil, name):
    for other in CONFIGS:
        if other != name and (CHECKPOINT / other).is_file():
            shutil.copy(CHECKPOINT / other, evil / other)
    found = _loaded(lambda: VilavtChat.from_pretrained(evil))
    if isinstance(found, Exception):
        assert "evil" in str(found)
    else:
        assert type(found.model).__module__.startswith("vilavt_hf.")
        assert "evil" not in str(found.model.config._attn_implementation)


def _loaded(load):
    """What it loads, or how it was refused: by us, or by transformers, which says that code would have to run."""
    try:
        return load()
    except (CheckpointError, ValueError) as error:
        return error


AUTO = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoModel")


def calls_of_auto_classes() -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted(ROOT.glob("vilavt_*/src/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
                and ast.unparse(node.func.value).rpartition(".")[2].startswith(AUTO)
            ):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_class_that_chooses_by_what_a_checkpoint_says_is_told_to_run_nothing():
    calls = calls_of_auto_classes()
    assert len(calls) >= 4
    for place, call in calls:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False" or None in said, place
