"""The tiny model: scenes, the token stream it is trained on, and what the shipped checkpoint reaches."""

import dataclasses
import json
import re
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from vilavt_core.checkpoint import fingerprint as checkpoint_fingerprint
from vilavt_core.checkpoint import inspect_checkpoint
from vilavt_core.conversation import Inquiry
from vilavt_core.data.check import check
from vilavt_core.data.example import IGNORE, ImageGroup
from vilavt_core.data.registry import Registry
from vilavt_core.episode import Episode
from vilavt_core.errors import EvaluationError
from vilavt_core.presets import Limits
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn, parse_turn
from vilavt_core.regions import Gallery, View
from vilavt_core.results import Sample
from vilavt_core.sft_config import SftConfig
from vilavt_core.shipped import read_demo_questions
from vilavt_core.sources import Video
from vilavt_core.video import VideoLimits, read_frames
from vilavt_eval.ablation import ABLATIONS, Ablation
from vilavt_eval.statistics import wilson
from vilavt_hf.tiny import benchmark as questions
from vilavt_hf.tiny import build as building
from vilavt_hf.tiny import evaluate as evaluation
from vilavt_hf.tiny.benchmark import SceneTask
from vilavt_hf.tiny.records import REGISTRY, write_new_lesson, write_training_set
from vilavt_hf.tiny.scenes import (
    ACROSS_KINDS,
    CELL,
    CLIP_KINDS,
    CROP,
    MAX_PIXELS,
    PHOTOGRAPHS,
    SHOWN,
    QuestionKind,
    ask_about,
    grounds,
    make_scene,
    query_for,
    scan_ids,
    scene_about,
)
from vilavt_hf.tiny.teacher import Encoder, direct_example, episode_example, order_example
from vilavt_hf.tiny.tiny_model import fast_encoder, tiny_processor
from vilavt_hf.train.run import Run, make_dataset

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "vilavt-tiny"
PICTURES = ROOT / "examples" / "pictures"


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def encoder(processor):
    return Encoder(processor.tokenizer, processor.prompts)


def scene_and_question(kind, seed=0, split="train"):
    rng = np.random.default_rng([seed, list(QuestionKind).index(kind)])
    scene = scene_about(rng, split, kind)
    return scene, ask_about(rng, scene, kind), rng


CALLED = [kind for kind in QuestionKind if kind not in (QuestionKind.WHICH, QuestionKind.FRAME)]
"""Kinds whose ideal way has a zoom."""


def test_no_scan_and_no_photograph_is_in_two_splits():
    photographs = [name for names in PHOTOGRAPHS.values() for name in names]
    assert len(set(photographs)) == len(photographs)
    splits = [set(scan_ids(name).tolist()) for name in ("train", "dev", "heldout")]
    assert [len(s) for s in splits] == [1237, 200, 360]
    assert len(set.union(*splits)) == 1797


def test_a_scene_is_a_function_of_its_seed():
    first, _, _ = scene_and_question(QuestionKind.SUM, 3)
    again, _, _ = scene_and_question(QuestionKind.SUM, 3)
    assert first.cards == again.cards
    assert first.image.tobytes() == again.image.tobytes()


def test_colours_are_unique_and_cards_stay_inside_their_cells():
    for seed in range(20):
        scene, _, _ = scene_and_question(QuestionKind.ONE, seed)
        assert len({c.colour for c in scene.cards}) == len(scene.cards)
        for card in scene.cards:
            x1, y1, x2, y2 = (4 * v for v in card.cell_box)
            assert x1 <= card.box[0] < card.box[2] <= x2
            assert y1 <= card.box[1] < card.box[3] <= y2


@settings(max_examples=25, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10**6), pictures=st.integers(2, 8), kind=st.sampled_from((*ACROSS_KINDS, *CLIP_KINDS))
)
def test_several_pictures_show_every_card_once_and_two_of_them_what_is_asked(seed, pictures, kind):
    rng = np.random.default_rng(seed)
    scene = scene_about(rng, "dev", kind, pictures=pictures)
    question = ask_about(rng, scene, kind)
    assert len(scene.images) == question.pictures == pictures
    assert len({c.colour for c in scene.cards}) == len(scene.cards) <= 6
    assert scene.clip == (kind in CLIP_KINDS)
    assert all(scene.in_cell(card) == (card,) for card in scene.cards)
    if kind in (QuestionKind.WHICH, QuestionKind.FRAME):
        (card,) = question.named
        assert (question.answer, question.calls()) == (str(card.picture), ())
    else:
        one, two = question.named
        assert one.picture != two.picture
        (call,) = question.calls()
        assert [r.index for r in call.regions] == [c.picture for c in question.targets]
    if kind is QuestionKind.FIRST:
        assert question.targets[0].picture == min(card.picture for card in question.named)
    with pytest.raises(ValueError, match=r"the scene has \d images"):
        _ = scene.image


def test_the_frames_of_a_clip_have_one_ground():
    scene, _, _ = scene_and_question(QuestionKind.FIRST, 3)
    frames = [np.array(image) for image in scene.images]
    for card in scene.cards:
        x1, y1, x2, y2 = card.box
        others = [frame[y1:y2, x1:x2] for i, frame in enumerate(frames) if i != card.picture]
        assert all(np.array_equal(other, others[0]) for other in others)
        assert not np.array_equal(frames[card.picture][y1:y2, x1:x2], others[0])
        for frame in frames:
            frame[y1:y2, x1:x2] = 0
    assert all(np.array_equal(frame, frames[0]) for frame in frames)


def test_the_tint_says_where_a_pixel_is_whatever_photograph_lends_the_light():
    """Differences of the channels, cell by cell, are the same on every ground, to the grain."""
    cells = []
    for split in ("train", "dev", "heldout"):
        for ground in grounds(split):
            blocks = ground.astype(float).reshape(12, 56, 12, 56, 3).mean((1, 3))
            cells.append(np.stack((blocks[..., 0] - blocks[..., 2], blocks[..., 1] - blocks[..., 2])))
    assert np.ptp(cells, axis=0).max() < 2


def bits_of(scene, card):
    """(8, 8) signs of a plate's print, read off its crop."""
    crop = np.asarray(scene.cell(card).convert("L"), float).reshape(8, 7, 8, 7).swapaxes(1, 2)
    checks = 2.0 * (np.indices((7, 7)).sum(0) % 2) - 1
    inner = np.s_[:, :, 2:-2, 2:-2]  # without the frame
    return np.sign(((crop - crop[inner].mean((2, 3), keepdims=True)) * checks)[inner].sum((2, 3)))


@settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 10**6), singles=st.integers(0, 2), pairs=st.integers(0, 1))
def test_plates_agree_where_there_is_ink_and_leave_the_rest_of_the_scene_alone(seed, singles, pairs):
    plain, scene = (
        make_scene(np.random.default_rng(seed), "dev", singles=singles, pairs=pairs, nests=(), plates=plates)
        for plates in (False, True)
    )
    *others, one, two = scene.cards
    assert (tuple(others), plain.ink) == (plain.cards, None)
    assert one.plate
    assert two.plate
    assert one.digit == two.digit
    assert np.array_equal(bits_of(scene, one) * bits_of(scene, two) > 0, scene.ink)
    assert all(scene.in_cell(plate) == (plate,) for plate in (one, two))
    old, new = np.array(plain.image), np.array(scene.image)
    for plate in (one, two):
        x1, y1, x2, y2 = plate.box
        new[y1:y2, x1:x2] = old[y1:y2, x1:x2]
    assert np.array_equal(old, new)


def test_the_print_of_one_plate_alone_is_a_fair_coin_wherever_there_is_ink():
    """Over many scenes, a bit is 1 as often where there is ink as where there is none, on both plates."""
    prints = []
    for seed in range(150):
        scene = make_scene(np.random.default_rng([3, seed]), "dev", singles=0, pairs=0, nests=(), plates=True)
        prints += [(bits_of(scene, card)[scene.ink == ink].tolist(), ink, at)
                   for at, card in enumerate(scene.cards) for ink in (False, True)]  # fmt: skip
    for ink in (False, True):
        for at in (0, 1):
            bits = np.concatenate([b for b, i, a in prints if (i, a) == (ink, at)])
            assert abs(bits.mean()) < 4 / np.sqrt(len(bits))


def test_a_shared_digit_is_one_digit_of_two_cards():
    _, question, _ = scene_and_question(QuestionKind.SHARED, 4)
    one, two = question.targets
    assert question.query == f"digit on the {one.colour} and {two.colour} cards together"
    assert question.final_thought() == question.answer == str(one.digit)
    (call,) = question.calls()
    assert [r.box for r in call.regions] == [one.cell_box, two.cell_box]
    with pytest.raises(ValueError, match="needs 2 fitting cards"):
        ask_about(np.random.default_rng(0), make_scene(np.random.default_rng(0)), QuestionKind.SHARED)


@pytest.mark.parametrize("kind", CALLED)
def test_training_pictures_are_what_the_crop_rule_shows(kind):
    scene, question, _ = scene_and_question(kind)
    gallery = Gallery()
    for image, look in zip(scene.images, scene.shown(), strict=True):
        shown = gallery.add_original(image, MAX_PIXELS)
        assert shown.image.size == (SHOWN, SHOWN)
        assert shown.image.tobytes() == look.tobytes()
    first, *later = question.calls()
    for view, card in zip(gallery.crop(first, MAX_PIXELS), question.targets, strict=True):
        assert view.image.size == (CROP, CROP)
        assert view.image.tobytes() == scene.cell(card).tobytes()
    for call in later:
        (view,) = gallery.crop(call, MAX_PIXELS)
        assert view.image.tobytes() == scene.quadrant(question.targets[0]).tobytes()


@pytest.mark.parametrize("kind", list(QuestionKind))
@pytest.mark.parametrize("at_the_limit", [False, True])
def test_the_training_stream_is_the_episode_s_stream(processor, encoder, kind, at_the_limit):
    scene, question, rng = scene_and_question(kind, 1)
    example = episode_example(encoder, scene, question, rng, final_prompt=at_the_limit)
    calls = question.calls()
    turns = [*calls, Answer(question.answer, question.final_thought())]
    limits = Limits(max_turns=max(2, len(turns)) if at_the_limit else 5, max_pixels=MAX_PIXELS)
    episode = Episode.start(
        scene.images, question.text, tokenizer=processor.tokenizer, prompts=processor.prompts, limits=limits
    )
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for turn in turns:
        assert episode.next_request() is not None
        ids = processor.tokenizer.encode(format_turn(turn), add_special_tokens=False, split_special_tokens=True)
        episode.feed([*ids, end])
    assert episode.result.answer == question.answer
    record = episode.record
    assert record.token_ids == list(example.input_ids)
    assert [int(label != -100) for label in example.labels] == record.loss_mask
    assert [i.query for i in record.inquiries] == [g.query for g in example.groups]
    for inquiry, group in zip(record.inquiries, example.groups, strict=True):
        assert [i.tobytes() for i in inquiry.images] == [i.tobytes() for i in group.images]


def test_lessons_without_images_ask_for_the_smaller_frame_and_its_colour(processor, encoder):
    for seed in range(10):
        lesson = order_example(encoder, np.random.default_rng(seed), count=4)
        assert not lesson.groups
        *turns, _ = processor.tokenizer.decode(lesson.input_ids).split("</think>")
        asked = processor.tokenizer.decode([label for label in lesson.labels if label != IGNORE]).split()
        assert len(asked) == 3 * len(turns) == 12
        for i, turn in enumerate(turns):
            given = re.findall(r"(\w+) index (\d)", turn)
            assert len({colour for colour, _ in given[:2]}) == len({frame for _, frame in given[:2]}) == 2
            colour, frame = min(given[:2], key=lambda pair: int(pair[1]))
            assert asked[3 * i : 3 * i + 3] == [frame, colour, frame]
            assert turn.endswith(f"first {frame} {colour} index {frame}")


@pytest.mark.parametrize("kind", [QuestionKind.ONE, QuestionKind.FRAME, QuestionKind.SHARED_ACROSS])
def test_the_no_zoom_stream_is_the_episode_s_stream(processor, encoder, kind):
    scene, question, _ = scene_and_question(kind, 2)
    example = direct_example(encoder, scene, question)
    episode = Episode.start(
        scene.images,
        question.text,
        tokenizer=processor.tokenizer,
        prompts=processor.prompts,
        limits=Limits(max_turns=1, max_pixels=MAX_PIXELS),
    )
    prompt = episode.next_request().all_token_ids
    assert list(example.input_ids)[: len(prompt)] == prompt
    assert set(example.labels[: len(prompt)]) == {-100}


def test_every_small_integer_is_one_token_and_text_survives_the_round_trip(processor):
    tokenizer = processor.tokenizer
    assert all(len(tokenizer.encode(str(i))) == 1 for i in range(300))
    for text in ("Where is it?  ünïcödé 12345 <think>no</think>", 'a {"region":[{"index":0}]} b\n\n'):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(ids) == text


def test_special_tokens_in_text_stay_text(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer.encode("<|image_pad|>", add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") not in ids


def test_the_tokenizer_is_the_same_every_time(processor):
    assert tiny_processor().tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_call_takes_about_twenty_tokens(processor):
    _, question, _ = scene_and_question(QuestionKind.ONE, 2)
    (call,) = question.calls()
    text = format_turn(call)
    assert len(processor.tokenizer.encode(text)) < 30
    parsed = parse_turn(text)
    assert (parsed.regions, parsed.query, parsed.thought) == (call.regions, call.query, call.thought)


def test_the_fast_image_path_gives_the_processor_s_tensors(processor):
    scene, question, _ = scene_and_question(QuestionKind.SUM, 4)
    groups = [
        ImageGroup(scene.shown()),
        ImageGroup(tuple(scene.cell(c) for c in question.targets), question.query),
        ImageGroup((scene.cell(scene.cards[0]),), query_for(scene.cards[:1])),
    ]
    fast, slow = fast_encoder(processor)(groups), processor.encode_inquiries(groups)
    assert set(fast) == set(slow)
    torch.testing.assert_close(fast.pop("pixel_values"), slow.pop("pixel_values"), atol=1e-5, rtol=0)
    for name, value in slow.items():
        assert torch.equal(fast[name], value), name


def test_a_random_box_is_another_cell_of_the_same_size():
    scene, question, _ = scene_and_question(QuestionKind.PAIR, 5)
    sample = Sample([scene.image], question.text, id="0")
    shown = [View(scene.shown()[0], 0), View(scene.image.resize((CROP, CROP)), 0)]
    (call,) = question.calls()
    nested = ToolCall((Region(1, (0, CELL, CELL, 2 * CELL)),), "q")
    for given in (call, nested):
        (moved,) = INTERVENE(sample, given.regions, shown)
        assert moved.index == given.regions[0].index
        assert moved.box != given.regions[0].box
        assert (moved.box[2] - moved.box[0], moved.box[3] - moved.box[1]) == (CELL, CELL)


INTERVENE = ABLATIONS["random-box"].transform_regions


# ------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def training_set(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("set")
    write_training_set(folder, processor.tokenizer, processor.prompts, count=14)
    return folder


def recipe(training_set, out, name="tiny_published", *overrides):
    settings = [f"model.path={SHIPPED}", f"data.registry={training_set / REGISTRY}", f"data.use=[{name}]",
                "data.validation=[]", f"output.folder={out}", "data.workers=0", *overrides]  # fmt: skip
    return SftConfig.load("vilavt_tiny_sft", settings)


def test_both_schemas_of_a_training_set_give_the_same_conversations(training_set, tmp_path):
    published = make_dataset(recipe(training_set, tmp_path))
    episodes = make_dataset(recipe(training_set, tmp_path, "tiny_episodes"))
    assert not list(check(published)) + list(check(episodes))
    kinds = set()
    for i in range(len(published)):
        one, other = published[i], episodes[i]
        n = len(other.input_ids)  # the published one goes on with a newline
        assert one.input_ids[:n] == other.input_ids
        assert list(one.labels[:n]) == list(other.labels)
        assert set(one.labels[n:]) == {IGNORE}
        assert [g.query for g in one.groups] == [g.query for g in other.groups]
        for first, second in zip(one.groups, other.groups, strict=True):
            assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]
        kinds.add(len(one.groups))
    assert kinds > {0, 2, 3}  # text alone, one zoom, nested zooms, several pictures


def test_crops_of_the_training_set_can_be_cut_on_the_fly(training_set, tmp_path):
    filed = make_dataset(recipe(training_set, tmp_path))
    source = Registry.load(training_set / REGISTRY).find("tiny_published")
    lines = [json.loads(line) for line in source.annotations.read_text().splitlines()]
    for line in lines:
        originals = [name for name in line["images"] if "crop" not in name]
        line |= {"images": originals, "queries": None, "image_to_query_mapping": None}
    (training_set / "boxes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (training_set / "boxes.yaml").write_text("datasets: [{name: boxes, annotations: boxes.jsonl, crops: cut}]")
    cut = make_dataset(recipe(training_set, tmp_path, "boxes", f"data.registry={training_set / 'boxes.yaml'}"))
    for i in range(len(filed)):
        assert cut[i].input_ids == filed[i].input_ids
        pixels = [[image.tobytes() for image in group.images] for group in cut[i].groups]
        assert pixels == [[image.tobytes() for image in group.images] for group in filed[i].groups]


def test_the_shipped_model_is_at_home_in_its_published_records(training_set, tmp_path):
    """A stream that differed in a token or a pixel from what it was trained on would cost it far more."""
    report = Run(recipe(training_set, tmp_path, "tiny_published", "batch.pack_tokens=1024", "optimizer.max_steps=2",
                        "output.log_steps=1")).train()  # fmt: skip
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 0.6
    assert (report.samples, report.dropped) == (14, {})
    assert inspect_checkpoint(report.folder).complete


@pytest.mark.nightly("most of a minute; test_train_run.py trains on every run")
def test_the_recipe_teaches_the_shipped_model_what_it_could_not_do(tmp_path):
    write_new_lesson(tmp_path / "data", count=96, held_out=12)
    report = Run(recipe(tmp_path / "data", tmp_path / "run", "tiny_smaller", "data.validation=[tiny_smaller_heldout]",
                        "optimizer.epochs=1", "validation.steps=4")).train()  # fmt: skip
    first, *_, last = report.validations
    assert first["answers_right"] <= 0.5  # asked for another of two digits it knows, it is right by chance at times
    assert last["loss"] < 0.5 * first["loss"]


def test_the_new_lesson_is_about_the_smaller_digit_of_scans_of_its_own(tmp_path, processor):
    names = write_new_lesson(tmp_path, count=3, held_out=2)
    assert names == ["smaller.jsonl", "smaller_heldout.jsonl", REGISTRY]
    write_training_set(tmp_path, processor.tokenizer, processor.prompts, count=1)
    known = {source.name for source in Registry.load(tmp_path / REGISTRY).datasets}
    assert known == {"tiny_smaller", "tiny_smaller_heldout", "tiny_published", "tiny_episodes"}
    records = [json.loads(line) for name in names[:2] for line in (tmp_path / name).read_text().splitlines()]
    assert len({record["id"] for record in records}) == 5
    for record in records:
        answer = parse_turn(record["turns"][-1])
        assert record["question"].startswith("What is the smaller digit on the ")
        assert int(answer.text) == min(map(int, answer.thought.split(",")))


@pytest.mark.nightly("a minute; tests/rl/test_tiny_start.py goes through a build on every run")
@pytest.mark.parametrize("alone", [False, True])
def test_a_short_build_goes_through_every_stage(tmp_path, monkeypatch, alone):
    stages = tuple(dataclasses.replace(s, steps=2, batch=3, warmup=1) for s in building.STAGES)
    stages = stages[2::2] if alone else stages
    monkeypatch.setattr(building, "PROBED", 1)
    record = building.build(tmp_path / "built", alone=alone, stages=stages)
    assert record["command"].endswith("--alone") == alone
    assert [s["name"] for s in record["stages"]] == [s.name for s in stages]
    found = inspect_checkpoint(tmp_path / "built")
    assert found.complete
    assert found.parameters == record["parameters"]
    for stage in stages:
        curve = (tmp_path / "built-work" / stage.name / "curve.jsonl").read_text().splitlines()
        probes = [line for line in map(json.loads, curve) if "probe" in line]
        assert len(probes) == stage.language
    again = building.build(tmp_path / "again", work=tmp_path / "built-work", resume=True, stages=stages)
    assert again["stages"] == record["stages"]


def test_the_question_set_is_fixed_and_large_enough():
    counts = questions.COUNTS
    assert sum(counts.values()) >= 800
    few = questions.tasks("heldout", 20)
    assert {t.question.kind for t in few} == set(QuestionKind)
    assert [t.question for t in few] == [t.question for t in questions.tasks("heldout", 20)]


def test_a_plain_classifier_reads_the_crop_but_not_the_first_look():
    figures = evaluation.pixel_classifier("dev", scenes=250)
    assert figures["pixel_first_look"] < 0.25
    assert figures["pixel_zoomed"] > 0.75


def test_crops_cover_a_question_if_they_show_its_cards_large_enough():
    scene, question, _ = scene_and_question(QuestionKind.NESTED, 3)
    task, calls = SceneTask(question, lambda: scene), [format_turn(call) for call in question.calls()]
    pixels = (1, MAX_PIXELS)
    assert evaluation.covers([*calls, "<answer>1</answer>"], task, *pixels)
    assert not evaluation.covers(calls[:1], task, *pixels)  # the whole cell: too small to read
    assert not evaluation.covers([], task, *pixels)
    refused = format_turn(ToolCall((Region(7, (0, 0, 28, 28)),), "an image that was never shown"))
    assert evaluation.covers([refused, *calls], task, *pixels)


def test_an_ideal_call_is_forced_and_the_other_card_asked_for():
    todo = questions.tasks("heldout", 20)
    number, task = next((i, t) for i, t in enumerate(todo) if t.other is not None)
    own, sample = evaluation.interventions(todo), Sample([], "", id=str(number))
    teacher, swap = (own[name] for name in (evaluation.TEACHER_BOXES, evaluation.SWAPPED_QUERY))
    (call,) = task.question.calls()
    assert [teacher.forced_turns(sample, turn) for turn in (0, 1)] == [format_turn(call), None]
    (picture,) = task.draw().shown()
    (asked,) = swap.transform_inquiry(sample, Inquiry((picture,), call.query, (1,)))
    assert asked.query == query_for([task.other]) != call.query
    (first_look,) = swap.transform_inquiry(sample, Inquiry((picture,), "", (0,)))
    assert first_look.query == ""
    alone = next(i for i, t in enumerate(todo) if t.other is None)
    with pytest.raises(EvaluationError, match=f"question {alone}: .*no other card"):
        swap.transform_inquiry(Sample([], "", id=str(alone)), Inquiry((picture,), "q", (1,)))


def test_a_name_of_its_own_is_no_ablation_of_another_benchmark():
    own = evaluation.interventions([])
    assert str(Ablation.parse("teacher-boxes+no-query", own)) == "no-query+teacher-boxes"
    with pytest.raises(EvaluationError, match="no ablation 'teacher-boxes'; known are no-zoom"):
        Ablation.parse("teacher-boxes")


def test_the_shipped_checkpoint_finds_reads_and_needs_what_it_asks_for(tmp_path):
    rows = ("teacher-boxes", "no-zoom", "random-box", "swapped-query")
    todo = questions.tasks("heldout", 16)
    fingerprint, table = evaluation.score_scenes(str(SHIPPED), tmp_path, rows, todo)
    assert fingerprint == checkpoint_fingerprint(SHIPPED)
    found = {row.name: row for row in table.rows}
    assert list(found) == ["full", "coverage", "swapped-query", "teacher-boxes", "no-zoom", "random-box"]
    overall = {name: row.figures[0] for name, row in found.items()}
    # well under the published table, far above what a broken model reaches
    assert overall["coverage"].score >= 0.9
    assert overall["full"].score >= 0.8
    assert found["teacher-boxes"].difference.difference == pytest.approx(0, abs=0.1)
    assert found["no-zoom"].difference.difference <= -0.3
    assert found["random-box"].difference.difference <= -0.25
    assert overall["swapped-query"].score >= 0.6
    others = sum(task.other is not None for task in todo)
    assert overall["swapped-query"].questions == others
    asked = len(todo)
    assert overall["full"].questions == asked
    assert overall["full"].interval == wilson(round(overall["full"].score * asked), asked)
    assert f"n={others} |" in table.to_markdown()
    assert [row.difference is None for row in table.rows] == [True] * 3 + [False] * 3


def test_the_shipped_checkpoint_is_small_and_says_where_it_came_from():
    size = sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file())
    assert size < 10_000_000
    record = json.loads((SHIPPED / "provenance.json").read_text())
    assert record["command"].startswith("vilavt tiny build")
    assert [s["name"] for s in record["stages"]] == ["read", "match", "meet", "place", "talk"]
    asked_of_shipped = json.loads((PICTURES / "questions.json").read_text())
    assert {kind for kinds in building.EXAMPLES for kind in kinds} == {asked["kind"] for asked in asked_of_shipped}
    files = [file for asked in read_demo_questions(PICTURES / "questions.json") for file in asked.files]
    assert all(file.is_file() for file in files)


def test_a_clip_is_read_back_as_it_was_drawn(tmp_path):
    task = questions.make_task("dev", QuestionKind.FIRST, 0, pictures=5)
    questions.write_clip(tmp_path / "clip.mkv", task.images)
    frames = read_frames(Video(tmp_path / "clip.mkv"), VideoLimits())
    assert [frame.time for frame in frames] == [0, 1, 2, 3, 4]
    assert [frame.image.tobytes() for frame in frames] == [image.tobytes() for image in task.images]
