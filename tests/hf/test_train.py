"""SFT: collator, losses, trainer. Sizes are the tiny model's; tolerances are for fp32."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

from vilavt_hf.tiny.model import fast_encoder, linear_patches, tiny_auxiliary, tiny_config, tiny_model, tiny_processor
from vilavt_hf.tiny.scenes import Kind, ask, make_scene
from vilavt_hf.tiny.teacher import Encoder, episode_example, listing_example
from vilavt_hf.train.collator import Example, ImageGroup, TokenTarget, VilavtCollator, mrope_positions
from vilavt_hf.train.losses import AuxiliaryHead, AuxiliaryLosses, weighted_loss
from vilavt_hf.train.trainer import VilavtTrainer


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def config(processor):
    return tiny_config(processor.tokenizer)


def conversations(processor, **kwargs):
    encoder = Encoder(processor.tokenizer, processor.prompts)
    out = []
    for i, kind in enumerate((Kind.NESTED, Kind.SUM, Kind.PAIR, Kind.ONE)):
        rng = np.random.default_rng(i)
        scene = make_scene(rng)
        out.append(episode_example(encoder, scene, ask(rng, scene, kind), rng, **kwargs))
    return out


@pytest.fixture(scope="module")
def lessons(processor):
    return conversations(processor, extra_readings=0)


def collator(processor, config, **kwargs):
    return VilavtCollator(
        fast_encoder(processor),
        pad_token_id=processor.tokenizer.pad_token_id,
        image_token_id=config.image_token_id,
        **kwargs,
    )


def picture(width, height, value=100):
    return Image.new("RGB", (width, height), (value, value, value))


def test_positions_follow_the_model_s_own_mrope(processor, config, lessons):
    batch = collator(processor, config)(lessons[:1])
    model = tiny_model(config, 0).eval()
    inputs = {k: v for k, v in batch.items() if k not in ("aux", "labels", "label_weights")}
    given = model(**inputs).logits
    derived = model(**{k: v for k, v in inputs.items() if k != "position_ids"}).logits
    torch.testing.assert_close(given, derived, atol=2e-5, rtol=0)


def test_positions_of_text_after_an_image_continue_from_its_longer_side():
    positions = mrope_positions([5, 9, 9, 9, 9, 9, 9, 5], [(2, 3)], image_token_id=9)
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]


def test_rows_are_padded_right_and_images_stay_in_prompt_order(processor, config):
    image = config.image_token_id
    first = Example([7, image, image, 8], [-100, -100, -100, 8], groups=(ImageGroup((picture(56, 28, 10),)),))
    second = Example(
        [7, image, image, image, 8, 9],
        [-100] * 4 + [8, 9],
        weights=[1, 1, 1, 1, 3, 1],
        groups=(ImageGroup((picture(28, 28, 20), picture(56, 28, 30)), "digit on the red card"),),
    )
    batch = collator(processor, config)([first, second])
    assert batch["input_ids"].tolist() == [[7, image, image, 8, 0, 0], [7, image, image, image, 8, 9]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, -100, -100], [-100] * 4 + [8, 9]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]
    assert batch["label_weights"][1].tolist() == [1, 1, 1, 1, 3, 1]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2], [1, 2, 4]]
    assert batch["images_per_query"].tolist() == [1, 2]
    assert batch["query_attention_mask"].sum(1).tolist() == [0, 6]
    values = [part[0, 0].item() for part in batch["pixel_values"].split([8, 4, 8])]
    assert values == sorted(set(values))


def test_the_images_of_extra_groups_come_last_and_keep_their_targets(processor, config):
    image = config.image_token_id
    target = TokenTarget("digit", 1, np.array([4]))
    examples = [
        Example(
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


def test_a_wrong_number_of_placeholders_names_the_example(processor, config):
    wrong = Example([config.image_token_id, 7], [-100, 7], groups=(ImageGroup((picture(56, 28),)),))
    with pytest.raises(ValueError, match=r"example 0 .* 1 image placeholders, .* make 2 tokens"):
        collator(processor, config)([wrong])


def test_our_loss_is_the_model_s_loss_when_all_weights_are_one(processor, config, lessons):
    model = tiny_model(config, 0).eval()
    batch = collator(processor, config)(lessons)
    inputs = {k: v for k, v in batch.items() if k not in ("aux", "label_weights")}
    stock = model(**inputs).loss
    ours, _ = weighted_loss(model, inputs, None)
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=0)


def test_the_patch_embedding_as_a_product_gives_the_convolution_s_features(processor, config, lessons):
    model = tiny_model(config, 0).eval()
    batch = collator(processor, config)(lessons[:2])
    names = ("pixel_values", "image_grid_thw", "query_ids", "query_attention_mask", "images_per_query")
    inputs = {k: batch[k] for k in names}

    def features():
        return torch.cat(tuple(getattr(out := model.model.get_image_features(**inputs), "pooler_output", out)))

    slow = features()
    with linear_patches(model):
        fast = features()
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=0)
    torch.testing.assert_close(features(), slow, atol=2e-5, rtol=0)


def test_a_batch_of_four_has_the_gradient_of_its_members(processor, config, lessons):
    collate = collator(processor, config)

    def gradient(examples):
        model = tiny_model(config, 0)
        batch = {k: v for k, v in collate(examples).items() if k != "aux"}
        loss, _ = weighted_loss(model, batch, None)
        loss.backward()
        weight = (batch["label_weights"] * (batch["labels"] != -100))[:, 1:].sum()
        return weight, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    total, together = gradient(lessons)
    alone = [gradient([lesson]) for lesson in lessons]
    for name, whole in together.items():
        parts = sum(weight / total * grads[name] for weight, grads in alone)
        torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


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
        assert example.labels[target.query + 1] != -100


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


def test_three_steps_train_every_part_and_save_no_head(processor, config, tmp_path):
    lessons = conversations(processor)
    model = tiny_model(config, 0)
    auxiliary = tiny_auxiliary()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    heads_before = {n: p.detach().clone() for n, p in auxiliary.named_parameters()}
    trainer = VilavtTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3,
            remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
            logging_steps=1, dataloader_pin_memory=False, bf16=False,
        ),
        train_dataset=lessons,
        data_collator=collator(processor, config),
        auxiliary=auxiliary,
        rates={"model.text_encoder": 0.0},
    )  # fmt: skip
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    frozen = {n for n in before if n.startswith("model.text_encoder")}
    assert not moved & frozen
    for part in ("instruct_key_proj", "instruct_value_proj", "text_proj", "patch_embed", "language_model", "lm_head"):
        assert any(part in name for name in moved), part
    assert all(not torch.equal(p, heads_before[n]) for n, p in auxiliary.named_parameters() if "digit" in n)
    trainer.save_model(str(tmp_path / "saved"))
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert not [n for n in names if "auxiliary" in n or "heads" in n]
    assert any(n.startswith("visual.blocks.5.attn.instruct_key_proj") for n in names)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "vilavt"
