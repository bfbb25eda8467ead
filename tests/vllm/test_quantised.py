"""A quantised checkpoint (compressed-tensors, W8A8) in a real engine: its numbers, and what if parts are missing."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vilavt_core.architecture import published_name

pytestmark = pytest.mark.engine

CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "text_proj", "re:.*text_encoder.*", "re:.*merger.*", "re:.*patch_embed.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""As llm-compressor writes it."""
HIGHEST = 63
"""Of an int8 weight. Processors without VNNI add two products in 16 bits, which 127 * 255 twice would overflow."""


def is_quantised(name: str) -> bool:
    name = published_name(name)
    return (
        name.endswith(".weight")
        and (".layers." in name or ".blocks." in name)
        and "norm" not in name
        and not name.startswith("text_encoder")
    )


def in_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as int8, and the scale of each row."""
    scale = weight.abs().amax(1, keepdim=True) / HIGHEST
    return (weight / scale).round().to(torch.int8), scale


@pytest.fixture(scope="module")
def rounded(tiny):
    """The tiny model in transformers with the weights that are quantised, but for activations in fp32."""
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_quantised(name):
                integers, scale = in_8_bits(weight)
                weight.copy_(integers * scale)
    return SimpleNamespace(**vars(tiny) | {"model": model})


@pytest.fixture(scope="module")
def quantise(tiny, tmp_path_factory):
    """`quantise(*parts)` -> a folder with int8 weights and scales, without tensors whose name has one of the parts."""

    def write(*leave_out: str):
        folder = tmp_path_factory.mktemp("quantised") / "checkpoint"
        shutil.copytree(tiny.path, folder)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(tiny.path / "model.safetensors").items():
            if any(part in name for part in leave_out):
                continue
            if is_quantised(name):
                tensor, tensors[f"{name}_scale"] = in_8_bits(tensor)
            tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
        return folder

    return write


def test_a_quantised_checkpoint_gives_the_numbers_of_its_weights(start, quantise, tiny, rounded, tools, pictures):
    images = pictures[:3]
    asked, another = (tools.conversation((query, 2)) for query in ("the red button", "a blue door"))
    found, whole = start(quantise()).next_logprobs(asked, images), tools.reference(tiny, asked, images)
    of_its_weights = tools.reference(rounded, asked, images)
    assert tools.difference(found, whole) > 1e-2  # it is quantised
    activations = tools.difference(found, of_its_weights)  # which it rounds too
    assert activations < tools.difference(tools.reference(tiny, another, images), whole) / 8


def test_a_quantised_checkpoint_without_the_query_path_is_refused_by_name(start, quantise):
    with pytest.raises(ValueError, match=r"lacks \d+ tensors.*instruct_key_proj.weight") as told:
        start(quantise("text_proj", "instruct_"))
    assert "text_proj.weight" in str(told.value)
