"""What a preset stands for, and the conversations it leads to, frozen as text.

To accept a wanted change: delete the snapshot and run this file; a missing snapshot is written and the test fails once.
"""

from dataclasses import fields
from pathlib import Path

import pytest
from new_limit import with_a_new_limit
from PIL import Image

from vilavt_core.episode import Episode
from vilavt_core.errors import CheckpointError, EpisodeError
from vilavt_core.presets import FULL_PIXELS, PRESETS, Limits, Sampling, get_preset, value_type
from vilavt_core.prompts import PromptSet
from vilavt_core.settings import SETTINGS, preset_of

SNAPSHOTS = Path(__file__).parent / "snapshots"
ZOOM = (
    '<think>Too small.</think><tool>{"region": [{"index": 0, "bbox_2d": [0, 0, 84, 56]}], "query": "the sign"}</tool>'
)
BAD = '<tool>{"region": [{"index": 7, "bbox_2d": [0, 0, 84, 56]}], "query": "the sign"}</tool>'
ANSWER = "<think>It says stop.</think><answer>stop</answer>"


def converse(episode: Episode, *texts: str) -> Episode:
    for text in texts:
        if episode.next_request() is None:
            break
        episode.feed([*episode.tokenizer.encode(text), episode.special.im_end])
    return episode


def images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", size) for size in ((640, 480), (480, 640), (640, 480))[:count]]


def snapshot(name: str, text: str) -> None:
    path = SNAPSHOTS / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
        pytest.fail(f"{path.name} was missing and has been written; read it and run again")
    assert text == path.read_bytes().decode()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_conversation_of_a_preset_is_frozen(preset, count, tokenizer):
    limits = Limits(max_turns=3, max_images=6, max_pixels=201 * 28 * 28)
    episode = Episode.start(images(count), "What does the sign say?", tokenizer=tokenizer, preset=preset, limits=limits)
    converse(episode, ZOOM, BAD, ANSWER)
    snapshot(f"{preset}-{count}", f"{episode.transcript}\n[{episode.finish}: {episode.result.answer}]\n")


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_the_rarer_turns_of_a_prompt_set_are_frozen(name, tokenizer):
    prompts = PromptSet.load(name)
    kwargs = {"tokenizer": tokenizer, "prompts": prompts}
    limits = Limits(max_turns=4, max_images=2, max_pixels=101 * 28 * 28)
    full = converse(Episode.start(images(1), "What?", limits=limits, **kwargs), "hm", ZOOM, ZOOM, ANSWER)
    follow_up = converse(full.follow_up("And below?"), "<answer>go</answer>")
    single = Episode.start(images(2), "What?", limits=Limits(max_turns=1, max_pixels=101 * 28 * 28), **kwargs)
    forced = converse(
        Episode.start(images(2), "What?", preset="eval-hf", limits=Limits(max_turns=1), **kwargs), "hm"
    ).fallback()
    converse(forced, "stop")
    texts = [follow_up.transcript, single.transcript, f"{forced.transcript}\n[{forced.result.answer}]"]
    snapshot(f"{name}-rarer-turns", "\n==========\n".join(texts) + "\n")


def test_presets_state_the_published_settings():
    table = {
        name: (
            p.limits.max_turns,
            p.limits.max_images,
            p.limits.max_new_tokens_per_turn,
            p.budget_split,
            p.bad_call,
            p.query_prefix,
        )
        for name, p in PRESETS.items()
    }
    assert table == {
        "default": (5, 52, 2048, "per_image", "feedback", ""),
        "rl": (5, 52, 2048, "per_image", "end", ""),
        "eval-vllm": (10, 50, 16384, "total", "final", ""),
        "eval-hf": (2, 10_000, 2048, "total", "final", "Query: "),
        "vlmevalkit": (5, 10_000, 4096, "per_image", "final", ""),
    }
    assert all(p.limits.max_pixels == FULL_PIXELS == 6_422_528 for p in PRESETS.values())


def test_unknown_presets_and_impossible_limits_are_refused():
    with pytest.raises(EpisodeError, match="no preset 'sft'; known are default, rl"):
        get_preset("sft")
    with pytest.raises(EpisodeError, match="max_turns is 0"):
        Limits(max_turns=0)
    with pytest.raises(EpisodeError, match="max_context is 0"):
        Limits(max_context=0)
    with pytest.raises(EpisodeError, match="crop_max_pixels is 100, below min_pixels 3136"):
        Limits(crop_max_pixels=100)


def test_limits_of_a_preset_can_be_changed():
    assert get_preset("rl").with_limits(max_turns=7).limits.max_turns == 7
    assert PRESETS["rl"].limits.max_turns == 5


def test_a_limit_that_is_no_number_is_refused_by_name():
    with pytest.raises(EpisodeError, match=r"max_turns is '5', it must be a whole number$"):
        Limits(max_turns="5")
    with pytest.raises(EpisodeError, match="max_context is '5', it must be a whole number, or None for unlimited"):
        Limits(max_context="5")
    with pytest.raises(EpisodeError, match="max_turns is None, it must be a whole number"):
        Limits(max_turns=None)


def test_a_wrong_limit_of_a_checkpoint_is_named_with_its_file(tmp_path):
    (tmp_path / SETTINGS).write_text('{"limits": {"max_turns": "5"}}')
    with pytest.raises(CheckpointError, match=rf"{SETTINGS}: Limits.max_turns is '5'"):
        preset_of(tmp_path)


def test_every_limit_and_every_sampling_setting_is_described_and_has_a_type():
    for kind in (Limits, Sampling):
        for field in fields(kind):
            assert field.metadata["help"]
            assert value_type(kind, field.name) in (int, float)
    assert set(Limits.per_request()) == {f.name for f in fields(Limits)} - {"min_pixels"}


def test_a_new_limit_is_one_edit(tmp_path):
    """See the tests of the same name of the server and of VLMEvalKit."""
    found = with_a_new_limit(f"""
from dataclasses import asdict
from pathlib import Path
from vilavt_core.backends import BackendOptions
from vilavt_core.client import PER_REQUEST
from vilavt_core.presets import get_preset
from vilavt_core.settings import preset_of, save_chat_settings
from vilavt_eval.evaluation_preset import EvaluationPreset, known_presets

folder = Path({str(tmp_path)!r})
save_chat_settings(folder, limits={{"max_zooms": 3}})
changed = EvaluationPreset.load("default", {{"max_zooms": 4}})
refused = []
for wrong in (0, "many"):
    try:
        EvaluationPreset.load("default", {{"max_zooms": wrong}})
    except Exception as error:
        refused.append(str(error))
found = {{
    "per request": "max_zooms" in PER_REQUEST,
    "checkpoint": preset_of(folder).limits.max_zooms,
    "options": BackendOptions(limits={{"max_zooms": 2}}).change_limits(get_preset("rl").limits).max_zooms,
    "evaluation": [changed.of_episode().limits.max_zooms, changed.options().limits],
    "shipped": [EvaluationPreset.load(name).limits.max_zooms for name in known_presets()],
    "refused": refused,
}}
""")
    refused = found.pop("refused")
    assert found == {
        "per request": True,
        "checkpoint": 3,
        "options": 2,
        "evaluation": [4, {"max_zooms": 4}],
        "shipped": [None] * len(PRESETS),
    }
    assert "max_zooms is 0, it must be at least 1" in refused[0]
    assert "max_zooms" in refused[1]


def test_unknown_limits_of_a_preset_are_refused_by_name():
    with pytest.raises(EpisodeError, match=r"unknown limits max_turn; known are max_turns, "):
        get_preset("rl").with_limits(max_turn=3)
