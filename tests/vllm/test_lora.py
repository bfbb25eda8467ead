"""LoRA on the language model: the numbers of a model with the update merged in, and the encoder's work is shared."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.engine

RANK, ALPHA = 8, 16
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """A folder as peft saves it for the transformers model, and that model with the update merged in."""
    generator = torch.Generator().manual_seed(3)
    merged, tensors = copy.deepcopy(tiny.model), {}
    for name, module in merged.named_modules():
        if name.startswith("model.language_model.") and name.endswith(TARGETS):
            a = torch.randn(RANK, module.in_features, generator=generator) * 0.1
            b = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            module.weight.data += ALPHA / RANK * b @ a
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [target.rsplit(".", 1)[-1] for target in TARGETS]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, merged


def test_an_adapter_gives_the_numbers_of_the_merged_model_and_leaves_the_encoder_alone(
    start, tiny, tools, pictures, adapter
):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder, merged = adapter
    engine = start(tiny.path, enable_lora=True, max_lora_rank=RANK)
    prompt, images = tools.conversation(("the red button", 2)), pictures[:3]
    plain = engine.next_logprobs(prompt, images)
    assert tools.difference(plain, tools.reference(tiny, prompt, images)) <= 1e-3
    encoded = engine.counts.inquiries
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    request = {"prompt": prompt, "multi_modal_data": {"image": images}}
    adapted = tools.vocabulary(
        engine.llm.generate([request], params, use_tqdm=False, lora_request=LoRARequest("a", 1, str(folder)))[0]
    )
    expected = tools.reference(type(tiny)(model=merged, processor=tiny.processor), prompt, images)
    assert tools.difference(adapted, expected) <= 1e-3
    assert tools.difference(adapted, plain) > 1e-2
    assert engine.counts.inquiries == encoded
