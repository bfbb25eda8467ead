"""Quantised checkpoints by the names of their tensors: what vLLM's layers take of AWQ, GPTQ, fp8 and
compressed-tensors, which layers stay as they are, and what is refused. The model is built and loaded; no engine runs.
"""

import ast
import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file

from vilavt_core.architecture import VLLM_FUSED, is_new, vllm_name
from vilavt_core.doctor import Status, examine
from vilavt_vllm import register
from vilavt_vllm.checkpoints import require_servable
from vilavt_vllm.errors import WeightsError
from vilavt_vllm.model import bare_layers

README = Path(__file__).parents[2] / "vilavt_vllm" / "README.md"
GROUP = 32
"""Weights that share a scale."""
KEPT = ["visual", "text_encoder", "text_proj", "lm_head"]
"""What 4-bit methods leave alone, by parts of names."""


def _compressed(bits: int, kind: str, strategy: str, format: str, activations: bool, **more) -> dict:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **more}
    dynamic = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": dynamic if activations else None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:.*{name}.*" for name in KEPT[:3])],
        "config_groups": {"group_0": group},
    }


METHODS = {
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": KEPT,
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "dynamic": {f"-:.*{name}.*": {} for name in KEPT},
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": []},
    "compressed-tensors fp8": _compressed(8, "float", "channel", "float-quantized", True),
    "compressed-tensors W4A16": _compressed(4, "int", "group", "pack-quantized", False, group_size=GROUP),
}
"""``quantization_config`` as the tools write it."""


def of_layer(method: str, layer: str, weight: torch.Tensor, place: int) -> dict[str, torch.Tensor]:
    """The tensors that a method writes instead of one weight (out, in); scales tell layers apart."""
    out, width = weight.shape
    scale, groups = float(place + 1), width // GROUP
    number = torch.float16 if method in ("awq", "gptq") else torch.bfloat16
    match method:
        case "awq":
            tensors = {
                "qweight": torch.zeros(width, out // 8, dtype=torch.int32),
                "qzeros": torch.zeros(groups, out // 8, dtype=torch.int32),
                "scales": torch.full((groups, out), scale, dtype=number),
            }
        case "gptq":
            tensors = {
                "qweight": torch.zeros(width // 8, out, dtype=torch.int32),
                "qzeros": torch.zeros(groups, out // 8, dtype=torch.int32),
                "scales": torch.full((groups, out), scale, dtype=number),
                "g_idx": torch.arange(width, dtype=torch.int32) // GROUP,
            }
        case "fp8":
            tensors = {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.tensor(scale)}
        case "compressed-tensors fp8":
            tensors = {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.full((out, 1), scale)}
        case "compressed-tensors W4A16":
            tensors = {
                "weight_packed": torch.zeros(out, width // 8, dtype=torch.int32),
                "weight_scale": torch.full((out, groups), scale, dtype=number),
                "weight_shape": torch.tensor([out, width]),
            }
    return {f"{layer}.{kind}": tensor for kind, tensor in tensors.items()}


@pytest.fixture(scope="module")
def stored(tiny):
    return load_file(tiny.path / "model.safetensors")


def layers(stored) -> list[str]:
    """Linear layers of the language model, by the names in the file."""
    found = (name.removesuffix(".weight") for name in stored if name.startswith("model.layers.") and "norm" not in name)
    return [name for name in found if not name.endswith(".bias")]


def tensors_of(method: str, stored) -> dict[str, torch.Tensor]:
    """A checkpoint whose language model is quantised."""
    out = dict(stored)
    for place, layer in enumerate(layers(stored)):
        out |= of_layer(method, layer, out.pop(f"{layer}.weight"), place)
    return out


@pytest.fixture
def quantised(tiny, tmp_path):
    """`quantised(method, **changes)` -> a folder whose configuration says so."""

    def write(method: str, **changes) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny.path, folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = METHODS[method] | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def build(vllm_world):
    """`build(folder)` -> vLLM's model, without weights."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    register()

    def make(folder: Path, **options):
        method = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
        dtype = "float16" if method in ("awq", "gptq") else "bfloat16"
        arguments = EngineArgs(
            str(folder), dtype=dtype, enforce_eager=True, max_model_len=1024, block_size=32, **options
        )
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            return initialize_model(config)

    return make


def not_quantised(stored) -> list[str]:
    """Layers outside the language model, by vLLM's names: fp8's list takes no patterns."""
    names = {vllm_name(name).rpartition(".")[0] for name in stored if name.startswith("visual.")}
    fused = {name.replace(half, layer) for name in names for layer in VLLM_FUSED for half in VLLM_FUSED[layer]}
    return sorted(names | fused)


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_of_a_method_finds_its_layer_and_the_rest_stays_as_it_is(method, quantised, build, stored):
    changes = {"ignored_layers": not_quantised(stored)} if method == "fp8" else {}
    model = build(quantised(method, **changes))
    model.load_weights(tensors_of(method, stored).items())
    own = dict(model.named_parameters())
    kinds = {name.rpartition(".")[2] for name in own if ".qkv_proj." in name and "layers" in name}
    assert len(kinds) > 2, kinds  # more than a weight and a bias
    names = layers(stored)
    scale = next(kind for kind in ("scales", "weight_scale") if kind in kinds)
    for place, layer in enumerate(names):
        end = layer.rpartition(".")[2]
        fused = next((one for one, halves in VLLM_FUSED.items() if end in halves), end)
        parameter = own[f"{vllm_name(layer).removesuffix(end)}{fused}.{scale}"]
        assert (parameter.data == place + 1).any(), layer
    for name in stored:
        if name.startswith(("text_proj.", "text_encoder.")) or is_new(name) or ".attn.qkv." in name:
            assert torch.equal(own[vllm_name(name)].data.float(), stored[name].to(own[vllm_name(name)].dtype).float())


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_stored_otherwise_than_the_configuration_says_is_refused_by_name(
    method, quantised, build, stored
):
    changes = {"ignored_layers": not_quantised(stored)} if method == "fp8" else {}
    model, tensors = build(quantised(method, **changes)), tensors_of(method, stored)
    layer = layers(stored)[0]
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{layer}.")}
    whole |= {name: tensor for name, tensor in stored.items() if name.startswith(f"{layer}.")}
    there = re.escape(layer.removeprefix("model."))
    with pytest.raises(WeightsError, match=rf"{there}.*must be in the list of those to ignore"):
        model.load_weights(whole.items())


def test_a_tower_that_is_stored_quantised_and_not_listed_so_is_refused_by_name(quantised, build, stored):
    method = "compressed-tensors fp8"
    model, tensors = build(quantised(method)), tensors_of(method, stored)
    layer = "visual.blocks.0.attn.qkv"
    tensors |= of_layer(method, layer, tensors.pop(f"{layer}.weight"), 0)
    with pytest.raises(WeightsError):
        model.load_weights(tensors.items())


def test_a_whole_checkpoint_that_is_quantised_while_it_is_loaded_lacks_nothing(build, tiny, stored):
    model = build(tiny.path, quantization="fp8_per_tensor")
    assert bare_layers(model.checkpoint_names(), stored) == set()


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_checkpoint_is_servable_and_named_by_the_doctor(method, quantised, stored):
    folder = quantised(method)
    save_file(tensors_of(method, stored), folder / "model.safetensors", metadata={"format": "pt"})
    require_servable(str(folder), {})
    checks = {check.name: check for check in examine(folder)}
    assert f"quantised with {METHODS[method]['quant_method']}" in checks["checkpoint"].detail
    assert checks["vllm processor"].status is Status.OK, checks["vllm processor"].detail


def recipe() -> list[str]:
    """The layers that the README's recipe leaves alone."""
    (written,) = re.findall(r"(?s)\nIGNORE = (\[.*?\])\n", README.read_text())
    return ast.literal_eval(written)


def test_the_recipe_quantises_language_model_and_tower_and_leaves_alone_what_it_says(tiny):
    """compressed-tensors is what llm-compressor finds layers with."""
    model = copy.deepcopy(tiny.model)
    config = _compressed(8, "int", "channel", "int-quantized", True) | {"ignore": recipe()}
    apply_quantization_config(model, QuantizationConfig(**config))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    done = {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    parts = ("lm_head", "text_proj", "text_encoder", "instruct_", "merger", "patch_embed")
    assert done == {name for name in linear if not any(part in name for part in parts)}
    assert {name.split(".layers.")[0].split(".blocks.")[0] for name in done} == {"model.language_model", "model.visual"}
