"""What `vilavt_core.architecture` says about the model, held against the model, built on the meta device."""

import copy

import pytest
import torch

from vilavt_core.architecture import (
    INTEGRATION_POINTS,
    PARTS,
    VLLM_PREFIXES,
    counted_part,
    expected_tensors,
    find_part,
    integration_points_of,
    is_added,
    is_tied,
    module_name,
    names_of_vllm,
    part_of,
    published_name,
    query_aware_blocks,
    query_encoder_part,
    vllm_name,
)
from vilavt_core.errors import CheckpointError
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration

# Every size different from every other, so that a mix-up shows.
SMALL = {
    "text_config": {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]},
    },
    "vision_config": {
        "depth": 9,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_heads": 2,
        "out_hidden_size": 48,
        "window_size": 56,
        "fullatt_block_indexes": [0, 5],
    },
    "text_encoder_config": {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def model_of(point: str | None = "late", *, tied: bool = False, biases: bool = False) -> VilavtForConditionalGeneration:
    settings = copy.deepcopy(SMALL)
    settings["vision_config"]["integration_point"] = point
    settings["text_encoder_config"]["attention_bias"] = biases
    with torch.device("meta"):
        return VilavtForConditionalGeneration(VilavtConfig(**settings, tie_word_embeddings=tied))


def shapes_of(model: VilavtForConditionalGeneration) -> dict[str, tuple[int, ...]]:
    return {published_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("point", [*INTEGRATION_POINTS, None])
def test_the_table_of_shapes_is_the_model_s(point, tied):
    model = model_of(point, tied=tied)
    config = model.config.to_dict()
    assert expected_tensors(config) == shapes_of(model)
    assert is_tied(config) == tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_the_table_of_shapes_knows_biases_of_the_query_encoder():
    model = model_of(biases=True)
    assert expected_tensors(model.config.to_dict()) == shapes_of(model)
    assert any(name.endswith("self_attn.o_proj.bias") for name in query_encoder_part(shapes_of(model)))


def test_the_table_of_shapes_holds_for_the_sizes_that_configurations_leave_out():
    with torch.device("meta"):
        model = VilavtForConditionalGeneration(VilavtConfig())
    assert expected_tensors(model.config.to_dict()) == shapes_of(model)


@pytest.mark.parametrize(
    ("point", "blocks"),
    [
        ("all", {0, 1, 2, 3, 4, 5, 6, 7, 8}),
        ("early", {0, 1, 2, 3}),
        ("late", {4, 5, 6, 7, 8}),
        ("late2", {6, 7, 8}),
        ("late3", {2, 3, 4, 5, 6, 7, 8}),
        ("sparse", {0, 5}),
        ("none", set()),
        (None, set()),
    ],
)
def test_integration_points_choose_these_blocks(point, blocks):
    vision = SMALL["vision_config"] | {"integration_point": point}
    assert query_aware_blocks(vision) == blocks
    assert {i for i, block in enumerate(model_of(point).model.visual.blocks) if block.kind == "group"} == blocks
    assert integration_points_of(blocks, vision) == ([point] if blocks else [])


def test_an_unknown_integration_point_is_refused_with_the_known_ones():
    with pytest.raises(CheckpointError, match=r"'middle', expected one of \['all', .*'none'\] or null"):
        query_aware_blocks({"depth": 4, "integration_point": "middle"})


def test_published_and_module_names_lead_to_each_other():
    names = list(model_of().state_dict())
    published = [published_name(name) for name in names]
    assert not set(names) & set(published) - {"lm_head.weight"}
    assert [module_name(name) for name in published] == names
    assert [module_name(name) for name in names] == names
    assert [published_name(name) for name in published] == published
    assert published_name("model.visual.merger.ln_q.weight") == "visual.merger.ln_q.weight"
    assert published_name("model.language_model.layers.1.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert published_name("model.text_encoder.norm.weight") == "text_encoder.norm.weight"
    assert published_name("model.text_proj.bias") == "text_proj.bias"


def test_vllm_names_lead_back_to_published_ones():
    for name in model_of().state_dict():
        published = published_name(name)
        assert names_of_vllm(vllm_name(published)) == {published}
        for given in (name, published):  # as vLLM applies the prefixes: each in turn
            for prefix, new in VLLM_PREFIXES.items():
                given = new + given.removeprefix(prefix) if given.startswith(prefix) else given
            assert given == vllm_name(published)
    fused = "language_model.model.layers.2.self_attn.qkv_proj.bias"
    assert names_of_vllm(fused) == {f"model.layers.2.self_attn.{x}_proj.bias" for x in "qkv"}
    assert names_of_vllm("visual.blocks.0.attn.qkv.weight") == {"visual.blocks.0.attn.qkv.weight"}


def test_every_tensor_belongs_to_one_part_under_every_name():
    model = model_of()
    found = set()
    for name in model.state_dict():
        names = (name, published_name(name), vllm_name(published_name(name)), f"module.{name}", f"base_model.{name}")
        (part,) = {part_of(one) for one in names}
        found.add(part)
    assert found == set(PARTS)
    assert part_of("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight") == (
        "language_model"
    )
    assert find_part("value_head.weight") is None
    with pytest.raises(ValueError, match=r"value_head\.weight belongs to none"):
        part_of("value_head.weight")


def test_what_a_qwen_lacks_is_the_query_encoder_and_what_is_new():
    added = {counted_part(name) for name in shapes_of(model_of()) if is_added(name)}
    kept = {counted_part(name) for name in shapes_of(model_of()) if not is_added(name)}
    assert added == {"query_projections", "text_encoder", "text_proj"}
    assert kept == {"vision_tower", "merger", "language_model", "lm_head"}
