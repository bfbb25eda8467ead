"""The tower and the query encoder on vLLM's layers give the published model's vectors (tests/golden)."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vilavt_hf import VilavtConfig
from vilavt_hf.vision_layout import Segments, VisionLayout

GOLDEN = Path(__file__).parent.parent / "golden"
VISION, TEXT = 5e-5, 1e-5  # tests/golden/README.md
CASES = ["a", "b", "c", "d", "e", "d_late_fullatt13"]


@pytest.fixture(scope="module")
def build(vllm_world):
    from vilavt_vllm.query_encoder import QueryEncoder
    from vilavt_vllm.vision import VisionTower

    tensors = load_file(GOLDEN / "ckpt" / "tiny_late" / "model.safetensors")

    def parts(**vision):
        config = VilavtConfig.from_pretrained(GOLDEN / "ckpt" / "tiny_late")
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        tower, encoder = VisionTower(config.vision_config), QueryEncoder(config.text_encoder_config)
        tower.load_weights((n.removeprefix("visual."), t) for n, t in tensors.items() if n.startswith("visual."))
        for layer in tower.modules():  # what vLLM's loader does after loading
            if hasattr(layer, "quant_method"):
                layer.quant_method.process_weights_after_loading(layer)
        prefix = "text_encoder."
        encoder.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        projection = torch.nn.Linear(config.text_encoder_config.hidden_size, config.vision_config.hidden_size)
        projection.load_state_dict({n: tensors[f"text_proj.{n}"] for n in ("weight", "bias")})
        return tower.eval(), encoder.eval(), projection

    return parts


def load_case(name):
    manifest = json.loads((GOLDEN / "out" / "manifest.json").read_text())["cases"][name]
    tensors = load_file(GOLDEN / "out" / manifest.get("file", f"{name}.safetensors"))
    pixels = load_file(GOLDEN / "out" / "pixels.safetensors")
    inputs = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    expected = {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.")}
    return inputs, torch.cat([pixels[image] for image in manifest["images"]]), expected


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_vision_features_equal_the_published_model(build, name):
    tower, encoder, projection = build(**({"fullatt_block_indexes": [1, 3]} if name.endswith("fullatt13") else {}))
    inputs, pixels, expected = load_case(name)
    ids, mask = inputs["query_ids"], inputs["query_attention_mask"]
    per_query = torch.bincount(inputs["image_to_query_mapping"], minlength=len(ids))
    hidden = encoder.features(ids, mask)
    valid = mask.bool()
    if "query_last_hidden_state" in expected and valid.any():
        torch.testing.assert_close(hidden[valid], expected["query_last_hidden_state"][valid], rtol=0, atol=TEXT)
    features = tower(pixels, inputs["image_grid_thw"], per_query, projection(hidden), mask)
    torch.testing.assert_close(features, expected["vision_out"], rtol=0, atol=VISION)


@torch.no_grad()
def test_positions_beyond_any_table_are_computed(build):
    # Many regions: diagonal offsets run past the 8192 positions that stock rotary tables hold.
    tower, _, _ = build()
    grid = torch.tensor([[1, 2, 400]] * 24)
    n = int(grid.prod(-1).sum())
    text = torch.randn(1, 3, tower.config.hidden_size)
    out = tower(torch.randn(n, 1176), grid, torch.tensor([24]), text, torch.ones(1, 3))
    assert out.isfinite().all()
    layout = VisionLayout(grid, torch.tensor([24]), torch.ones(1, 3), tower.config, torch.device("cpu"))
    last = torch.tensor(24 * 400 + 2.0)
    torch.testing.assert_close(layout.cos[-1, 0, 0], last.cos(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_groups_encoded_together_equal_groups_encoded_alone(build):
    tower, encoder, projection = build()
    inputs, pixels, _ = load_case("d")
    ids, mask, grid = inputs["query_ids"], inputs["query_attention_mask"], inputs["image_grid_thw"]
    per_query = torch.bincount(inputs["image_to_query_mapping"], minlength=len(ids))
    text = projection(encoder.features(ids, mask))
    together = tower(pixels, grid, per_query, text, mask)
    patches = [int(g.prod(-1).sum()) for g in grid.split(per_query.tolist())]
    alone = [
        tower(p, g, per_query[i : i + 1], text[i : i + 1], mask[i : i + 1])
        for i, (p, g) in enumerate(zip(pixels.split(patches), grid.split(per_query.tolist()), strict=True))
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_tower_computes_nothing_that_only_attention_in_transformers_needs(build, monkeypatch):
    def needed(self):
        raise AssertionError("computed for nothing, in the thread that feeds the GPU")

    for owner, name in ((Segments, "buckets"), (Segments, "unbucket"), (VisionLayout, "cos"), (VisionLayout, "sin")):
        monkeypatch.setattr(owner, name, property(needed))
    tower, encoder, projection = build()
    inputs, pixels, _ = load_case("a")
    ids, mask = inputs["query_ids"], inputs["query_attention_mask"]
    per_query = torch.bincount(inputs["image_to_query_mapping"], minlength=len(ids))
    assert len(tower(pixels, inputs["image_grid_thw"], per_query, projection(encoder.features(ids, mask)), mask))


def packed(tower, *grids, per_query=None, columns=(0, 3), kept=True):
    """The packing that the tower takes for these images under queries with tokens in `columns`, or a fresh one."""
    grid, mask = torch.tensor(grids), torch.zeros(len(per_query or grids), 5, dtype=torch.long)
    mask[:, slice(*columns)] = 1
    per_query = torch.tensor(per_query or [1] * len(grids))
    n = int(grid.prod(-1).sum())
    make = partial(tower._packing, grid, per_query, mask, n)
    return tower.packings.get(grid, per_query, mask, make) if kept else make()


def tensors_of(packing):
    of_spans = [one for kind in sorted(packing.spans) for one in vars(packing.spans[kind]).values()]
    return [packing.order, packing.undo, packing.text_index, packing.cos, packing.sin, *of_spans]


def test_calls_of_the_same_sizes_share_a_packing_that_equals_a_fresh_one(build):
    tower, _, _ = build()
    variants = [
        ([[1, 8, 12]], {}),
        ([[1, 12, 8]], {}),
        ([[1, 8, 12], [1, 4, 4]], {}),
        ([[1, 8, 12], [1, 4, 4]], {"per_query": [2]}),
        ([[1, 8, 12]], {"columns": (0, 2)}),
        ([[1, 8, 12]], {"columns": (1, 4)}),
        ([[1, 8, 12]], {"columns": (0, 0)}),
    ]

    first = [packed(tower, *grids, **more) for grids, more in variants]
    assert len(tower.packings) == len(variants)
    for one, (grids, more) in zip(first, variants, strict=True):
        assert packed(tower, *grids, **more) is one
        fresh = packed(tower, *grids, **more, kept=False)
        for kept, made in zip(tensors_of(one), tensors_of(fresh), strict=True):
            assert kept is made is None or torch.equal(kept, made)


@torch.no_grad()
def test_a_packing_that_is_used_again_gives_the_same_features(build):
    tower, encoder, projection = build()
    inputs, pixels, _ = load_case("d")
    ids, mask = inputs["query_ids"], inputs["query_attention_mask"]
    per_query = torch.bincount(inputs["image_to_query_mapping"], minlength=len(ids))
    text = projection(encoder.features(ids, mask))
    features = [tower(pixels, inputs["image_grid_thw"], per_query, text, mask) for _ in range(2)]
    assert len(tower.packings) == 1
    assert torch.equal(*features)


def test_packings_are_bounded_by_their_patches_and_the_one_used_longest_ago_goes_first(build):
    tower, _, _ = build()
    size = 64 + 5  # patches, and a query's room
    tower.packings = type(tower.packings)(2 * size)
    first, second = packed(tower, [1, 8, 8]), packed(tower, [1, 4, 16])
    assert packed(tower, [1, 8, 8]) is first
    packed(tower, [1, 16, 4])
    assert (len(tower.packings), tower.packings.patches) == (2, 2 * size)
    assert packed(tower, [1, 8, 8]) is first
    assert packed(tower, [1, 4, 16]) is not second
    packed(tower, [1, 16, 16])  # larger than all of it
    assert (len(tower.packings), tower.packings.patches) == (0, 0)
