"""SFT: batches, packing, losses, gradients, optimiser. Sizes are the tiny model's; tolerances are for fp32."""

import inspect
import json
import os
from importlib import resources
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import TrainingArguments

from vilavt_core.architecture import PARTS, part_of
from vilavt_core.data.example import IGNORE, Dropped, Example, ImageGroup
from vilavt_core.data.order import InOrder
from vilavt_hf import compat
from vilavt_hf.tiny.scenes import QuestionKind, ask_about, make_scene
from vilavt_hf.tiny.teacher import Encoder, episode_example
from vilavt_hf.tiny.tiny_model import fast_encoder, linear_patches, tiny_config, tiny_model, tiny_processor
from vilavt_hf.train import training_model as training
from vilavt_hf.train.attention import PACKED
from vilavt_hf.train.collator import VilavtCollator, label_weight
from vilavt_hf.train.trainer import StableDecay, VilavtTrainer
from vilavt_hf.train.training_model import freeze


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


def conversations(processor, **kwargs):
    encoder = Encoder(processor.tokenizer, processor.prompts)
    out = []
    for i, kind in enumerate((QuestionKind.NESTED, QuestionKind.SUM, QuestionKind.PAIR, QuestionKind.ONE)):
        rng = np.random.default_rng(i)
        scene = make_scene(rng)
        out.append(episode_example(encoder, scene, ask_about(rng, scene, kind), rng, **kwargs))
    return out


@pytest.fixture(scope="module")
def lessons(processor):
    return conversations(processor, extra_readings=0)


def training_model(config, attention="sdpa"):
    model = tiny_model(config, 0).train()
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa", "text_encoder_config": "sdpa"})
    return model


def summed(model, batch):
    """Loss sum over the labelled tokens, and the weight of them."""
    weight = label_weight(batch)
    return model(**{k: v for k, v in batch.items() if k != "counts"})["loss"], weight


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def stock_inputs(batch):
    """What the model takes outside of training."""
    return {k: v for k, v in batch.items() if k not in ("counts", "label_weights")}


def assert_same_gradients(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=tolerance, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


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
    inputs = {k: v for k, v in stock_inputs(batch).items() if k != "labels"}
    given = model(**inputs).logits
    derived = model(**{k: v for k, v in inputs.items() if k != "position_ids"}).logits
    torch.testing.assert_close(given, derived, atol=2e-5, rtol=0)


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
    counts = batch["counts"]
    assert (counts.samples, counts.tokens, counts.slots, counts.images) == (2, 10, 12, 3)
    assert batch["query_attention_mask"].sum(1).tolist() == [0, 6]
    values = [part[0, 0].item() for part in batch["pixel_values"].split([8, 4, 8])]
    assert values == sorted(set(values))


def test_a_wrong_number_of_placeholders_names_the_example(processor, config):
    wrong = Example([config.image_token_id, 7], [-100, 7], groups=(ImageGroup((picture(56, 28),)),))
    with pytest.raises(ValueError, match=r"example 0 .* 1 image placeholders, .* make 2 tokens"):
        collator(processor, config)([wrong])


def test_our_loss_is_the_model_s_loss_when_all_weights_are_one(processor, config, lessons):
    model = training_model(config)
    batch = {k: v for k, v in collator(processor, config)(lessons).items() if k != "label_weights"}
    total, weight = summed(model, batch)
    stock = model.eval()(**stock_inputs(batch)).loss
    torch.testing.assert_close(total / weight, stock, atol=2e-5, rtol=0)


def test_the_loss_is_the_hand_computed_one(processor, config, lessons):
    """Minus the log-probability of every labelled token given what precedes it, times its weight, summed."""
    model = training_model(config)
    batch = collator(processor, config)(lessons[:2])
    total, weight = summed(model, batch)
    logits = model.eval()(**stock_inputs(batch)).logits
    expected, count = 0.0, 0.0
    for row, lesson in enumerate(lessons[:2]):
        probabilities = logits[row].double().softmax(-1)
        for at in range(1, len(lesson.input_ids)):
            if lesson.labels[at] != IGNORE:
                expected -= lesson.weights[at] * probabilities[at - 1, lesson.labels[at]].log().item()
                count += lesson.weights[at]
    assert weight.item() == pytest.approx(count)
    assert total.item() == pytest.approx(expected, abs=1e-3, rel=1e-5)


def test_logits_in_chunks_give_the_same_loss_and_gradient(processor, config, lessons, monkeypatch):
    model = training_model(config)
    batch = collator(processor, config)(lessons)
    whole, _ = summed(model, batch)
    expected = gradients(model, whole)
    monkeypatch.setattr(training, "LOSS_CHUNK", 7)
    chunked, _ = summed(model, batch)
    torch.testing.assert_close(chunked, whole, atol=1e-3, rtol=1e-6)
    assert_same_gradients(gradients(model, chunked), expected, 1e-4)


def test_a_batch_of_four_has_the_gradient_of_its_members(processor, config, lessons):
    model, collate = training_model(config), collator(processor, config)
    total, weight = summed(model, collate(lessons))
    together = gradients(model, total / weight)
    model.zero_grad()
    for lesson in lessons:  # accumulated, normalised by the tokens of all four
        alone, _ = summed(model, collate([lesson]))
        (alone / weight).backward()
    assert_same_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, together)


# ------------------------------------------------------------------------------------------- packing


def mixed(lessons):
    """Conversations with pictures, one without, and one whose loss begins at its second token."""
    return [*lessons[:3], Example([8, 9, 10, 11], [IGNORE, 9, 10, 11], [1, 2, 1, 1]), lessons[3]]


def test_packed_samples_have_the_loss_and_gradients_of_unpacked_ones(processor, config, lessons):
    examples = mixed(lessons)
    padded, packed = training_model(config), training_model(config, PACKED)
    alone, weight = summed(padded, collator(processor, config)(examples))
    batch = collator(processor, config, packed=True)(examples)
    together, same = summed(packed, batch)
    assert batch["input_ids"].shape == (1, sum(len(e.input_ids) for e in examples))
    torch.testing.assert_close(same, weight)
    torch.testing.assert_close(together / weight, alone / weight, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(packed, together / weight), gradients(padded, alone / weight), 1e-5)


def test_every_packed_sample_starts_at_position_0_and_keeps_its_groups(processor, config, lessons):
    collate = collator(processor, config, packed=True, pad_to_multiple_of=64)
    batch = collate(lessons)
    alone = [collator(processor, config, packed=True)([lesson]) for lesson in lessons]
    starts = batch["cu_seq_lens_q"].tolist()
    lengths = [len(lesson.input_ids) for lesson in lessons]
    assert starts == [0, *np.cumsum(lengths).tolist(), batch["input_ids"].shape[1]]
    assert batch["input_ids"].shape[1] % 64 == 0
    for one, start, length in zip(alone, starts, lengths, strict=False):
        assert torch.equal(batch["position_ids"][:, :, start : start + length], one["position_ids"])
        assert batch["labels"][0, start] == IGNORE
    assert batch["images_per_query"].tolist() == [n for one in alone for n in one["images_per_query"].tolist()]
    assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))
    assert batch["max_length_q"] == max(*lengths, batch["input_ids"].shape[1] - sum(lengths))


def test_a_packed_sample_does_not_see_its_neighbours(processor, config, lessons):
    model, collate = training_model(config, PACKED), collator(processor, config, packed=True)
    loud = Example([8] * 40, [IGNORE] * 40)
    alone, _ = summed(model, collate([lessons[0]]))
    for neighbours in ([loud, lessons[0]], [lessons[0], loud]):
        beside, _ = summed(model, collate(neighbours))
        torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-6)


def test_packing_builds_no_mask_of_tokens_by_tokens(processor, config, lessons, monkeypatch):
    seen = []
    original = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        seen.append((attn_mask, query.shape[2]))
        return original(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    summed(training_model(config, PACKED), collator(processor, config, packed=True)(lessons))
    lengths = {len(lesson.input_ids) for lesson in lessons}
    assert max(length for _, length in seen) == max(lengths)  # nothing attends over more than one sample
    language = [mask for mask, length in seen if length in lengths]
    assert len(language) >= len(lessons) * config.text_config.num_hidden_layers
    assert all(mask is None for mask in language)


def test_the_variable_length_kernel_takes_over_under_autocast(processor, config, lessons, monkeypatch):
    """There RoPE leaves queries and keys in fp32, which the kernel does not take."""
    model, batch = training_model(config, PACKED), collator(processor, config, packed=True)(lessons)
    arguments = inspect.signature(varlen_attn)
    calls = []

    def kernel(*args, **kwargs):
        given = arguments.bind(*args, **kwargs).arguments
        query, key, value = given["query"], given["key"], given["value"]
        calls.append({query.dtype, key.dtype, value.dtype})
        assert given["window_size"] == (-1, 0)  # causal
        ends = given["cu_seq_q"].tolist()
        return torch.cat([
            F.scaled_dot_product_attention(
                *(x[None, start:end].transpose(1, 2) for x in (query, key, value)),
                is_causal=True, scale=given["scale"], enable_gqa=given["enable_gqa"],
            )[0].transpose(0, 1)
            for start, end in pairwise(ends)
        ])  # fmt: skip

    with torch.autocast("cpu", torch.bfloat16):
        without, _ = summed(model, batch)
        monkeypatch.setattr(compat, "varlen_kernel", lambda query: kernel if query.dtype == torch.bfloat16 else None)
        found, _ = summed(model, batch)
    assert calls == [{torch.bfloat16}] * config.text_config.num_hidden_layers
    torch.testing.assert_close(found, without, rtol=1e-2, atol=0)


# ------------------------------------------------------------------------------------------- every rank, every step


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "examples",
    [
        [],
        [Dropped("s[0]", "image", "damaged")],
        [Example([8, 9, 10], [IGNORE, 9, 10])],
        "image without a query",
    ],
    ids=["nothing", "a dropped sample", "text only", "no query"],
)
def test_every_part_has_a_gradient_in_every_step(processor, config, lessons, examples, packed):
    """Otherwise sharded ranks wait for one another, or reduce gradients of different parameters."""
    if examples == "image without a query":
        image = config.image_token_id
        examples = [Example([image, 8, 9], [IGNORE, 8, 9], groups=(ImageGroup((picture(28, 28),)),))]
    model = training_model(config, PACKED)
    batch = collator(processor, config, packed=packed)(examples)
    loss, weight = summed(model, batch)
    found = gradients(model, loss)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.isfinite(g).all() for g in found.values())
    kept = [e for e in examples if isinstance(e, Example)]
    assert weight == sum(label != IGNORE for e in kept for label in e.labels)
    asked = [n for n in found if "instruct_" in n or "text_proj" in n or "text_encoder" in n]
    assert max(found[n].abs().max() for n in asked) < 1e-12  # it takes part and learns nothing
    if not kept:
        assert max(g.abs().max() for g in found.values()) < 1e-12
        assert batch["counts"].slots == 0


def test_dropped_samples_of_a_batch_are_counted_and_leave_the_others_as_they_are(processor, config, lessons):
    gone = Dropped("s[3]", "image", "damaged")
    batch = collator(processor, config)([lessons[0], gone, lessons[1]])
    without = collator(processor, config)(lessons[:2])
    assert batch["counts"].dropped == (gone,)
    assert batch["counts"].samples == 2
    assert all(torch.equal(batch[k], without[k]) for k in without if isinstance(without[k], torch.Tensor))


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


def test_a_stable_rate_rises_stays_and_falls():
    rates = [StableDecay(decay_from=0.5, final_rate=0.1).factor(step, warmup=4, steps=20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rates[9] == 1 > rates[11] > rates[19] > 0.1


def test_every_parameter_belongs_to_a_part(config):
    model = tiny_model(config, 0)
    found = {part_of(name) for name, _ in model.named_parameters()}
    assert found == set(PARTS)
    freeze(model, ("text_encoder", "merger"))
    moving = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert moving == set(PARTS) - {"text_encoder", "merger"}


def trainer(processor, config, model, examples, folder, *, accumulation=1, size=2, steps=3, **kwargs):
    args = {k: kwargs.pop(k) for k in ("bf16", "weight_decay", "learning_rate") if k in kwargs}
    return VilavtTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=size,
            **{"learning_rate": 1e-3, **args},
            remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
            logging_steps=1, dataloader_pin_memory=False, gradient_accumulation_steps=accumulation,
        ),
        train_dataset=examples,
        data_collator=collator(processor, config),
        order=InOrder(len(examples), size),
        **kwargs,
    )  # fmt: skip


def figures(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_accumulation_is_normalised_by_tokens(processor, config, lessons, tmp_path):
    runs = {}
    for name, size, accumulation in (("whole", 4, 1), ("accumulated", 1, 4)):
        run = trainer(processor, config, training_model(config), lessons, tmp_path / name, size=size,
                      accumulation=accumulation)  # fmt: skip
        run.train()
        runs[name] = run
    assert figures(runs["accumulated"], "loss") == pytest.approx(figures(runs["whole"], "loss"), abs=1e-4)
    assert figures(runs["accumulated"], "grad_norm") == pytest.approx(figures(runs["whole"], "grad_norm"), rel=1e-3)


def test_the_published_mean_of_means_is_an_option(processor, config, lessons, tmp_path):
    run = trainer(processor, config, training_model(config), lessons, tmp_path, size=1, accumulation=4, steps=1,
                  loss_mean="micro_batch")  # fmt: skip
    run.train()
    model, collate = training_model(config), collator(processor, config)
    means = [loss / weight for loss, weight in (summed(model, collate([lesson])) for lesson in lessons)]
    assert figures(run, "loss")[0] == pytest.approx(sum(means).item() / 4, abs=1e-4)


def test_every_part_has_its_own_learning_rate_and_only_matrices_decay(processor, config, lessons, tmp_path):
    model = training_model(config)
    run = trainer(processor, config, model, lessons, tmp_path, weight_decay=0.1,
                  learning_rates={"vision_tower": 2e-4, "merger": 3e-4, "text_encoder": 0.0})  # fmt: skip
    optimizer = run.create_optimizer()
    rates = {}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            rates.setdefault(part_of(name), set()).add(group["lr"])
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1), name
    assert rates == {
        "vision_tower": {2e-4}, "merger": {3e-4}, "text_proj": {1e-3}, "language_model": {1e-3}, "lm_head": {1e-3},
    }  # fmt: skip
    assert not any(p.requires_grad for n, p in model.named_parameters() if part_of(n) == "text_encoder")
    with_norms = trainer(processor, config, training_model(config), lessons, tmp_path, weight_decay=0.1,
                         decay_norms=True).create_optimizer()  # fmt: skip
    still = [p for g in with_norms.param_groups if g["weight_decay"] == 0 for p in g["params"]]
    assert len(still) == sum(n.endswith("bias") for n, _ in model.named_parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_three_steps_train_every_part(processor, config, tmp_path, bf16):
    model = tiny_model(config, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(processor, config, model, conversations(processor), tmp_path / "run", bf16=bf16,
                  learning_rates={"text_encoder": 0.0})  # fmt: skip
    seen = set()
    model.model.visual.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    run.train()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert np.isfinite(figures(run, "loss")).all()
    assert all(speed > 0 for speed in figures(run, "tokens_per_second"))
    assert 0 < figures(run, "padding_share")[0] < 1
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not [n for n in moved if part_of(n) == "text_encoder"]
    for part in ("instruct_key_proj", "instruct_value_proj", "text_proj", "patch_embed", "language_model", "lm_head"):
        assert any(part in name for name in moved), part
    run.save_model(str(tmp_path / "saved"))
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(n.startswith("visual.blocks.5.attn.instruct_key_proj") for n in names)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "vilavt"


# ------------------------------------------------------------------------------------------- several devices


def test_the_shipped_settings_are_those_of_fsdp2_in_every_version(tmp_path, monkeypatch):
    """4.57 would shard as FSDP1, unless told through the environment."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    monkeypatch.setattr(os, "environ", os.environ.copy())
    shipped = json.loads((resources.files("vilavt_hf.train") / "parallel" / "fsdp2.json").read_text())
    args = compat.training_arguments(
        warmup=0, recompute=True, fsdp=shipped, output_dir=str(tmp_path), use_cpu=True, report_to=[]
    )
    plugin = FullyShardedDataParallelPlugin(**getattr(args, "fsdp_plugin_args", {}))
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.transformer_cls_names_to_wrap == shipped["transformer_layer_cls_to_wrap"]


def test_a_rank_that_does_not_save_writes_nothing_under_fsdp(processor, config, lessons, tmp_path, monkeypatch):
    """It has gathered no weights: what it wrote would replace those of the rank that has them."""
    run = trainer(processor, config, training_model(config), lessons, tmp_path)
    gathered = []
    monkeypatch.setattr(run, "is_fsdp_enabled", True)
    monkeypatch.setattr(run, "whole_state_dict", lambda: gathered.append(1) or {})
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    run.save_model(str(tmp_path / "saved"))
    assert gathered == [1]  # that takes all ranks
    assert not (tmp_path / "saved").exists()


def test_one_process_uses_one_gpu_and_says_how_to_use_all(processor, config, lessons, tmp_path, caplog):
    """nn.DataParallel would cut packed rows and patches of pictures along their first axis."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    assert args.n_gpu == 0  # asked once, it stays
    args._n_gpu = 2
    run = VilavtTrainer(model=training_model(config), args=args, train_dataset=lessons,
                        data_collator=collator(processor, config), order=InOrder(len(lessons), 2))  # fmt: skip
    assert run.args.n_gpu == 1
    assert "one of 2 GPUs" in caplog.text
    assert "torchrun --nproc-per-node 2 -m vilavt_hf.train" in caplog.text
