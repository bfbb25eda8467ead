"""Every vector of the published model, in fp32, within the tolerances its manifest states."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from vilavt_hf import VilavtForConditionalGeneration, compat
from vilavt_hf.vision_layout import VisionLayout

VISION, LOGITS, TEXT = 5e-5, 5e-4, 1e-5  # tests/golden/README.md
FORWARD_CASES = ["a", "b", "c", "d", "e"]


@pytest.fixture(scope="module")
def model(golden):
    return VilavtForConditionalGeneration.from_pretrained(golden.checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def case(golden):
    pixels = load_file(golden.root / "out" / "pixels.safetensors")

    def load(name):
        entry = golden.manifest["cases"][name]
        tensors = load_file(golden.root / "out" / entry.get("file", f"{name}.safetensors"))
        inputs = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
        inputs["pixel_values"] = torch.cat([pixels[image] for image in entry["images"]])
        return inputs, {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.")}

    return load


def vision_inputs(inputs):
    names = ("pixel_values", "image_grid_thw", "query_ids", "query_attention_mask", "image_to_query_mapping")
    return {name: inputs[name] for name in names}


def assert_near(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FORWARD_CASES, "d_late_fullatt13"])
def test_vision_features_equal_the_published_model(model, case, name):
    inputs, expected = case(name)
    features = compat.pooled(model.model.get_image_features(**vision_inputs(inputs)))
    assert_near(torch.cat(tuple(features)), expected["vision_out"], VISION)


@torch.no_grad()
@pytest.mark.parametrize("name", FORWARD_CASES)
def test_logits_equal_the_published_model_where_attended(model, case, name):
    inputs, expected = case(name)
    logits = model(**inputs).logits
    attended = inputs["attention_mask"].bool()
    assert_near(logits[attended], expected["logits"][attended], LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["c", "d", "e"])  # a and b have empty queries only
def test_query_features_equal_the_published_model_where_valid(model, case, name):
    inputs, expected = case(name)
    valid = inputs["query_attention_mask"].bool()
    hidden = model.model.text_encoder(inputs["query_ids"], attention_mask=inputs["query_attention_mask"])
    assert_near(hidden.last_hidden_state[valid], expected["query_last_hidden_state"][valid], TEXT)
    projected = model.model.encode_queries(inputs["query_ids"], inputs["query_attention_mask"])
    assert_near(projected[valid], expected["query_text_proj"][valid], TEXT)


@torch.no_grad()
@pytest.mark.parametrize("name", FORWARD_CASES)
def test_language_model_positions_equal_the_published_model(model, case, name):
    inputs, expected = case(name)
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(position_ids=kwargs["position_ids"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    assert torch.equal(seen["position_ids"][-3:], expected["position_ids"])  # 5.x may add a text axis in front
    assert torch.equal(model.model.rope_deltas.flatten(), expected["rope_deltas"].flatten())


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_rotary_positions_and_segments_equal_the_published_model(model, case, name):
    inputs, expected = case(name)
    config = model.config.vision_config
    counts = torch.bincount(inputs["image_to_query_mapping"], minlength=len(inputs["query_ids"]))
    layout = VisionLayout(inputs["image_grid_thw"], counts, inputs["query_attention_mask"], config, torch.device("cpu"))
    half = config.hidden_size // config.num_heads // 2
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    n = len(expected["rope_pos_hw"])
    unit = config.spatial_merge_size**2
    patch_order = (layout.order[:, None] * unit + torch.arange(unit)).flatten()
    angles = (expected["rope_pos_hw"][patch_order][:, :, None] * inv_freq).flatten(1).repeat(1, 2)
    assert_near(layout.cos[:n, 0], angles.cos(), 1e-6)
    valid = inputs["query_attention_mask"].bool()
    query_positions = expected["query_pos"][valid][:, None].expand(-1, 2)
    query_angles = (query_positions[:, :, None] * inv_freq).flatten(1).repeat(1, 2)
    assert_near(layout.sin[n:, 0], query_angles.sin(), 1e-6)
    assert layout.segments["group"].cu_q.tolist() == expected["cu_seqlens_q"].tolist()
    assert layout.segments["group"].cu_k.tolist() == expected["cu_seqlens_k"].tolist()


@torch.no_grad()
def test_every_intermediate_of_case_d_equals_the_published_model(model, case):
    inputs, expected = case("d")
    seen = {}
    tower = model.model.visual
    hooks = [
        block.register_forward_hook(lambda module, args, output, i=i: seen.update({f"block{i}_out": output}))
        for i, block in enumerate(tower.blocks)
    ]
    hooks.append(
        tower.patch_embed.register_forward_hook(lambda module, args, output: seen.update(patch_embed_out=output))
    )
    hooks.append(
        tower.merger.register_forward_hook(lambda module, args, output: seen.update(merger_out_window_order=output))
    )
    hooks.append(
        model.model.language_model.register_forward_hook(
            lambda module, args, kwargs, output: seen.update(
                inputs_embeds=kwargs["inputs_embeds"], lm_last_hidden_state=output[0]
            ),
            with_kwargs=True,
        )
    )
    model(**inputs)
    for hook in hooks:
        hook.remove()
    for name in (f"block{i}_out" for i in range(8)):
        assert_near(seen[name], expected[name], VISION)
    for name in ("patch_embed_out", "merger_out_window_order", "inputs_embeds"):
        assert_near(seen[name], expected[name], VISION)
    assert_near(seen["lm_last_hidden_state"], expected["lm_last_hidden_state"], LOGITS)


@torch.no_grad()
def test_greedy_generation_equals_the_published_model(model, case):
    inputs, expected = case("g")
    out = model.generate(
        **inputs,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        eos_token_id=396,  # special_ids.eos of the manifest
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert out.sequences[:, -12:].tolist() == expected["generated"].tolist()
    assert_near(torch.stack(out.logits, 1), expected["gen_logits"], LOGITS)


@torch.no_grad()
def test_the_sharded_checkpoint_and_the_auto_class_give_the_same_numbers(golden, case):
    inputs, expected = case("d")
    model = AutoModelForImageTextToText.from_pretrained(golden.sharded, dtype=torch.float32).eval()
    assert isinstance(model, VilavtForConditionalGeneration)
    assert_near(model(**inputs).logits, expected["logits"], LOGITS)


@torch.no_grad()
def test_query_aware_blocks_ignore_fullatt_block_indexes(golden, case, model):
    inputs, expected = case("d_late_fullatt13")
    config = type(model.config).from_pretrained(golden.checkpoint)
    config.vision_config.fullatt_block_indexes = [1, 3]
    other = VilavtForConditionalGeneration.from_pretrained(golden.checkpoint, config=config, dtype=torch.float32)
    features = compat.pooled(other.model.get_image_features(**vision_inputs(inputs)))
    assert_near(torch.cat(tuple(features)), expected["vision_out"], VISION)
