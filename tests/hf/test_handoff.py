"""A checkpoint that one transformers writes is the same checkpoint to every other one, and to every vLLM.

With ``VILAVT_HANDOFF=FOLDER`` each version writes checkpoints into ``FOLDER/VERSION`` with what it makes of them, and
reads those that other versions have left there; ``tests/vllm/test_handoff.py`` reads them in vLLM. nox sets it.
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from vilavt_core.shipped import read_demo_questions
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, VilavtProcessor, compat
from vilavt_hf.chat import VilavtChat

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY, PICTURES = EXAMPLES / "vilavt-tiny", EXAMPLES / "pictures"
HANDOFF = os.environ.get("VILAVT_HANDOFF")
MIN_PIXELS, MAX_PIXELS = 28 * 28 * 5 + 11, 28 * 28 * 37 + 13
"""Of no checkpoint and no default."""
SIZES = ((672, 672), (30, 30), (56, 500), (200, 150))
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = "".join(map(chr, range(32, 127))) + " Größe 文字 <|im_end|><tool>x</tool>"
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.05, "do_sample": True}

pytestmark = pytest.mark.skipif(HANDOFF is None, reason="VILAVT_HANDOFF names no folder; nox sets it")


def a_model(tied: bool) -> VilavtForConditionalGeneration:
    """vilavt-tiny, its head tied to the embedding or of its own."""
    source = VilavtForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    config = VilavtConfig.from_pretrained(TINY)
    config.tie_word_embeddings = tied
    config.text_config.tie_word_embeddings = tied
    model = VilavtForConditionalGeneration(config).eval()
    weights = {name: tensor for name, tensor in source.state_dict().items() if not tied or name != "lm_head.weight"}
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= ({"lm_head.weight"} if tied else set())
    if tied:
        model.tie_weights()
    model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, **SAMPLING)
    return model


def a_processor() -> VilavtProcessor:
    own = VilavtProcessor.from_pretrained(TINY)
    return VilavtProcessor(
        compat.PilImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS),
        own.tokenizer,
        query_tokenizer=own.query_tokenizer,
        prompts=own.prompts,
        query_prefix="Query: ",
        max_query_length=23,
    )


def prompts() -> list[dict]:
    """What the next token is asked after: a picture, and one with two regions under a query."""
    first = f"<|im_start|>user\n{IMAGE}What is it?<|im_end|>\n<|im_start|>assistant\n"
    call = '<tool>{"region":[{"index":0,"bbox_2d":[0,0,28,28]}],"query":"the red card"}</tool><|im_end|>\n'
    later = f"{first}{call}<|im_start|>user\n{IMAGE}{IMAGE}Go on.<|im_end|>\n<|im_start|>assistant\n"
    names = [f"picture-{i}.png" for i in range(3)]
    return [{"text": first, "images": names[:1]}, {"text": later, "images": names}]


@torch.no_grad()
def found_in(folder: Path, converse: bool = True) -> tuple[dict[str, torch.Tensor], dict]:
    """What the installed transformers makes of a checkpoint, in conversations too if it is to `converse`."""
    chat = VilavtChat.from_pretrained(folder, dtype=torch.float32, device="cpu")
    model, processor = chat.model, chat.processor
    tensors = {"query_row": processor.tokenize_queries(["the red card", ""])[0]}
    counts = []
    for width, height in SIZES:
        grid = processor(text=IMAGE, images=[Image.new("RGB", (width, height))])["image_grid_thw"]
        counts.append(int(grid.prod()) // 4)
    for number, prompt in enumerate(prompts()):
        images = [Image.open(folder / "expected" / "pictures" / name).convert("RGB") for name in prompt["images"]]
        inputs = processor(text=prompt["text"], images=images, return_tensors="pt")
        tensors[f"tokens.{number}"] = inputs["input_ids"][0]
        tensors[f"logprobs.{number}"] = model(**inputs).logits[0, -1].float().log_softmax(-1)
    said = {}
    if converse:
        questions = read_demo_questions(PICTURES / "questions.json")
        results = chat.ask_many([(q.sources, q.question) for q in questions])
        assert [result.error for result in results] == [None] * len(results)
        said["transcripts"] = [[turn.text for turn in result.turns] for result in results]
        said["answers"] = [result.answer for result in results]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    generation = model.generation_config
    return tensors, {
        **said,
        "image_tokens": counts,
        "text_ids": processor.tokenizer(TEXT)["input_ids"],
        "query_prefix": processor.query_prefix,
        "max_query_length": processor.max_query_length,
        "prompts_sha256": chat.settings.prompts.sha256,
        "limits": repr(chat.settings.limits),
        "preset": chat.settings.preset.name,
        "chat": processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "ties": bool(model.config.tie_word_embeddings),
        "architectures": model.config.architectures,
        "rope_theta": [_theta(model.config.text_config), _theta(model.config.text_encoder_config)],
        "sampling": {name: getattr(generation, name) for name in SAMPLING},
        "eos": generation.eos_token_id,
        "special": {name: getattr(processor.tokenizer, name) for name in ("eos_token", "pad_token", "padding_side")},
        "model_max_length": processor.tokenizer.model_max_length,
    }


def _theta(config) -> float:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or config.rope_theta


@contextlib.contextmanager
def taking_turns(how: int):
    """Among sessions that run at once: one replaces (``LOCK_EX``), or all read (``LOCK_SH``)."""
    Path(HANDOFF).mkdir(parents=True, exist_ok=True)
    with (Path(HANDOFF) / "lock").open("w") as file:
        fcntl.flock(file, how)
        yield


def checkpoints() -> list[Path]:
    """All that were handed over; that there is none is a failure, not a reason to skip."""
    found = sorted(path.parents[1] for path in Path(HANDOFF).glob("*/*/expected/found.json"))
    assert found, f"{HANDOFF} holds no checkpoint: run `nox -s hf_newest hf_oldest` before"
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_this_version_hands_a_checkpoint_over(tied, tmp_path):
    torch.set_num_threads(1)
    folder = tmp_path / "checkpoint"
    a_model(tied).save_pretrained(folder)
    a_processor().save_pretrained(folder)
    shutil.copy(TINY / "vilavt_chat.json", folder)
    (folder / "expected" / "pictures").mkdir(parents=True)
    for number, size in enumerate([(200, 150), (84, 56), (61, 97)]):
        Image.effect_noise(size, 80 + number).convert("RGB").save(
            folder / "expected" / "pictures" / f"picture-{number}.png"
        )
    tensors, rest = found_in(folder)
    assert rest["tied"] == rest["ties"] == tied
    assert rest["image_tokens"][0] <= MAX_PIXELS // 28**2
    save_file(tensors, folder / "expected" / "found.safetensors")
    expected = {"transformers": transformers.__version__, "prompts": prompts(), "sizes": SIZES, **rest}
    (folder / "expected" / "found.json").write_text(json.dumps(expected, indent=1))
    target = Path(HANDOFF) / transformers.__version__ / ("tied" if tied else "untied")
    with taking_turns(fcntl.LOCK_EX):
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, target)


@pytest.fixture
def handed_over():
    with taking_turns(fcntl.LOCK_SH):
        yield checkpoints()


def test_every_checkpoint_that_was_handed_over_is_the_same_here(handed_over):
    torch.set_num_threads(1)
    for folder in handed_over:
        expected = json.loads((folder / "expected" / "found.json").read_text())
        tensors, rest = found_in(folder)
        for name, value in rest.items():
            assert json.loads(json.dumps(value)) == expected[name], f"{name} of {folder}"
        for name, tensor in load_file(folder / "expected" / "found.safetensors").items():
            assert tensors[name].shape == tensor.shape, f"{name} of {folder}"
            assert float((tensors[name] - tensor).abs().max()) <= 1e-3, f"{name} of {folder}"


def test_what_the_installed_version_saves_again_is_still_the_same(handed_over, tmp_path):
    """Reading and saving is what a training does: nothing of what another version wrote may be lost on the way. Equal
    log-probabilities make equal conversations, which the test before this one compares.
    """
    torch.set_num_threads(1)
    for number, folder in enumerate(handed_over):
        again = tmp_path / str(number)
        VilavtForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).save_pretrained(again)
        VilavtProcessor.from_pretrained(folder).save_pretrained(again)
        shutil.copy(folder / "vilavt_chat.json", again)
        shutil.copytree(folder / "expected", again / "expected")
        tensors, rest = found_in(again, converse=False)
        expected = json.loads((folder / "expected" / "found.json").read_text())
        for name, value in rest.items():
            assert json.loads(json.dumps(value)) == expected[name], f"{name} of {folder} saved again"
        for name, tensor in load_file(folder / "expected" / "found.safetensors").items():
            assert float((tensors[name] - tensor).abs().max()) <= 1e-3, f"{name} of {folder} saved again"
