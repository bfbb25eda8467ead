"""The formula of memory, held to what torch allocates on small models."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from family import tiny_config

from vilavt_core.memory import Load, ModelSizes, asked, stored_bytes, trained
from vilavt_core.sft_config import LoraSettings
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration
from vilavt_hf.quantization import quantization_config
from vilavt_hf.train.lora import add_adapters
from vilavt_hf.train.training_model import VilavtForTraining, freeze

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "vilavt-tiny"
CPU = torch.device("cpu")
NEAR = 0.15
CONFIG = {
    "model_type": "vilavt",
    "text_config": {
        "vocab_size": 2000,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_heads": 4,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [1, 3],
        "integration_point": "late",
    },
    "text_encoder_config": {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "image_token_id": 0,
    "tie_word_embeddings": False,
}
SLOW_IN_BF16 = pytest.mark.nightly("autocast to bf16 takes a minute on a CPU without instructions for it")
SIDE = 40
PATCHES = SIDE * SIDE


def peak(work) -> int:
    """Bytes that a function has allocated at most, at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def inputs() -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(PATCHES, 1176),
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]]),
        "query_ids": torch.ones(1, 8, dtype=torch.long),
        "query_attention_mask": torch.ones(1, 8, dtype=torch.long),
        "images_per_query": torch.tensor([1]),
    }


def nbytes(model) -> int:
    """Of all parameters, the scales of quantised ones included."""
    total = 0
    for parameter in model.parameters():
        data = parameter.data
        if names := getattr(data, "tensor_data_names", None):  # torchao's
            total += sum(getattr(data, name).nbytes for name in names)
        else:
            total += data.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:  # bitsandbytes'
            total += state.absmax.nbytes
    return total


def test_weights_have_the_bytes_that_torch_holds():
    sizes = ModelSizes.of_checkpoint(TINY)
    for dtype, element in ((torch.bfloat16, 2), (torch.float32, 4)):
        model = VilavtForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
        assert nbytes(model) == stored_bytes(sizes, element)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_weights_in_8_bits_have_the_bytes_that_torchao_holds():
    config = quantization_config("int8", VilavtConfig.from_pretrained(TINY), CPU)
    model = VilavtForConditionalGeneration.from_pretrained(TINY, dtype=torch.bfloat16, quantization_config=config)
    assert nbytes(model) == stored_bytes(ModelSizes.of_checkpoint(TINY), 2, "int8")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_weights_in_4_bits_have_the_bytes_that_bitsandbytes_holds(tokenizer, tmp_path):
    config = tiny_config(tokenizer, hidden=128)
    config.text_encoder_config.hidden_size = config.text_encoder_config.intermediate_size = 64
    config.text_encoder_config.head_dim = 32
    VilavtForConditionalGeneration(config).save_pretrained(tmp_path)
    model = VilavtForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=quantization_config("int4", config, CPU)
    )
    assert nbytes(model) == stored_bytes(ModelSizes.of_checkpoint(tmp_path), 2, "int4")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_answering_takes_the_activations_that_are_planned(dtype):
    sizes = ModelSizes.of(CONFIG)
    model = VilavtForConditionalGeneration(VilavtConfig(**CONFIG)).eval().to(getattr(torch, dtype))
    pixels = inputs()
    with torch.inference_mode():
        encoding = peak(lambda: model.model.get_image_features(**pixels)) + pixels["pixel_values"].nbytes
        tokens = torch.ones(1, 1500, dtype=torch.long)
        positions = torch.arange(tokens.shape[1]).expand(3, 1, -1)  # 4.57 wants them beside embeddings
        reading = peak(
            lambda: model(
                inputs_embeds=model.get_input_embeddings()(tokens),
                position_ids=positions,
                use_cache=False,
                logits_to_keep=1,
            )
        )
    seen = asked(sizes, Load(PATCHES // 4, PATCHES // 4, 0), dtype=dtype).activations
    read = asked(sizes, Load(1500, 0, 0), dtype=dtype).activations
    assert seen == pytest.approx(encoding, rel=NEAR)
    assert read == pytest.approx(reading, rel=NEAR)


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=SLOW_IN_BF16), "float32"])
@pytest.mark.parametrize(
    "method, tokens, pictures, labelled",
    [("full", 1200, 0, 40), ("full", 400, PATCHES // 4, 40), ("full", 1200, 0, 1199), ("lora", 1200, 0, 40)],
    ids=["blocks", "pictures", "logits", "adapters"],
)
def test_a_step_of_training_takes_what_is_planned(method, tokens, pictures, labelled, dtype):
    sizes, work = ModelSizes.of(CONFIG), Load(tokens, pictures, labelled)
    frozen = ("text_encoder",)
    model = VilavtForTraining(VilavtConfig(**CONFIG))
    model.config.use_cache = False
    freeze(model, frozen)
    if method == "lora":
        pytest.importorskip("peft")
        model = add_adapters(model, LoraSettings(rank=8), "base")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, 2000, (1, tokens))
    ids[0, :pictures] = 0
    labels = torch.full_like(ids, -100)
    labels[:, -labelled:] = ids[:, -labelled:]
    batch = {"labels": labels, "position_ids": torch.arange(tokens).expand(3, 1, -1)}
    batch |= inputs() if pictures else {}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=ids, **batch)["loss"]
        loss.backward()

    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # what there is when a step begins in the middle of an accumulation
    step()
    planned = trained(sizes, work, method=method, frozen=frozen, rank=8, dtype=dtype)
    states = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    assert planned.weights == nbytes(model)
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in learning)
    assert planned.optimizer == sum(value.nbytes for value in states)
    activations = peak(step) + sum(value.nbytes for value in batch.values() if value.is_floating_point())
    assert planned.activations == pytest.approx(activations, rel=NEAR)


def test_shards_have_the_bytes_that_fsdp2_holds():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = VilavtForTraining(VilavtConfig(**CONFIG))
    freeze(model, ("text_encoder",))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (4,))
        for block in [*model.model.language_model.layers, *model.model.visual.blocks, *model.model.text_encoder.layers]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    planned = trained(ModelSizes.of(CONFIG), Load(16, 0, 1), strategy="fsdp2", gpus=4)
    assert planned.weights == pytest.approx(held, rel=0.01)  # rows are not always a multiple of four
