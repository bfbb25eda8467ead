"""Loading: our checkpoints, published ones, updates of a running model under either naming; nothing stays at random."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def _layers_read_their_parameters():
    """As on CUDA: vLLM's CPU layers otherwise pack a copy of each weight and drop the parameter."""
    from vllm import _custom_ops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_custom_ops, "_supports_onednn", False)
        yield


@pytest.fixture(scope="module")
def engine(start, tiny):
    return start(tiny.path)


def changed_checkpoint(tiny, folder, change=lambda tensors: None, config=None):
    shutil.copytree(tiny.path, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        settings = json.loads((folder / "config.json").read_text())
        config(settings)
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def question(tools, pictures):
    return tools.conversation(("the red button", 2)), pictures[:3]


def update(engine, tensors):
    engine.model.load_weights(tensors)
    engine.forget()


def test_updates_under_names_of_the_transformers_model_give_its_numbers(
    engine, build_checkpoint, tiny, tools, pictures
):
    prompt, images = question(tools, pictures)
    _, other = build_checkpoint(seed=7)
    old, new = (
        engine.next_logprobs(prompt, images),
        tools.reference(type(tiny)(model=other, processor=tiny.processor), prompt, images),
    )
    update(engine, list(other.named_parameters()))
    assert tools.difference(engine.next_logprobs(prompt, images), new) <= 1e-3
    assert tools.difference(old, new) > 1e-2
    stored = load_file(tiny.path / "model.safetensors")
    update(engine, list(stored.items()))
    assert tools.difference(engine.next_logprobs(prompt, images), old) == 0


def test_updates_may_come_in_buckets_of_any_size(engine, build_checkpoint, tiny, tools, pictures):
    prompt, images = question(tools, pictures)
    _, other = build_checkpoint(seed=7)
    parameters = list(other.named_parameters())
    for i in range(0, len(parameters), 5):
        engine.model.load_weights(parameters[i : i + 5])
    engine.forget()
    expected = tools.reference(type(tiny)(model=other, processor=tiny.processor), prompt, images)
    assert tools.difference(engine.next_logprobs(prompt, images), expected) <= 1e-3
    update(engine, list(load_file(tiny.path / "model.safetensors").items()))


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.3.attn.instruct_key_proj.weight",
        "text_encoder.layers.1.mlp.down_proj.weight",
        "text_proj.bias",
        "lm_head.weight",
    ],
)
def test_one_updated_tensor_reaches_the_output(engine, tiny, tools, pictures, name):
    prompt, images = question(tools, pictures)
    before = engine.next_logprobs(prompt, images)
    stored = load_file(tiny.path / "model.safetensors")[name]
    update(engine, [(name, stored * 1.5 + 0.05)])
    assert tools.difference(before, engine.next_logprobs(prompt, images)) > 1e-4
    update(engine, [(name, stored)])
    assert tools.difference(before, engine.next_logprobs(prompt, images)) == 0


def test_a_tensor_of_no_parameter_is_refused_by_name(engine):
    from vilavt_vllm.errors import WeightsError

    for name in ("visual.blocks.0.attn.instruct_key_proj.weight", "model.layers.9.mlp.down_proj.weight", "surprise"):
        with pytest.raises(WeightsError, match=name.rsplit(".", 2)[-2] if "." in name else name):
            engine.model.load_weights([(name, torch.zeros(2, 2))])


def test_names_needed_are_the_names_of_the_checkpoint(engine, tiny):
    assert engine.model.checkpoint_names() == set(load_file(tiny.path / "model.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.2.attn.instruct_value_proj.bias",
        "visual.blocks.0.mlp.gate_proj.weight",
        "text_encoder.norm.weight",
        "text_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
    ],
)
def test_a_checkpoint_without_a_tensor_is_refused_by_name(tiny, tools, tmp_path, start, name):
    folder = changed_checkpoint(tiny, tmp_path / "incomplete", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"lacks 1 tensors.*{name}"):
        start(folder)


def test_a_layer_is_there_whatever_a_quantisation_calls_its_tensors():
    from vilavt_vllm.model import bare_layers

    needed = {"text_proj.weight", "text_proj.bias", "a.q_proj.weight_packed", "a.q_proj.weight_scale", "a.norm.weight"}
    assert bare_layers(needed, needed) == set()
    assert bare_layers(needed, {"text_proj.weight", "a.q_proj.qweight", "a.norm.weight"}) == {"text_proj.bias"}
    assert bare_layers(needed, {"a.q_proj.weight_packed", "a.norm.weight"}) == {"text_proj.weight"}
    whole = {"text_proj.weight", "text_proj.bias", "a.norm.weight"}
    # quantised in the model alone, and in the checkpoint alone
    assert bare_layers(needed, whole | {"a.q_proj.weight"}) == {"a.q_proj.weight_packed", "a.q_proj.weight_scale"}
    assert bare_layers(needed, whole - {"a.norm.weight"} | {"a.norm.qweight", "a.q_proj.scales"}) == {"a.norm.weight"}


def test_query_projections_outside_query_aware_blocks_are_refused(tiny, tmp_path, start):
    def none(settings):
        settings["vision_config"]["integration_point"] = "late2"

    folder = changed_checkpoint(tiny, tmp_path / "mismatch", config=none)
    with pytest.raises(ValueError, match="instruct_"):
        start(folder)


def test_a_published_configuration_is_served(tiny, tmp_path, start, tools, pictures):
    def published(settings):
        settings["architectures"] = ["Qwen2_5_VLForConditionalGeneration_Vilavt"]
        settings["integration_point"] = None
        settings["vision_config"]["model_type"] = "qwen2_5_vl"

    prompt, images = question(tools, pictures)
    folder = changed_checkpoint(tiny, tmp_path / "published", config=published)
    expected = tools.reference(tiny, prompt, images)
    assert tools.difference(start(folder).next_logprobs(prompt, images), expected) <= 1e-3


def test_the_published_sft_flavour_is_served_when_the_architecture_is_named(tiny, tmp_path, start, tools, pictures):
    def sft(settings):
        settings["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
        settings["model_type"] = "qwen2_5_vl"
        del settings["text_encoder_config"]

    prompt, images = question(tools, pictures)
    folder = changed_checkpoint(tiny, tmp_path / "sft", config=sft)
    engine = start(folder, hf_overrides={"architectures": ["VilavtForConditionalGeneration"]})
    assert tools.difference(engine.next_logprobs(prompt, images), tools.reference(tiny, prompt, images)) <= 1e-3


def test_dummy_weights_are_replaced_by_partial_updates(tiny, start, tools, pictures):
    prompt, images = question(tools, pictures)
    engine = start(tiny.path, load_format="dummy")
    for name, tensor in tiny.model.named_parameters():
        engine.model.load_weights([(name, tensor.detach())])
    engine.forget()
    assert tools.difference(engine.next_logprobs(prompt, images), tools.reference(tiny, prompt, images)) <= 1e-3


def test_packed_weights_are_replaced_through_vllms_own_reload(
    tiny, start, build_checkpoint, tools, pictures, monkeypatch
):
    from vllm import _custom_ops

    monkeypatch.setattr(_custom_ops, "_supports_onednn", True)
    prompt, images = question(tools, pictures)
    _, other = build_checkpoint(seed=7)
    engine = start(tiny.path)
    weights = [(name, tensor.detach()) for name, tensor in other.named_parameters()]
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    engine.forget()
    expected = tools.reference(type(tiny)(model=other, processor=tiny.processor), prompt, images)
    assert tools.difference(engine.next_logprobs(prompt, images), expected) <= 1e-3
