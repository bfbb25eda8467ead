"""The tower against a second, slow implementation of tests/golden/README.md: token by token, segment by segment."""

import pytest
import torch
from slow_tower import slow_tower

from vilavt_hf import compat

ATOL = 2e-4  # fp32, two summation orders, four blocks of peaked attention
POINTS = ["all", "early", "late", "late2", "late3", "sparse", "none", None]


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(7)
    grids = [(1, 6, 8), (1, 4, 4), (2, 6, 4), (1, 4, 8), (1, 2, 6)]
    counts = [1, 3, 1]
    patches = sum(t * h * w for t, h, w in grids)
    mask = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])  # empty, right padded, left padded
    return {
        "grids": grids,
        "counts": counts,
        "pixels": torch.randn(patches, 1176, generator=generator),
        "query_ids": torch.randint(0, 200, mask.shape, generator=generator),
        "mask": mask,
    }


@torch.no_grad()
@pytest.mark.parametrize("point", POINTS)
def test_every_integration_point_equals_the_slow_implementation(build_model, inputs, point):
    model = build_model(integration_point=point, fullatt_block_indexes=[0, 3])
    text = model.model.encode_queries(inputs["query_ids"], inputs["mask"])
    expected = slow_tower(model.model.visual, inputs["pixels"], inputs["grids"], inputs["counts"], text, inputs["mask"])
    actual = features(model, inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@torch.no_grad()
@pytest.mark.parametrize("window_size", [28, 56, 84, 112])
@pytest.mark.parametrize("fullatt", [[], [2], [0, 1, 2, 3]])
def test_any_window_size_and_full_block_list_equals_the_slow_implementation(build_model, inputs, window_size, fullatt):
    model = build_model(integration_point="late2", fullatt_block_indexes=fullatt, window_size=window_size)
    text = model.model.encode_queries(inputs["query_ids"], inputs["mask"])
    expected = slow_tower(model.model.visual, inputs["pixels"], inputs["grids"], inputs["counts"], text, inputs["mask"])
    torch.testing.assert_close(features(model, inputs), expected, rtol=0, atol=ATOL)


def features(model, inputs, **changes):
    given = inputs | changes
    output = model.model.get_image_features(
        given["pixels"],
        torch.tensor(given["grids"]),
        query_ids=given["query_ids"],
        query_attention_mask=given["mask"],
        images_per_query=torch.tensor(given["counts"]),
    )
    return torch.cat(tuple(compat.pooled(output)))


@torch.no_grad()
def test_groups_are_independent_of_each_other(tiny_model, inputs):
    together = features(tiny_model, inputs)
    start = inputs["grids"][0][1] * inputs["grids"][0][2]
    middle = sum(t * h * w for t, h, w in inputs["grids"][1:4])
    alone = features(
        tiny_model,
        inputs,
        pixels=inputs["pixels"][start : start + middle],
        grids=inputs["grids"][1:4],
        counts=[3],
        query_ids=inputs["query_ids"][1:2],
        mask=inputs["mask"][1:2],
    )
    torch.testing.assert_close(together[start // 4 : (start + middle) // 4], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_query_changes_its_own_group_only_and_visibly(tiny_model, inputs):
    base = features(tiny_model, inputs)
    ids = inputs["query_ids"].clone()
    ids[1, 0] = (ids[1, 0] + 1) % 200
    difference = (features(tiny_model, inputs, query_ids=ids) - base).abs().amax(1)
    first = 6 * 8 // 4
    middle = (4 * 4 + 2 * 6 * 4 + 4 * 8) // 4
    assert difference[first : first + middle].max() > 1e-2
    assert difference[:first].max() <= 1e-5
    assert difference[first + middle :].max() <= 1e-5


@torch.no_grad()
def test_right_padding_of_queries_does_not_matter(tiny_model, inputs):
    keep = {"grids": inputs["grids"][:1], "counts": [1], "pixels": inputs["pixels"][: 6 * 8]}
    ids = inputs["query_ids"][1:2, :3]
    short = features(tiny_model, inputs, **keep, query_ids=ids, mask=torch.ones_like(ids))
    wide_ids = torch.cat([ids, torch.zeros(1, 47, dtype=ids.dtype)], 1)
    wide_mask = (torch.arange(50) < 3).long()[None]
    wide = features(tiny_model, inputs, **keep, query_ids=wide_ids, mask=wide_mask)
    torch.testing.assert_close(short, wide, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_order_of_regions_in_a_group_matters(tiny_model, inputs):
    size = 4 * 4
    pixels = torch.randn(2 * size, 1176, generator=torch.Generator().manual_seed(3))
    pair = {"grids": [(1, 4, 4), (1, 4, 4)], "counts": [2], "query_ids": inputs["query_ids"][1:2]}
    pair["mask"] = inputs["mask"][1:2]
    forwards = features(tiny_model, inputs, pixels=pixels, **pair)
    backwards = features(tiny_model, inputs, pixels=torch.cat([pixels[size:], pixels[:size]]), **pair)
    assert (forwards[:4] - backwards[4:]).abs().max() > 1e-2


@torch.no_grad()
def test_without_query_inputs_every_image_is_its_own_empty_query(tiny_model, inputs):
    grids = torch.tensor(inputs["grids"])
    plain = torch.cat(tuple(compat.pooled(tiny_model.model.get_image_features(inputs["pixels"], grids))))
    explicit = features(
        tiny_model,
        inputs,
        counts=[1] * 5,
        query_ids=torch.zeros(5, 3, dtype=torch.long),
        mask=torch.zeros(5, 3, dtype=torch.long),
    )
    torch.testing.assert_close(plain, explicit, rtol=0, atol=1e-5)


@torch.no_grad()
def test_integration_point_none_is_the_stock_tower(build_model, inputs):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    model = build_model(integration_point=None)
    stock = Qwen2_5_VisionTransformerPretrainedModel._from_config(model.config.vision_config).eval()
    stock.load_state_dict(model.model.visual.state_dict())
    grids = torch.tensor([grid for grid in inputs["grids"] if grid[0] == 1])
    pixels = torch.randn(int(grids.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(5))
    expected = compat.pooled(stock(pixels, grid_thw=grids))
    actual = torch.cat(tuple(compat.pooled(model.model.get_image_features(pixels, grids))))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_cost_has_no_mask_over_groups(tiny_model, inputs):
    """Sixteen equal groups run in one attention call per block whose keys are one group long."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    shapes = []
    stock = qwen.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, q, k, v, attention_mask=None, **kwargs):
        shapes.append((tuple(q.shape), tuple(k.shape), attention_mask))
        return stock(module, q, k, v, attention_mask=attention_mask, **kwargs)

    qwen.ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        features(
            tiny_model,
            inputs,
            pixels=inputs["pixels"][:48].repeat(16, 1),
            grids=[(1, 6, 8)] * 16,
            counts=[1] * 16,
            query_ids=inputs["query_ids"][1:2].repeat(16, 1),
            mask=inputs["mask"][1:2].repeat(16, 1),
        )
    finally:
        del qwen.ALL_ATTENTION_FUNCTIONS["sdpa"]  # drops the local override, the global entry stays
    tower_calls = [call for call in shapes if call[0][1] == tiny_model.config.vision_config.num_heads]
    joint = [call for call in tower_calls if call[1][2] == 48 + 3]
    assert [call[0][0] for call in joint] == [16, 16]  # two query-aware blocks, one call each
    assert all(mask is None for _, _, mask in joint)
