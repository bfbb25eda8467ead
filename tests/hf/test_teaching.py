"""What the tiny model's training adds to SFT. Sizes are the tiny model's; tolerances are for fp32."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import TrainingArguments

from vilavt_core.architecture import PARTS, find_part
from vilavt_core.data.example import IGNORE, ImageGroup
from vilavt_core.data.order import InOrder
from vilavt_core.errors import TrainingError
from vilavt_hf.tiny.build import new_model
from vilavt_hf.tiny.heads import AttentionInputs, AuxiliaryHead, AuxiliaryLosses
from vilavt_hf.tiny.lesson import Lesson, TokenTarget
from vilavt_hf.tiny.scenes import QuestionKind, ask_about, make_scene
from vilavt_hf.tiny.teacher import Encoder, episode_example, listing_example, reading_example, shared_reading_example
from vilavt_hf.tiny.teaching import TeachingCollator, TeachingTrainer
from vilavt_hf.tiny.tiny_model import fast_encoder, tiny_config, tiny_processor
from vilavt_hf.train.collator import VilavtCollator


@pytest.fixture(autouse=True)
def _no_precision_left_behind(monkeypatch):
    """4.57 hands the precision on through the environment, to every later run of the process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def config(processor):
    return tiny_config(processor.tokenizer)


@pytest.fixture(scope="module")
def lessons(processor):
    encoder = Encoder(processor.tokenizer, processor.prompts)
    out = []
    for i, kind in enumerate((QuestionKind.NESTED, QuestionKind.SUM, QuestionKind.PAIR, QuestionKind.ONE)):
        rng = np.random.default_rng(i)
        scene = make_scene(rng)
        out.append(episode_example(encoder, scene, ask_about(rng, scene, kind), rng))
    return out


def collator(processor, config, kind=TeachingCollator, **kwargs):
    return kind(
        fast_encoder(processor),
        pad_token_id=processor.tokenizer.pad_token_id,
        image_token_id=config.image_token_id,
        **kwargs,
    )


def readings(count=2):
    """Lessons for the tower alone."""
    rngs = [np.random.default_rng(i) for i in range(count)]
    return [reading_example(make_scene(rng), rng, look=False, count=2) for rng in rngs]


def trainer(processor, config, model, lessons, folder, **kwargs):
    return TeachingTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3,
            remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
            logging_steps=1, dataloader_pin_memory=False,
        ),
        train_dataset=lessons,
        data_collator=collator(processor, config),
        order=InOrder(len(lessons), 2),
        **kwargs,
    )  # fmt: skip


def picture(width, height, value=100):
    return Image.new("RGB", (width, height), (value, value, value))


# ------------------------------------------------------------------------------------------- batches


def test_the_images_of_extra_groups_come_last_and_keep_their_targets(processor, config):
    image = config.image_token_id
    target = TokenTarget("digit", 1, np.array([4]))
    examples = [
        Lesson(
            [image, 7], [-100, 7], groups=(ImageGroup((picture(28, 28),)),),
            extra_groups=(ImageGroup((picture(28, 28),), "a"),), tokens=(target,),
        )
        for _ in range(2)
    ]  # fmt: skip
    batch = collator(processor, config)(examples)
    images, values = batch["aux"]["tokens"]["digit"]
    assert images.tolist() == [2, 3]
    assert values.tolist() == [4, 4]
    assert batch["query_attention_mask"].any(1).tolist() == [False, False, True, True]


def test_a_lesson_without_targets_makes_the_batch_of_an_example(processor, config, lessons):
    bare = [Lesson(one.input_ids, one.labels, one.weights, one.groups) for one in lessons]
    batch, plain = (collator(processor, config, kind)(bare) for kind in (TeachingCollator, VilavtCollator))
    assert batch.keys() == plain.keys()
    assert batch["counts"] == plain["counts"]
    assert all(torch.equal(batch[name], plain[name]) for name in batch if name != "counts")


def test_lessons_without_tokens_have_no_row(processor, config, lessons):
    alone = collator(processor, config)(readings())
    assert "input_ids" not in alone
    assert alone["labels"].shape == (1, 0)
    assert (alone["counts"].samples, alone["counts"].tokens, alone["counts"].slots) == (2, 0, 0)
    assert alone["counts"].images == len(alone["image_grid_thw"]) == 4
    mixed = collator(processor, config)([readings()[0], lessons[0]])
    assert mixed["input_ids"].tolist() == [list(lessons[0].input_ids)]
    with pytest.raises(ValueError, match="can only have extra_groups"):
        collator(processor, config)([Lesson([], [], groups=(ImageGroup((picture(28, 28),)),))])


def test_targets_cannot_be_packed(processor, config, lessons):
    with pytest.raises(ValueError, match="targets name rows"):
        collator(processor, config, packed=True)(lessons)


def test_attention_and_head_targets_point_at_what_they_name(processor, config):
    encoder = Encoder(processor.tokenizer, processor.prompts)
    rng = np.random.default_rng(5)
    scene = make_scene(rng)
    example = listing_example(encoder, scene, rng)
    decode = processor.tokenizer.decode
    by_place = {c.row * 6 + c.column for c in scene.cards}
    first_image = example.input_ids.index(config.image_token_id)
    for target in example.attention:
        key = example.input_ids[target.key]
        if target.layer == 2:
            assert key == config.image_token_id
            assert target.key - first_image in by_place
        else:
            assert decode([key]).strip() in {c.colour for c in scene.cards}
        assert decode([example.input_ids[target.query]]) in (" row", " column")
        assert example.labels[target.query + 1] != IGNORE


def meetings(count=2):
    """Lessons of two plates each, for the tower alone."""
    scenes = [make_scene(np.random.default_rng(i), singles=0, pairs=0, nests=(), plates=True) for i in range(count)]
    return [shared_reading_example([scene], np.random.default_rng(0)) for scene in scenes]


def test_partners_are_images_of_the_batch(processor, config, lessons):
    batch = collator(processor, config)([lessons[0], *meetings()])
    n = len(batch["image_grid_thw"])
    assert batch["aux"]["partners"].tolist() == [[n - 4, n - 3], [n - 2, n - 1]]
    assert batch["images_per_query"].tolist()[-2:] == [2, 2]


def test_alone_every_region_is_a_group_of_its_own_and_has_no_partner(processor, config, lessons):
    together, alone = collator(processor, config), collator(processor, config)
    alone.alone = True
    batch, other = [one([*lessons, *meetings()]) for one in (together, alone)]
    assert other["images_per_query"].tolist() == [1] * len(batch["image_grid_thw"])
    assert len(other["aux"]["partners"]) == 0 < len(batch["aux"]["partners"])
    for name in ("pixel_values", "image_grid_thw", "input_ids", "labels"):
        assert torch.equal(batch[name], other[name])
    per_image = torch.arange(len(batch["images_per_query"])).repeat_interleave(batch["images_per_query"])
    assert torch.equal(batch["query_ids"][per_image], other["query_ids"])


# ------------------------------------------------------------------------------------------- losses


def test_the_partner_loss_is_the_attention_between_the_same_places(processor):
    """Against the softmax over everything that the group can see, spelled out."""
    model = new_model(processor, 0).train()
    batch = collator(processor, model.config)([*readings(1), *meetings(1)])
    visual, teacher = model.model.visual, model.auxiliary
    block = teacher.partner_block
    with AttentionInputs(visual, [block]) as seen:
        model.encode(batch)
    sizes, counts = batch["image_grid_thw"].prod(-1), batch["images_per_query"]
    groups = torch.arange(len(counts)).repeat_interleave(counts)
    pairs = batch["aux"]["partners"]
    loss, figures = teacher.partner_loss(pairs, visual.blocks[block].attn, seen[block], sizes, groups)
    hidden, text, layout, _ = seen[block]
    attention = visual.blocks[block].attn
    queries, keys, _ = attention.project(hidden, text, layout)
    ((one, other),) = pairs.tolist()
    n, start = int(sizes[one]), int(sizes[:one].sum())
    words = batch["query_attention_mask"].sum(1)
    first_word = len(hidden) + int(words[: groups[one]].sum())
    own = [*range(start, start + 2 * n), *range(first_word, first_word + int(words[groups[one]]))]
    logs = []
    for head in range(attention.num_heads):
        for place in range(n):
            here, there = (start + place, start + n + place)
            here, there = (here, there) if head < attention.num_heads // 2 else (there, here)
            scores = attention.scaling * keys[own, head] @ queries[here, head]
            logs.append(scores.log_softmax(0)[own.index(there)])
    torch.testing.assert_close(loss, -teacher.partner_weight * torch.stack(logs).mean())
    assert 0 < figures["partner"] < 1
    with pytest.raises(ValueError, match="not of one group"):
        teacher.partner_loss(torch.tensor([[0, other]]), attention, seen[block], sizes, groups)


def test_labels_count_alone_or_as_a_row_and_weigh_what_the_head_says():
    heads = [
        AuxiliaryHead("rows", "labels", 2, 1.0, positive_weight=1.0),
        AuxiliaryHead("single", "labels", 2, 1.0, positive_weight=3.0, single=True),
    ]
    losses = AuxiliaryLosses(heads, merged=2, patch=4)
    for name in ("rows", "single"):
        losses.heads[name].weight.data = torch.eye(2)
        losses.heads[name].bias.data.zero_()
    merged, wanted = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    for name, weight, right in (("rows", 1.0, 0.0), ("single", 3.0, 0.5)):
        loss, share = losses.features_loss({name: (torch.tensor([0]), wanted)}, merged, [1], {})
        expected = weight * torch.nn.functional.softplus(torch.tensor([-1.0, 1.0])).mean()
        torch.testing.assert_close(loss, expected)
        assert share[name] == right


def test_heads_of_every_kind_learn_only_from_their_targets():
    heads = [
        AuxiliaryHead("class", "tokens", 3, 1.0),
        AuxiliaryHead("multi", "labels", 2, 1.0),
        AuxiliaryHead("whole", "image", 4, 1.0),
        AuxiliaryHead("where", "pointer", 2, 1.0),
        AuxiliaryHead("early", "tokens", 3, 1.0, block=0),
    ]
    losses = AuxiliaryLosses(heads, merged=8, patch=4)
    merged = torch.randn(4, 8, requires_grad=True)
    targets = {
        "class": (torch.tensor([1]), torch.tensor([0, -100])),
        "multi": (torch.tensor([0]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
        "whole": (torch.tensor([0]), torch.tensor([3])),
        "where": (torch.tensor([0]), torch.tensor([1])),
        "early": (torch.tensor([1]), torch.tensor([2, 1])),
    }
    blocks = {0: torch.randn(16, 4)}
    loss, right = losses.features_loss(targets, merged, [2, 2], blocks)
    loss.backward()
    assert set(right) == set(targets)
    assert merged.grad[3].abs().sum() == 0  # its only target is -100
    assert merged.grad[:3].abs().sum(1).min() > 0


def test_without_heads_the_loss_is_that_of_production(processor, config, lessons):
    model = new_model(processor, 0).train()
    batch = {k: v for k, v in collator(processor, config)(lessons[:2]).items() if k != "counts"}
    taught = model(**batch)
    model.auxiliary = None
    plain = model(**batch)
    assert taught["auxiliary"] > 1 > plain["auxiliary"] == 0
    assert plain["figures"].keys() == {"tokens_right"} < taught["figures"].keys()
    # eager attention returns the weights, nothing else differs
    assert taught["loss"].item() == plain["loss"].item()


def test_reading_lessons_train_the_tower_and_its_heads_alone(processor, config):
    model = new_model(processor, 0).train()
    batch = {k: v for k, v in collator(processor, config)(readings()).items() if k != "counts"}
    outputs = model(**batch)
    assert outputs["loss"] == 0
    outputs["auxiliary"].backward()
    moved = {find_part(name) for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"vision_tower", "merger", "text_encoder", "text_proj", None}


def test_three_steps_train_every_part_and_the_heads_and_save_no_head(processor, config, lessons, tmp_path):
    model = new_model(processor, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(processor, config, model, lessons, tmp_path / "run")
    run.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {find_part(name) for name in moved} == {*PARTS, None}
    heads = {n for n in before if n.startswith("auxiliary.")}
    assert {n for n in heads if "digit" in n} <= moved
    assert any("heads" in entry for entry in run.state.log_history)
    run.save_model(str(tmp_path / "saved"))
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert len(names) == len(before) - len(heads)
    assert not [n for n in names if "auxiliary" in n or "heads" in n]


def test_a_run_with_heads_refuses_to_resume_without_them(processor, config, lessons, tmp_path):
    run = trainer(processor, config, new_model(processor, 0), lessons, tmp_path)
    run.model.save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(TrainingError, match="no training-only heads"):
        run._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
