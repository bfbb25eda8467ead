"""Checkpoints on disk: published names, both configuration flavours, both transformers generations, never random."""

import json
import logging
import shutil
from copy import deepcopy as copy_of
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vilavt_core.errors import CheckpointError
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, VilavtProcessor

INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "query_ids", "query_attention_mask")
INPUTS += ("images_per_query",)


@pytest.fixture
def copy(golden, tmp_path):
    """A writable copy of the published checkpoint."""
    shutil.copytree(golden.checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def names_on_disk(folder):
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def published_names(golden):
    lines = (golden.root / "ckpt" / "keys_late.txt").read_text().splitlines()
    names = set()
    for line in filter(str.strip, lines):
        pattern, layers = line.split()[0], line[line.rindex("n=") :]
        numbers = json.loads(layers[layers.index("[") :]) if "{i}" in pattern else [0]
        names |= {pattern.replace("{i}", str(number)) for number in numbers}
    assert len(names) == 171
    return names


@pytest.mark.parametrize("max_shard_size", ["1GB", "200KB"])
def test_a_round_trip_keeps_published_names_and_every_value(golden, tmp_path, max_shard_size):
    model = VilavtForConditionalGeneration.from_pretrained(golden.checkpoint)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size != "1GB")
    assert names_on_disk(tmp_path) == published_names(golden)
    before = load_file(golden.checkpoint / "model.safetensors")
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, before[name]), name
    again = VilavtForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize(
    "prefix",
    ["text_proj", "text_encoder.layers.1", "visual.blocks.2.attn.qkv", "visual.blocks.6.attn.instruct_key_proj"],
)
def test_a_missing_tensor_is_an_error_and_names_it(copy, prefix):
    tensors = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    assert len(kept) < len(tensors)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        VilavtForConditionalGeneration.from_pretrained(copy)
    assert prefix.removeprefix("visual.") in str(error.value)


def test_query_projections_that_the_configuration_does_not_use_are_an_error(copy):
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["integration_point"] = "late2"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not query-aware"):
        VilavtForConditionalGeneration.from_pretrained(copy)


def test_a_stock_qwen_checkpoint_is_refused_with_the_remedy(copy):
    tensors = load_file(copy / "model.safetensors")
    added = ("instruct_", "text_proj", "text_encoder")
    stock = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in added)}
    save_file(stock, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="vilavt init"):
        VilavtForConditionalGeneration.from_pretrained(copy)


@pytest.mark.parametrize("stem", ["rl_before_reload", "rl_after_reload", "sft_after_reload"])
@pytest.mark.parametrize("version", ["4.56.2", "4.57.1"])
def test_every_published_vilavt_config_loads_through_autoconfig(golden, copy, stem, version):
    shutil.copy(golden.configs / f"{stem}.tf{version}.json", copy / "config.json")
    config = AutoConfig.from_pretrained(copy)
    assert isinstance(config, VilavtConfig)
    assert config.text_config.rope_scaling["mrope_section"] == [2, 3, 3]
    assert config.image_token_id == 392
    assert config.vision_config.query_aware_blocks() == {4, 5, 6, 7}


@torch.no_grad()
@pytest.mark.parametrize("version", ["4.56.2", "4.57.1"])
def test_the_sft_flavour_loads_by_the_class_itself_and_says_so(golden, copy, version, caplog):
    shutil.copy(golden.configs / f"sft_before_reload.tf{version}.json", copy / "config.json")
    with caplog.at_level(logging.WARNING):
        model = VilavtForConditionalGeneration.from_pretrained(copy)
    assert "vilavt convert" in caplog.text
    expected = VilavtForConditionalGeneration.from_pretrained(golden.checkpoint).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.config.text_encoder_config.head_dim == 16
    # AutoConfig cannot know better than the file's model_type; a config it read is converted, loudly
    stock = AutoConfig.from_pretrained(copy)
    assert not isinstance(stock, VilavtConfig)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = VilavtForConditionalGeneration.from_pretrained(copy, config=stock)
    assert "not a VilavtConfig" in caplog.text
    assert isinstance(again.config, VilavtConfig)


def test_a_saved_config_is_readable_by_both_generations(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "vilavt"
    assert config["architectures"] == ["VilavtForConditionalGeneration"]
    text = config["text_config"]
    assert text["rope_theta"] == 10000.0
    assert text["rope_scaling"]["mrope_section"] == [2, 3, 3]
    assert config["text_encoder_config"]["rope_theta"] == tiny_model.config.text_encoder_config.to_dict().get(
        "rope_theta", config["text_encoder_config"]["rope_theta"]
    )


@pytest.mark.parametrize("scaling", ["mrope_section", None])
def test_a_configuration_is_the_same_again_and_leaves_what_it_was_made_of_alone(scaling):
    rope = {"rope_theta": 5000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]} if scaling else None}
    text = {"vocab_size": 400, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, **rope}
    encoder = {"hidden_size": 32, "num_hidden_layers": 2, "rope_theta": 7000.0, "rope_scaling": None}
    given = copy_of({"text_config": text, "text_encoder_config": encoder})
    written = VilavtConfig(**given).to_dict()
    assert given == {"text_config": text, "text_encoder_config": encoder}
    for _ in range(2):
        before = copy_of(written)
        again = VilavtConfig.from_dict(written)
        found = again.to_dict()
        for one in (written, found):
            one.pop("attn_implementation", None)  # from_dict of 4.57 leaves it in both
        assert written == found == before


@torch.no_grad()
@pytest.mark.parametrize("writer", ["4.57.6", "5.23.0"])
def test_checkpoints_saved_by_the_oldest_and_newest_transformers_load_here(golden, writer, tmp_path):
    """tests/golden/saved_by holds one checkpoint (model and processor) per version and the logits it gave there."""
    folder = golden.root / "saved_by" / writer
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(model, VilavtForConditionalGeneration)
    assert isinstance(processor, VilavtProcessor)
    assert processor.query_tokenizer is not None
    expected = load_file(folder / "expected" / "logits.safetensors")
    inputs = {name: expected[name] for name in INPUTS}
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)
    text = "".join(chr(c) for c in range(32, 127)) + " Größe <|im_end|>"
    assert processor.tokenizer(text)["input_ids"] == expected["text_ids"].tolist()
    query = processor.tokenize_queries(["the red card"])[0]
    assert query.tolist() == expected["query_row"].tolist()


@pytest.mark.skipif(find_spec("transformers.cli") is None, reason="this transformers serves classes of its own alone")
def test_the_server_of_transformers_takes_the_class_for_a_multimodal_one(tiny_checkpoint):
    from transformers.cli.serving.model_manager import ModelManager

    manager = ModelManager(device="cpu", model_timeout=-1)
    model, processor = manager.load_model_and_processor(f"{tiny_checkpoint}@main")
    assert isinstance(model, VilavtForConditionalGeneration)
    assert isinstance(processor, VilavtProcessor)
    assert manager.get_model_modality(model, processor=processor).name == "MULTIMODAL"
    manager.shutdown()


def test_offline_loading_opens_no_connection(golden, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    VilavtForConditionalGeneration.from_pretrained(golden.checkpoint)


@pytest.mark.parametrize("stem", ["rl_before_reload", "rl_after_reload", "sft_after_reload", "sft_before_reload"])
@pytest.mark.parametrize("version", ["4.56.2", "4.57.1"])
def test_a_configuration_always_names_an_architecture(golden, stem, version):
    """Published files may have none at the top level; hosts choose the model by it."""
    raw = json.loads((golden.configs / f"{stem}.tf{version}.json").read_text())
    raw.pop("architectures", None)
    config = VilavtConfig.from_dict(raw)
    assert config.to_dict()["architectures"] == ["VilavtForConditionalGeneration"]
    # the attribute itself: 4.57 forwards every read to text_config, whatever the file has there
    assert vars(config)["architectures"] == ["VilavtForConditionalGeneration"]
