"""Ablations of any checkpoint: what each takes away, and who can carry it out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vilavt_core.conversation import Inquiry
from vilavt_core.episode import Episode
from vilavt_core.errors import EvaluationError
from vilavt_core.presets import Limits
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import Region, ToolCall, format_turn
from vilavt_core.regions import View
from vilavt_core.results import Intervention, Sample
from vilavt_eval.ablation import ABLATIONS, Ablation, random_boxes, with_query
from vilavt_eval.evaluation_preset import EvaluationPreset, known_presets
from vilavt_hf.chat import VilavtChat


def views(*sizes):
    return [View(Image.new("RGB", size), 0) for size in sizes]


def test_names_are_parsed_joined_and_unknown_ones_refused():
    assert Ablation.parse("") == Ablation()
    assert str(Ablation()) == "full"
    assert Ablation().intervention is None
    both = Ablation.parse("no-query+no-joint")
    assert both == Ablation.parse("no-joint+no-query+no-query")
    assert str(both) == "no-joint+no-query"
    with pytest.raises(EvaluationError, match=r"no ablation 'no-text'; known are no-zoom, no-query, .*join"):
        Ablation.parse("no-query+no-text")


@pytest.mark.parametrize("backend", ["vllm", "server"])
def test_a_backend_that_runs_the_model_as_it_is_can_only_leave_the_zoom_out(backend):
    for name in ABLATIONS:
        ablation = Ablation.parse(name)
        ablation.check("hf")
        if name == "no-zoom":
            ablation.check(backend)
            assert ablation.limits(Limits(max_images=9)) == Limits(max_images=9, max_turns=1)
            assert ablation.intervention is None
        else:
            assert ablation.limits(Limits()) is None
            with pytest.raises(EvaluationError, match=f"--ablate {name} .*the backend '{backend}'.*--backend hf"):
                ablation.check(backend)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", known_presets())
def test_without_zoom_no_preset_offers_it(name, count, tokenizer):
    preset = EvaluationPreset.load(name).of_episode()
    images, cap = [Image.new("RGB", (56, 56))] * count, replace(preset.limits, max_pixels=28 * 28 * 16)
    for limits, offered in ((cap, True), (Ablation.parse("no-zoom").limits(cap), False)):
        episode = Episode.start(images, "Which?", tokenizer=tokenizer, preset=preset, limits=limits)
        asked = episode.transcript.rpartition("<|im_start|>user")[2]
        assert "Which?" in asked
        assert ("<tool>" in asked, "a closer look is not available" in asked) == (offered, not offered)


def test_parts_taken_away_together_are_all_taken_away():
    images = tuple(Image.new("RGB", (28, 28)) for _ in range(3))
    inquiry = Inquiry(images, "which?", (1, 2, 3))
    hooks = Ablation.parse("no-query+no-joint+random-box+no-reencode+no-zoom").intervention
    parts = hooks.transform_inquiry(Sample([], ""), inquiry)
    assert [(part.query, part.image_indices) for part in parts] == [("", (1,)), ("", (2,)), ("", (3,))]
    assert hooks.transform_regions is random_boxes
    assert not hooks.reencode


def test_what_cannot_happen_together_is_refused():
    own = {"left": Intervention(transform_regions=lambda sample, regions, shown: regions)}
    assert Ablation.parse("left", own).intervention.transform_regions is own["left"].transform_regions
    with pytest.raises(EvaluationError, match=r"left\+random-box: two of them change the same boxes"):
        _ = Ablation.parse("random-box+left", own).intervention


@given(
    st.tuples(st.integers(28, 600), st.integers(28, 600)),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.integers(0, 2**48),
)
def test_a_random_box_has_the_size_of_the_real_one_lies_on_the_image_and_does_not_overlap_it(size, box, seed):
    width, height = size
    x1, x2 = sorted((box[0] * width, box[1] * width))
    y1, y2 = sorted((box[2] * height, box[3] * height))
    (moved,) = random_boxes(Sample([], "", seed=seed), [Region(0, (x1, y1, x2, y2))], views(size))
    a, b, c, d = moved.box
    assert (c - a, d - b) == pytest.approx((x2 - x1, y2 - y1), abs=1e-6)
    if x2 - x1 < 1 or y2 - y1 < 1:
        assert moved.box == (x1, y1, x2, y2)
        return
    assert min(a, b) >= -1e-6
    assert c <= width + 1e-6
    assert d <= height + 1e-6
    if max(x1, width - x2) >= x2 - x1 + 1e-6 or max(y1, height - y2) >= y2 - y1 + 1e-6:  # there is room beside it
        overlap = max(0, min(c, x2) - max(a, x1)) * max(0, min(d, y2) - max(b, y1))
        assert overlap <= 1e-3


def test_a_random_box_depends_on_the_samples_seed_and_not_on_the_batch():
    regions = (Region(0, (0, 0, 28, 28)), Region(0, (56, 0, 84, 28)))
    shown = views((560, 560))
    first = random_boxes(Sample([], "", seed=1), regions, shown)
    assert first == random_boxes(Sample([], "", seed=1), regions, shown)
    assert len({tuple(random_boxes(Sample([], "", seed=s), regions, shown)) for s in range(20)}) > 15


def test_a_region_that_cannot_be_cropped_stays_and_is_refused_as_usual():
    regions = (Region(3, (0, 0, 28, 28)), Region(0, (50, 0, 20, 28)), Region(0, (0, 0, 900, 28)))
    assert tuple(random_boxes(Sample([], "", seed=1), regions, views((84, 84)))) == regions


@pytest.fixture(scope="module")
def chat(tiny_model, processor):
    limits = Limits(max_turns=2, max_new_tokens_per_turn=96, max_pixels=28 * 28 * 64)
    return VilavtChat(tiny_model, processor, limits=limits, prompts=PromptSet.load("default"))


def asked(chat, box, picture, **hooks):
    """A conversation that zooms into `box`."""
    turn = format_turn(ToolCall((Region(0, box),), "what?"))
    intervention = Intervention(forced_turns=lambda sample, number: turn if number == 0 else None, **hooks)
    ((_, result),) = chat.iter_many([Sample([picture], "what?")], intervention=intervention)
    if result.error is not None:
        raise result.error
    return result


def sampled(result):
    """Log-probabilities of the sampled tokens."""
    return [value for value in result.record.logprobs if value is not None]


def noise(width, height):
    """The same for every run."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def difference(a, b):
    """Of the first sampled token's log-probability."""
    return abs(sampled(a)[0] - sampled(b)[0])


def test_without_reencoding_the_whole_image_looks_as_it_did_at_first(chat):
    picture = noise(112, 84)
    whole = (0, 0, 112, 84)
    plain = asked(chat, whole, picture, transform_inquiry=ABLATIONS["no-query"].transform_inquiry)
    reused = asked(chat, whole, picture, reencode=False)
    assert reused.record.token_ids == plain.record.token_ids
    assert sampled(plain)
    assert sampled(reused) == pytest.approx(sampled(plain), abs=1e-4)
    assert plain.work.patches_encoded == 2 * reused.work.patches_encoded
    assert reused.work.patches_ratio == pytest.approx(1)


def test_without_reencoding_nothing_is_encoded_and_the_query_changes_nothing(chat):
    picture = noise(448, 336)
    corner = (0, 0, 56, 56)
    other = with_query(lambda sample: "another query")
    plain, encoded = asked(chat, corner, picture, reencode=False), asked(chat, corner, picture)
    swapped = asked(chat, corner, picture, reencode=False, transform_inquiry=other)
    assert plain.work.patches_encoded == 4 * plain.views[0].tokens < encoded.work.patches_encoded
    assert [view.image.size for view in plain.views] == [view.image.size for view in encoded.views]
    assert plain.record.token_ids == swapped.record.token_ids
    assert sampled(plain) == pytest.approx(sampled(swapped), abs=1e-6)
    # The same model tells a new query (by 5e-4 here) and a new look from the old one, a hundred times the tolerance.
    assert difference(encoded, asked(chat, corner, picture, transform_inquiry=other)) > 1e-4
    assert difference(encoded, plain) > 1e-3


def test_a_crop_of_a_crop_takes_its_features_from_the_original(chat):
    picture = noise(112, 84)
    calls = [ToolCall((Region(0, (0, 0, 112, 84)),), "a"), ToolCall((Region(1, (0, 0, 56, 42)),), "b")]
    turns = [format_turn(call) for call in calls]
    hooks = Intervention(forced_turns=lambda sample, i: turns[i] if i < 2 else None, reencode=False)
    limits = replace(chat.settings.limits, max_turns=3)
    ((_, result),) = chat.iter_many([Sample([picture], "what?", limits=limits)], intervention=hooks)
    assert result.error is None
    assert len(result.views) == 3
    assert result.work.patches_encoded == 4 * result.views[0].tokens
