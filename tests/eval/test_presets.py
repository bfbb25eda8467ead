"""Presets of an evaluation: files that say everything, and backends that are made to follow them."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from vilavt_core.errors import EngineError, EvaluationError
from vilavt_core.presets import PRESETS, Limits
from vilavt_core.results import Sample
from vilavt_eval.ablation import Ablation
from vilavt_eval.evaluation_preset import FOLDER, EvaluationPreset, known_presets
from vilavt_eval.runner import Setting

TINY = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")
PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "scene-1.png"


def test_there_is_a_file_per_variant_and_it_says_what_the_episode_preset_says():
    assert set(known_presets()) == set(PRESETS)
    for name in known_presets():
        preset, rules = EvaluationPreset.load(name), PRESETS[name]
        assert preset.name == preset.episode == name
        expected = rules if name != "default" else replace(rules, interleave=True)  # benchmarks mark images' places
        assert preset.of_episode() == expected


@pytest.mark.parametrize(
    "change, said",
    [
        ({"heat": 1}, "heat"),
        ({"precision": None}, "precision"),
        ({"limits": {**asdict(Limits()), "max_turn": 3}}, "unknown max_turn"),
        ({"limits": {"max_turns": 3}}, "missing .*max_images"),
        ({"sampling": {"temperature": 0}}, "missing repetition_penalty"),
        ({"limits": {**asdict(Limits()), "max_turns": 0}}, "max_turns is 0, it must be at least 1"),
        ({"episode": "mine"}, "no episode preset 'mine'; known are default"),
    ],
)
def test_a_key_that_is_unknown_missing_or_wrong_is_named_with_its_file(tmp_path, change, said):
    data = yaml.safe_load((FOLDER / "default.yaml").read_text()) | change
    if change == {"precision": None}:
        del data["precision"]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(EvaluationError, match=f"mine.yaml: .*{said}"):
        EvaluationPreset.load(file)


def test_a_file_of_ones_own_works_by_its_path_and_gives_the_name(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text((FOLDER / "rl.yaml").read_text().replace("max_turns: 5", "max_turns: 2"))
    preset = EvaluationPreset.load(file)
    assert (preset.name, preset.limits.max_turns, preset.sampling.temperature) == ("short", 2, 1.0)
    with pytest.raises(EvaluationError, match=r"no preset 'nope'; known are default, .*or give the path"):
        EvaluationPreset.load("nope")


def test_single_fields_can_be_set_and_unknown_ones_are_refused():
    preset = EvaluationPreset.load("default", {"max_turns": 2, "temperature": 0.5, "precision": "float32"})
    assert (preset.limits.max_turns, preset.sampling.temperature, preset.precision) == (2, 0.5, "float32")
    assert preset.set_limits == ("max_turns",)
    for wrong in ({"turns": 2}, {"version": 2}, {"limits": {}}):
        with pytest.raises(EvaluationError, match=f"no '{next(iter(wrong))}' to set; it has episode, "):
            EvaluationPreset.load("default", wrong)
    with pytest.raises(EvaluationError, match="precision"):
        EvaluationPreset.load("default", {"precision": "int3"})


def test_a_checkpoints_own_limits_hold_unless_they_are_set_by_hand():
    plain = Setting(TINY, "hf", EvaluationPreset.load("rl", {"precision": "float32"})).open()
    assert (plain.settings.limits.max_pixels, plain.settings.limits.max_turns, plain.settings.sampling.temperature) == (
        28224,
        5,
        1.0,
    )
    assert plain.settings.preset.bad_call == "end"
    by_hand = EvaluationPreset.load("rl", {"precision": "float32", "max_new_tokens_per_turn": 7})
    assert Setting(TINY, "hf", by_hand).open().settings.limits.max_new_tokens_per_turn == 7


def test_other_prompts_than_the_preset_pins_are_refused():
    preset = EvaluationPreset.load("default", {"prompts_sha256": "0" * 64})
    with pytest.raises(EvaluationError, match=r"asked with the prompts 'tiny' of hash .* wants 0000.*--set prompts"):
        Setting(TINY, "hf", preset).open()


def test_a_server_is_asked_for_the_presets_limits_and_sampling(start_stub):
    stub = start_stub()
    preset = EvaluationPreset.load("default", {"temperature": 0.3, "max_turns": 3})
    backend = Setting(stub.url, "server", preset).open()
    ablation = Ablation.parse("no-zoom")
    limits = ablation.limits(backend.provenance(0).limits)
    for sample in (Sample([PICTURE], "?"), Sample([PICTURE], "?", limits=limits)):
        list(backend.iter_many([sample]))
    assert [request["temperature"] for request in stub.requests] == [0.3, 0.3]
    assert [request["vilavt"]["max_turns"] for request in stub.requests] == [3, 1]


@pytest.mark.parametrize(
    "changes, error, said",
    [
        (
            {"precision": "bfloat16"},
            EvaluationError,
            "computes in float32, .* asks for bfloat16; start the server with",
        ),
        ({"query_prefix": "Query: "}, EvaluationError, "own preset's '' before queries, .* asks for 'Query: '; use"),
        ({"max_turns": 50}, EvaluationError, "allows max_turns=5, --set asks for 50; restart the server"),
        ({"prompts": "default"}, EngineError, "does not support prompts='default'"),
        ({"episode": "rl"}, EngineError, "runs the preset 'default', 'rl' was asked for"),
    ],
)
def test_what_a_server_cannot_follow_is_refused(start_stub, changes, error, said):
    with pytest.raises(error, match=said):
        Setting(start_stub().url, "server", EvaluationPreset.load("default", changes)).open()
