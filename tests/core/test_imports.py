"""In fresh interpreters: nothing of the core and the evaluation loads torch, and what `import vilavt_hf` does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from vilavt_core.cli import SUBCOMMANDS
from vilavt_core.tokenizer import FileTokenizer

TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
HEAVY = ("torch", "transformers", "safetensors", "accelerate", "vllm", "verl", "vlmeval", "gradio", "av", "openai")
RECORD = {
    "images": ["a.png"],
    "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "<answer>B</answer>"}],
    "queries": [""],
    "image_to_query_mapping": [0],
}
RESULT = {
    "question_id": 0,
    "problem_type": "multiple choice",
    "original_question_type": "route_planning",
    "question": "Left or right?",
    "answer": "B",
    "response": "B",
    "finish": "answer",
    "error": None,
}


def fresh(code: str, *arguments: str) -> dict:
    """What a new interpreter prints as JSON in its last line."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_module_of_the_core_and_the_evaluation_loads_torch_or_a_tokenizer():
    code = f"""
import importlib, json, pkgutil, sys
found, heavy = {{}}, ({HEAVY} + ("tokenizers",))
for package in ("vilavt_core", "vilavt_eval"):
    names = [package]
    for name in names:
        module = importlib.import_module(name)
        found[name] = [one for one in heavy if one in sys.modules]
        names += [f"{{name}}.{{info.name}}" for info in pkgutil.iter_modules(getattr(module, "__path__", ()))]
print(json.dumps(found))
"""
    found = fresh(code)
    assert {"vilavt_core.cli.data", "vilavt_core.episode", "vilavt_eval.runner", "vilavt_eval.cli.eval"} <= set(found)
    assert {name: loaded for name, loaded in found.items() if loaded} == {}


def test_commands_that_need_no_model_load_neither_torch_nor_transformers(tmp_path):
    """One after the other in one interpreter, which forgets no module; `data check` counts tokens and is the last."""
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    (tmp_path / "set.jsonl").write_text(json.dumps(RECORD) + "\n")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    head = {"run": {"benchmark": {"name": "VSI-Bench"}, "seed": 0}}
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(RESULT)}\n")
    commands = [
        ["--help"],
        ["chat", "--help"],
        ["web", "--help"],
        ["version"],
        ["inspect", str(TINY)],
        ["convert", str(TINY), str(tmp_path / "converted")],
        ["score", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "scores")],
        ["view", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "view")],
        ["push", str(tmp_path / "converted"), "me/mine", "--dry-run", "--scores", str(tmp_path / "scores/scores.json")],
        ["curve", str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "curve.png")],
        ["prompts", "show", "default"],
        ["doctor"],
        ["data", "check", str(tmp_path / "set.jsonl"), "--model", str(TINY), "--workers", "0"],
    ]
    code = f"""
import json, sys
from vilavt_core.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        found.append([arguments[0], end.code or 0, [one for one in {(*HEAVY, "tokenizers")} if one in sys.modules]])
print()
print(json.dumps(found))
"""
    found = fresh(code, json.dumps(commands))
    codes = {name: code for name, code, _ in found if name != "doctor"}  # which fails where a host has no engine
    assert codes == dict.fromkeys(codes, 0)
    assert [name for name, _, _ in found] == [command[0] for command in commands]
    assert {name: loaded for name, _, loaded in found if loaded} == {"data": ["tokenizers"]}


def test_importing_vilavt_hf_registers_the_auto_classes_and_exports_the_chat_when_it_is_used():
    code = """
import json, sys
import vilavt_hf
vilavt_hf.Video("a.mp4")
late = ("vilavt_hf.chat", "vilavt_hf.engine", "vilavt_core.episode", "transformers.training_args", "peft", "av")
lazy = [name for name in late if name in sys.modules]
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = AutoConfig.for_model("vilavt")
print(json.dumps({
    "early": lazy,
    "registered": [
        type(config).__name__,
        AutoModelForImageTextToText._model_mapping[type(config)].__name__,
        PROCESSOR_MAPPING[type(config)].__name__,
    ],
    "exported": [getattr(vilavt_hf, name).__module__ for name in vilavt_hf.__all__ if name != "__version__"],
    "chat": vilavt_hf.VilavtChat.__name__,
}))
"""
    found = fresh(code)
    assert found["early"] == []
    assert found["registered"] == ["VilavtConfig", "VilavtForConditionalGeneration", "VilavtProcessor"]
    assert {name.split(".")[0] for name in found["exported"]} == {"vilavt_hf", "vilavt_core"}  # `Video` is the core's
    assert found["chat"] == "VilavtChat"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_help_page_says_of_a_command_what_the_command_says_first(name):
    command = SUBCOMMANDS[name].load(name)
    assert "--install-completion" not in {option for parameter in command.params for option in parameter.opts}
    first_paragraph = " ".join(command.help.split("\n\n")[0].split())
    assert SUBCOMMANDS[name].help == re.split(r"(?<=\.) ", first_paragraph)[0]


@pytest.fixture(scope="module", params=[".", "query_tokenizer"])
def tokenizers(request):
    """Ours and transformers', of a shipped folder."""
    return FileTokenizer(TINY / request.param), AutoTokenizer.from_pretrained(TINY / request.param)


TEXTS = [
    "",
    " two  spaces\n\nand lines\t",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>which?<|im_end|>\n",
    "<|image_pad|><|im_end",
    "图中的路牌上写着什么？",
    "emoji 👩‍👩‍👧 and a\u0301ccents, \u202eright to left",
    "\x00 \x7f \ufffd \ufeff",
    '<tool>{"region": [{"index": 0, "bbox_2d": [0, 0, 28, 28]}], "query": "the sign"}</tool>',
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_tokenizer_of_a_file_gives_the_ids_that_transformers_gives(tokenizers, text):
    assert_same(tokenizers, text)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizers_agree_on_any_text(tokenizers, text):
    assert_same(tokenizers, text)
    assert_same(tokenizers, f"<|im_start|>{text}<|im_end|>")


def assert_same(tokenizers, text: str) -> None:
    ours, theirs = tokenizers
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)
    split = ours.encode(text, split_special_tokens=True)
    assert split == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    for skip in (False, True):
        decoded = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == decoded


def test_a_lone_surrogate_is_refused_by_both_alike(tokenizers):
    """It is no text that UTF-8 can hold; an episode replaces it before."""
    errors = []
    for tokenizer in tokenizers:
        with pytest.raises((TypeError, UnicodeEncodeError)) as refused:
            tokenizer.encode("\ud800", add_special_tokens=False)
        errors.append(refused.type)
    assert errors[0] is errors[1]


def test_the_tokenizers_have_the_same_vocabulary(tokenizers):
    ours, theirs = tokenizers
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    for token in ("<|image_pad|>", "<|im_end|>"):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)
    assert ours.convert_tokens_to_ids("<|no such token|>") is None
