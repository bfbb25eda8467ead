"""A new ViLaVT from a stock Qwen2.5-VL and a query encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from vilavt_core.checkpoint import (
    Checkpoint,
    convert_checkpoint,
    fingerprint,
    initialise_checkpoint,
    inspect_checkpoint,
    writing,
)
from vilavt_core.checkpoint.initialise import _encode
from vilavt_core.cli import app
from vilavt_core.errors import CheckpointError
from vilavt_hf import VilavtForConditionalGeneration


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    monkeypatch.setattr(writing, "_sync", lambda path: None)


@pytest.fixture
def base(golden, tmp_path, processor) -> Path:
    """A stock Qwen2.5-VL in the hub's style, single file, flat names."""
    folder = tmp_path / "base"
    processor.save_pretrained(folder)
    shutil.rmtree(folder / "query_tokenizer")
    (folder / "processor_config.json").unlink()
    shutil.copy(golden.configs / "sft_base_hub_style.tf4.57.1.json", folder / "config.json")
    shutil.copy(golden.checkpoint / "generation_config.json", folder)
    save_file(stock_tensors(golden), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def encoder(golden, tmp_path, tokenizer) -> Path:
    """A query encoder without ``model.`` in its names."""
    folder = tmp_path / "embed"
    tokenizer.save_pretrained(folder)
    config = json.loads((golden.checkpoint / "config.json").read_text())["text_encoder_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(encoder_tensors(golden), folder / "model.safetensors", {"format": "pt"})
    return folder


def stock_tensors(golden) -> dict[str, torch.Tensor]:
    tensors = load_file(golden.checkpoint / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "text_" not in name and "instruct" not in name}


def encoder_tensors(golden) -> dict[str, torch.Tensor]:
    tensors = load_file(golden.checkpoint / "model.safetensors")
    return {n.removeprefix("text_encoder."): t for n, t in tensors.items() if n.startswith("text_encoder.")}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_result_has_the_bytes_of_both_sources_and_random_projections(golden, base, encoder, tmp_path):
    report = initialise_checkpoint(base, encoder, tmp_path / "out")
    tensors, published = all_tensors(tmp_path / "out"), load_file(golden.checkpoint / "model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in published.items()}
    for name, tensor in published.items():
        if name in report.new_tensors:
            assert not torch.equal(tensors[name], tensor)
        else:
            assert torch.equal(tensors[name], tensor), name
    assert sorted(report.new_tensors) == sorted(n for n in published if "instruct" in n or "text_proj" in n)
    assert report.new_parameters == 4 * 2 * (64 * 64 + 64) + 64 * 48 + 64
    assert (report.base_tensors, report.query_encoder_tensors) == (
        len(stock_tensors(golden)),
        len(encoder_tensors(golden)),
    )
    assert report.query_aware_blocks == (4, 5, 6, 7)


@pytest.mark.parametrize("where", ["flat", "flat and nested", "nested"])
def test_a_tied_base_stays_tied_in_every_reader(base, encoder, tmp_path, where):
    """The 3B shape: no LM head on disk, and the hub's file says so at its top level alone."""
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    if where != "flat":
        text = Qwen2_5_VLForConditionalGeneration.config_class(**config).get_text_config().to_dict()
        config["text_config"] = text | {"tie_word_embeddings": True}
    if where != "nested":
        config["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(config))
    initialise_checkpoint(base, encoder, tmp_path / "out")
    convert_checkpoint(tmp_path / "out", tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "again"):
        written = json.loads((folder / "config.json").read_text())
        assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is True
        for cls in (VilavtForConditionalGeneration, AutoModelForImageTextToText):
            model = cls.from_pretrained(folder)
            assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path / "saved" / folder.name)
        VilavtForConditionalGeneration.from_pretrained(tmp_path / "saved" / folder.name)


def test_new_weights_are_normal_with_the_published_deviation_and_biases_are_zero(base, encoder, tmp_path):
    report = initialise_checkpoint(base, encoder, tmp_path / "out")
    tensors = all_tensors(tmp_path / "out")
    weights = torch.cat([tensors[name].flatten() for name in report.new_tensors if name.endswith("weight")])
    assert all(not tensors[name].any() for name in report.new_tensors if name.endswith("bias"))
    n = len(weights)  # 35,840 values: four standard errors of mean and deviation
    assert abs(weights.mean()) < 4 * 0.02 / n**0.5
    assert abs(weights.std() - 0.02) < 4 * 0.02 / (2 * n) ** 0.5
    assert weights.unique().numel() > 0.99 * n


def test_seed_decides_the_new_tensors_each_by_its_name(base, encoder, tmp_path):
    for name, options in {
        "one": {},
        "same": {},
        "other": {"seed": 1},
        "wider": {"integration_point": "all"},
    }.items():
        initialise_checkpoint(base, encoder, tmp_path / name, **options)
    key = "visual.blocks.5.attn.instruct_key_proj.weight"
    one, same, other, wider = (all_tensors(tmp_path / name)[key] for name in ("one", "same", "other", "wider"))
    assert fingerprint(tmp_path / "one", exact=True) == fingerprint(tmp_path / "same", exact=True)
    assert not torch.equal(one, other)
    assert torch.equal(one, wider)
    assert torch.equal(one, same)


def test_result_loads_and_answers_a_forward_pass(base, encoder, tmp_path):
    initialise_checkpoint(base, encoder, tmp_path / "out")
    model = VilavtForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(base).eval()
    with torch.no_grad():
        expected = stock(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert torch.allclose(logits, expected, atol=1e-5)  # the language model is the base's


def test_result_is_complete_with_processor_query_tokenizer_and_prompts(base, encoder, tmp_path):
    report = initialise_checkpoint(base, encoder, tmp_path / "out")
    assert report.missing == ()
    found = inspect_checkpoint(tmp_path / "out")
    assert found.complete, (found.problems, found.missing)
    assert found.prompts
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "VilavtProcessor"
    assert processor.prompts.name == "default"
    assert processor.query_tokenizer is not None
    assert json.loads((tmp_path / "out/provenance.json").read_text())["details"]["base_fingerprint"] == fingerprint(
        base
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "# ViLaVT checkpoint, not trained yet" in card
    assert f"| base | {base.name} |" in card


@pytest.mark.parametrize(
    ("point", "blocks"),
    [
        ("all", range(8)),
        ("early", range(4)),
        ("late2", (6, 7)),
        ("late3", range(2, 8)),
        ("sparse", (2, 6)),
        ("none", ()),
    ],
)
def test_every_integration_point_makes_its_blocks_query_aware(base, encoder, tmp_path, point, blocks):
    report = initialise_checkpoint(
        base, encoder, tmp_path / "out", integration_point=point, fullatt_block_indexes=[2, 6]
    )
    assert report.query_aware_blocks == tuple(blocks)
    assert len(report.new_tensors) == 4 * len(tuple(blocks)) + 2
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vision_config"]["fullatt_block_indexes"] == [2, 6]
    assert inspect_checkpoint(tmp_path / "out").problems == ()


def test_full_attention_blocks_stay_those_of_the_base(base, encoder, tmp_path):
    initialise_checkpoint(base, encoder, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vision_config"]["fullatt_block_indexes"] == [1, 3, 5, 7]


def test_nested_base_and_prefixed_encoder_with_lm_head_give_the_same_checkpoint(golden, base, encoder, tmp_path):
    initialise_checkpoint(base, encoder, tmp_path / "flat")
    nested = {}
    for name, tensor in stock_tensors(golden).items():
        name = (
            name
            if name.startswith("lm_head")
            else f"model.language_model.{name.removeprefix('model.')}"
            if name.startswith("model.")
            else f"model.{name}"
        )
        nested[name] = tensor
    save_file(nested, base / "model.safetensors", {"format": "pt"})
    prefixed = {f"model.{name}": tensor for name, tensor in encoder_tensors(golden).items()}
    prefixed["lm_head.weight"] = prefixed["model.embed_tokens.weight"].clone()
    save_file(prefixed, encoder / "model.safetensors", {"format": "pt"})
    report = initialise_checkpoint(base, encoder, tmp_path / "nested")
    assert report.ignored == ("lm_head.weight",)
    assert fingerprint(tmp_path / "flat", exact=True) == fingerprint(tmp_path / "nested", exact=True)
    assert not Checkpoint.open(tmp_path / "nested").nested


def test_unchanged_base_files_are_hard_linked(base, encoder, tmp_path):
    initialise_checkpoint(base, encoder, tmp_path / "out")
    assert (base / "model.safetensors").samefile(tmp_path / "out/model-00001-of-00002.safetensors")
    initialise_checkpoint(base, encoder, tmp_path / "copied", link=False)
    assert not (base / "model.safetensors").samefile(tmp_path / "copied/model-00001-of-00002.safetensors")


def test_new_tensors_have_the_type_of_the_tower(golden, base, encoder, tmp_path):
    save_file({n: t.to(torch.bfloat16) for n, t in stock_tensors(golden).items()}, base / "model.safetensors")
    initialise_checkpoint(base, encoder, tmp_path / "out")
    tensors = all_tensors(tmp_path / "out")
    assert tensors["text_proj.weight"].dtype == torch.bfloat16
    assert tensors["text_encoder.norm.weight"].dtype == torch.float32  # the encoder's bytes are kept
    assert 0.015 < tensors["text_proj.weight"].float().std() < 0.025


def test_bf16_and_fp16_bytes_are_those_of_torch():
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # the last two are ties
    tensor = torch.from_numpy(values)
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        assert _encode(values, name) == tensor.to(dtype).view(torch.uint8).numpy().tobytes()


def test_command_reports_what_is_new(base, encoder, tmp_path):
    arguments = ["init", str(base), "--query-encoder", str(encoder), "--out", str(tmp_path / "out"), "--fullatt", "1,3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "18 new (36,416 parameters, N(0, 0.02), biases 0, seed 0)" in result.output
    assert "text_proj.weight" in result.output
    wrong = CliRunner().invoke(app, [*arguments[:-1], "one"])
    assert isinstance(wrong.exception, CheckpointError)


# ---------------------------------------------------------------------- refusals


def refuse(base: Path, encoder: Path, out: Path, message: str, **options) -> None:
    with pytest.raises(CheckpointError, match=message):
        initialise_checkpoint(base, encoder, out, **options)
    assert not list(out.parent.glob(f"{out.name}*"))


def test_a_vilavt_as_base_is_refused(golden, encoder, tmp_path):
    refuse(golden.checkpoint, encoder, tmp_path / "out", "is not a stock Qwen2.5-VL but: published RL")


def test_a_query_encoder_of_another_family_is_refused(base, encoder, tmp_path):
    refuse(base, base, tmp_path / "out", "model_type 'qwen2_5_vl', a query encoder is a Qwen3 model")


def test_an_incomplete_query_encoder_is_refused(golden, base, encoder, tmp_path):
    tensors = encoder_tensors(golden)
    del tensors["layers.1.self_attn.q_norm.weight"]
    save_file(tensors, encoder / "model.safetensors")
    refuse(base, encoder, tmp_path / "out", r"layers\.1\.self_attn\.q_norm\.weight \[16\], which is not there")


def test_an_incomplete_base_is_refused_rather_than_filled_with_noise(golden, base, encoder, tmp_path):
    tensors = stock_tensors(golden)
    del tensors["visual.blocks.7.attn.qkv.weight"]
    save_file(tensors, base / "model.safetensors")
    refuse(base, encoder, tmp_path / "out", r"1 tensors are missing: visual\.blocks\.7\.attn\.qkv\.weight")


def test_an_unknown_integration_point_is_refused_with_the_known_ones(base, encoder, tmp_path):
    refuse(base, encoder, tmp_path / "out", "'latest', expected one of .*'late2'", integration_point="latest")


def test_a_full_attention_block_that_does_not_exist_is_refused(base, encoder, tmp_path):
    refuse(base, encoder, tmp_path / "out", "block 31 does not exist: .* 0 to 7", fullatt_block_indexes=[7, 31])
