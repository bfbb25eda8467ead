"""Where the model lives: weights that transformers placed stay where they are, inputs go where they compute."""

import pytest
import torch
from family import noise as picture
from family import tiles

from vilavt_core.conversation import Inquiry
from vilavt_core.errors import EngineError
from vilavt_core.presets import Limits
from vilavt_hf import compat
from vilavt_hf.attention_maps import look
from vilavt_hf.chat import VilavtChat
from vilavt_hf.vision_layout import VisionLayout

LIMITS = Limits(max_turns=2, max_new_tokens_per_turn=8, max_pixels=84 * 84)
PARTS = ("model.visual", "model.language_model", "model.text_encoder", "model.text_proj", "lm_head")


def answered(checkpoint, **settings):
    chat = VilavtChat.from_pretrained(checkpoint, dtype=torch.float32, limits=LIMITS, **settings)
    results = chat.ask_many([([picture(i)], f"What is {i}?") for i in range(3)])
    assert [result.error for result in results] == [None] * 3
    return chat, [result.turns[0].text for result in results]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    return answered(tiny_checkpoint, device="cpu")[1]


@pytest.mark.parametrize("offloaded", [*PARTS, "model.visual.blocks.2", ""])
def test_weights_that_wait_on_the_disk_compute_the_same(tiny_checkpoint, tmp_path, expected, offloaded):
    blocks = {f"model.visual.blocks.{i}": "cpu" for i in range(4)}
    rest = {f"model.visual.{name}": "cpu" for name in ("patch_embed", "rotary_pos_emb", "merger")}
    parts = dict.fromkeys(PARTS[1:], "cpu") | blocks | rest
    placed = {name: "disk" if name.startswith(offloaded) else device for name, device in parts.items()}
    kwargs = {"device_map": placed, "offload_folder": str(tmp_path)}
    chat, found = answered(tiny_checkpoint, model_kwargs=kwargs)
    waiting = {name for name, weight in chat.model.named_parameters() if weight.device.type == "meta"}
    assert waiting
    assert all(name.startswith(offloaded) for name in waiting)
    assert found == expected
    assert chat.provenance(0).device == "cpu"


def test_a_device_map_and_a_device_are_refused_together(tiny_checkpoint):
    with pytest.raises(EngineError, match="device=cpu and device_map='auto'"):
        VilavtChat.from_pretrained(tiny_checkpoint, device="cpu", model_kwargs={"device_map": "auto"})


def test_attention_maps_of_a_tower_that_waits_on_the_disk(tiny_checkpoint, tiny_model, processor, tmp_path):
    kwargs = {"device_map": {"model.visual": "disk"} | dict.fromkeys(PARTS[1:], "cpu"), "offload_folder": str(tmp_path)}
    chat = VilavtChat.from_pretrained(tiny_checkpoint, dtype=torch.float32, model_kwargs=kwargs)
    inputs = processor.encode_inquiries([Inquiry((tiles(0, 84, 56), tiles(1, 56, 56)), "what is it?", (0, 1))])
    here, there = (look(model, inputs)[0].features for model in (tiny_model, chat.model))
    assert all(map(torch.equal, here, there))


def test_a_layout_is_made_anew_for_a_block_on_another_device(tiny_model):
    grid, counts = torch.tensor([[1, 4, 6], [1, 4, 4]]), torch.tensor([2])
    layout = VisionLayout(grid, counts, torch.ones(1, 3), tiny_model.config.vision_config, torch.device("cpu"))
    assert layout.on(torch.device("cpu")) is layout
    other = layout.on(torch.device("meta"))
    assert other is layout.on(torch.device("meta"))
    tensors = [other.order, other.text_index, other.cos, other.sin, *(s.unbucket for s in other.segments.values())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_inputs_go_where_a_hook_computes():
    class Hook:
        execution_device = "meta"

    class Several:
        hooks = (object(), Hook())

    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    assert compat.input_device(model) == torch.device("cpu")
    for hook in (Hook(), Several()):
        model._hf_hook = hook
        assert compat.input_device(model) == torch.device("meta")
