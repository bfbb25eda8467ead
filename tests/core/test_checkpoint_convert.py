"""SFT format to RL/vLLM format: the configuration, the bytes, what comes along, and every refusal."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vilavt_core.architecture import expected_tensors
from vilavt_core.checkpoint import (
    Checkpoint,
    Weights,
    convert_checkpoint,
    fingerprint,
    verify_same_tensors,
    writing,
)
from vilavt_core.checkpoint import convert as convert_module
from vilavt_core.checkpoint.config import vilavt_config
from vilavt_core.errors import CheckpointError
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, VilavtProcessor

RELOAD_CONFIG = Path(__file__).parents[2] / "reload_config.py"
VERSIONS = ["4.56.2", "4.57.1"]
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def synced(monkeypatch) -> list[str]:
    """Waiting for the disk is most of a small conversion's time: note what would be synced instead."""
    names: list[str] = []
    monkeypatch.setattr(writing, "_sync", lambda path: names.append(path.name))
    return names


@pytest.fixture
def sft(golden, tmp_path, processor) -> Path:
    """A sharded checkpoint as SFT training leaves it, with a stock processor and no query tokenizer."""
    folder = tmp_path / "sft"
    shutil.copytree(golden.sharded, folder)
    shutil.copy(golden.configs / "sft_before_reload.tf4.57.1.json", folder / "config.json")
    processor.save_pretrained(folder)
    shutil.rmtree(folder / "query_tokenizer")
    for name in ("processor_config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "processor_class": "Qwen2_5_VLProcessor"}))
    return folder


@pytest.fixture
def query_encoder(golden, tmp_path, tokenizer) -> Path:
    """The query encoder's own folder: configuration and tokenizer."""
    folder = tmp_path / "embed"
    tokenizer.save_pretrained(folder)
    config = json.loads((golden.configs / "sft_after_reload.tf4.57.1.json").read_text())["text_encoder_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_tensors(folder: Path, rename) -> None:
    """Rewrite a sharded checkpoint under other tensor names, index included."""
    for path in folder.glob("*.safetensors"):
        save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def nested_name(name: str) -> str:
    if name.startswith("lm_head"):
        return name
    return "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("flavour", ["sft", "rl"])
def test_config_equals_the_published_conversion_on_every_field(golden, version, flavour):
    before = json.loads((golden.configs / f"{flavour}_before_reload.tf{version}.json").read_text())
    after = json.loads((golden.configs / f"{flavour}_after_reload.tf{version}.json").read_text())
    encoder = after["text_encoder_config"]
    ours = vilavt_config(before, encoder)
    # the class name is ours, everywhere; 4.56 and 4.57 disagree on where they put theirs
    after["architectures"] = after["text_config"]["architectures"] = ["VilavtForConditionalGeneration"]
    after["transformers_version"] = before["transformers_version"]
    if "in_channels" not in before["vision_config"]:
        after["vision_config"].pop("in_channels", None)
    assert ours == after


def test_derived_query_encoder_settings_equal_the_published_ones_where_shapes_can_tell(golden, sft, tmp_path):
    convert_checkpoint(sft, tmp_path / "out")
    ours = json.loads((tmp_path / "out" / "config.json").read_text())["text_encoder_config"]
    published = json.loads((golden.configs / "sft_after_reload.tf4.57.1.json").read_text())["text_encoder_config"]
    guessed = {"_name_or_path", "bos_token_id", "eos_token_id", "max_position_embeddings", "max_window_layers"}
    assert {k: v for k, v in published.items() if k not in guessed} == {
        k: v for k, v in ours.items() if k not in guessed
    }
    assert ours["max_position_embeddings"] == 32768


@pytest.mark.parametrize("version", VERSIONS)
def test_converted_config_loads_with_our_class_and_with_autoconfig(golden, sft, tmp_path, query_encoder, version):
    shutil.copy(golden.configs / f"sft_before_reload.tf{version}.json", sft / "config.json")
    convert_checkpoint(sft, tmp_path / "out", query_encoder=query_encoder)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert type(config) is VilavtConfig
    assert config.vision_config.integration_point == "late"
    assert sorted(config.vision_config.query_aware_blocks()) == [4, 5, 6, 7]
    assert (config.text_config.vocab_size, config.text_encoder_config.head_dim, config.image_token_id) == (400, 16, 392)
    rope = config.text_config.to_dict()
    theta = rope.get("rope_theta") or rope["rope_parameters"]["rope_theta"]
    sections = (rope.get("rope_scaling") or rope["rope_parameters"])["mrope_section"]
    assert (theta, sections) == (1_000_000.0, [2, 3, 3])


def test_a_flat_hub_style_config_gets_a_nested_text_config(golden):
    before = json.loads((golden.configs / "sft_base_hub_style.tf4.57.1.json").read_text())
    encoder = json.loads((golden.checkpoint / "config.json").read_text())["text_encoder_config"]
    after = vilavt_config(before, encoder, integration_point="late")
    config = VilavtConfig(**after)
    assert config.text_config.hidden_size == 64
    assert config.text_config.vocab_size == 400
    assert after["text_config"]["rope_scaling"]["mrope_section"] == [2, 3, 3]
    assert expected_tensors(after).keys() == Checkpoint.open(golden.checkpoint).tensors.keys()


def test_rope_settings_of_newer_transformers_become_readable_by_4_57():
    rope = {"rope_theta": 5e5, "rope_type": "default", "mrope_section": [1, 1, 2]}
    out = vilavt_config(
        {"text_config": {"rope_parameters": rope}, "vision_config": {}}, {"rope_parameters": {"rope_theta": 7.0}}
    )
    assert out["text_config"]["rope_theta"] == 5e5
    assert out["text_config"]["rope_scaling"] == {"rope_type": "default", "mrope_section": [1, 1, 2]}
    assert out["text_encoder_config"] == {"rope_theta": 7.0, "rope_scaling": None}
    assert "rope_parameters" not in out["text_config"]


def test_published_class_name_is_written_on_request(sft, tmp_path):
    convert_checkpoint(sft, tmp_path / "out", architecture="Qwen2_5_VLForConditionalGeneration_Vilavt")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [
        "Qwen2_5_VLForConditionalGeneration_Vilavt"
    ]
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")


# ---------------------------------------------------------------------- weights


def test_converted_checkpoint_is_the_published_model(golden, sft, tmp_path, query_encoder):
    convert_checkpoint(sft, tmp_path / "out", query_encoder=query_encoder)
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    published = VilavtForConditionalGeneration.from_pretrained(golden.checkpoint)
    assert type(ours) is VilavtForConditionalGeneration
    for (name, a), (_, b) in zip(ours.named_parameters(), published.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (
        ours.config.text_encoder_config.rope_theta == 1e6
        if hasattr(ours.config.text_encoder_config, "rope_theta")
        else True
    )


def test_weights_are_hard_linked(sft, tmp_path):
    report = convert_checkpoint(sft, tmp_path / "out")
    assert report.weights is Weights.LINKED
    for path in sft.glob("*.safetensors"):
        assert path.samefile(tmp_path / "out" / path.name)


def test_weights_are_copied_on_request_and_verified(sft, tmp_path):
    report = convert_checkpoint(sft, tmp_path / "out", link=False, verify=True)
    assert report.weights is Weights.COPIED
    assert report.verified
    for path in sft.glob("*.safetensors"):
        assert not path.samefile(tmp_path / "out" / path.name)
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_weights_are_copied_where_linking_is_not_possible(sft, tmp_path, monkeypatch):
    def other_device(*_args, **_kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    assert convert_checkpoint(sft, tmp_path / "out", verify=True).weights is Weights.COPIED


def test_symbolic_links_of_a_download_cache_are_followed(sft, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(sft.glob("*.safetensors")):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    convert_checkpoint(sft, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("link", [True, False])
def test_nested_names_become_published_names_with_the_same_bytes(golden, sft, tmp_path, link):
    rename_tensors(sft, nested_name)
    report = convert_checkpoint(sft, tmp_path / "out", link=link, verify=True)
    assert report.weights is Weights.RENAMED
    assert verify_same_tensors(golden.checkpoint, tmp_path / "out") == 171
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"]) == set(load_file(golden.checkpoint / "model.safetensors"))
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:  # the reference reader accepts the rewritten headers
            assert file.metadata() == {"format": "pt"}
            assert not any("language_model" in name for name in file.keys())  # noqa: SIM118


def test_a_single_file_converts_too(golden, tmp_path):
    shutil.copytree(golden.checkpoint, tmp_path / "src")
    report = convert_checkpoint(tmp_path / "src", tmp_path / "out", verify=True)
    assert (report.tensors, report.nbytes) == (171, 2655680)
    assert not (tmp_path / "out" / INDEX).exists()


def test_source_is_left_as_it_was(sft, tmp_path):
    before = {path: path.read_bytes() for path in sft.rglob("*") if path.is_file()}
    convert_checkpoint(sft, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in sft.rglob("*") if path.is_file()}


def test_verification_names_the_tensor_that_differs(golden, tmp_path):
    shutil.copytree(golden.checkpoint, tmp_path / "other")
    tensors = load_file(tmp_path / "other/model.safetensors")
    tensors["visual.merger.ln_q.weight"][3] += 1
    save_file(tensors, tmp_path / "other/model.safetensors")
    with pytest.raises(CheckpointError, match=r"visual\.merger\.ln_q\.weight has SHA-256"):
        verify_same_tensors(golden.checkpoint, tmp_path / "other")
    tensors["visual.merger.ln_q.weight"] = tensors["visual.merger.ln_q.weight"].to(torch.bfloat16)
    save_file(tensors, tmp_path / "other/model.safetensors")
    with pytest.raises(CheckpointError, match=r"F32 \[64\].*BF16 \[64\]"):
        verify_same_tensors(golden.checkpoint, tmp_path / "other")


def test_verification_failure_leaves_no_destination(sft, tmp_path, monkeypatch):
    original = convert_module._place_weights

    def damaged(checkpoint, partial, link, advance):
        weights = original(checkpoint, partial, False, advance)
        path = sorted(partial.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        return weights

    monkeypatch.setattr(convert_module, "_place_weights", damaged)
    with pytest.raises(CheckpointError, match="SHA-256"):
        convert_checkpoint(sft, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- what comes along


def test_processor_query_tokenizer_and_prompts_come_along_and_load(sft, tmp_path, query_encoder):
    (sft / "prompts").mkdir()
    (sft / "prompts/system.txt").write_text("kept as it is")
    (sft / "vilavt_chat.json").write_text('{"preset": "rl"}')
    report = convert_checkpoint(sft, tmp_path / "out", query_encoder=query_encoder)
    assert report.missing == ()
    assert (tmp_path / "out/prompts/system.txt").read_text() == "kept as it is"
    assert json.loads((tmp_path / "out/vilavt_chat.json").read_text()) == {"preset": "rl"}
    shutil.rmtree(tmp_path / "out/prompts")  # not a whole prompt set
    loaded = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(loaded) is VilavtProcessor
    ids, mask = loaded.tokenize_queries(["digit"])
    assert ids.shape == (1, 50)
    assert int(mask.sum()) == 6
    assert loaded.chat_template
    assert (tmp_path / "out/generation_config.json").read_text() == (sft / "generation_config.json").read_text()


def test_the_query_tokenizer_is_found_where_training_says_it_loaded_the_encoder_from(sft, tmp_path, query_encoder):
    edit_json(sft / "config.json", embedding_model_path=str(query_encoder))
    report = convert_checkpoint(sft, tmp_path / "out")
    assert "query_tokenizer/" in report.companions.brought
    assert "embedding_model_path" not in json.loads((tmp_path / "out/config.json").read_text())


def test_what_is_missing_is_listed_with_a_remedy(sft, tmp_path):
    for name in ("preprocessor_config.json", "generation_config.json", "chat_template.jinja"):
        (sft / name).unlink(missing_ok=True)
    edit_json(sft / "tokenizer_config.json", chat_template=None)
    report = convert_checkpoint(sft, tmp_path / "out")
    missing = {item.name: item.remedy for item in report.missing}
    assert set(missing) == {"generation_config.json", "preprocessor_config.json", "chat template", "query_tokenizer/"}
    assert "--query-encoder" in missing["query_tokenizer/"]
    assert "--processor" in missing["preprocessor_config.json"]


def test_a_processor_folder_fills_in_what_a_training_checkpoint_lacks(sft, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (sft / "preprocessor_config.json").rename(base / "preprocessor_config.json")
    report = convert_checkpoint(sft, tmp_path / "out", processor=base)
    assert [item.name for item in report.missing] == ["query_tokenizer/"]


def test_provenance_names_the_source_and_survives_a_second_conversion(sft, tmp_path):
    convert_checkpoint(sft, tmp_path / "once")
    convert_checkpoint(tmp_path / "once", tmp_path / "twice")
    record = json.loads((tmp_path / "twice/provenance.json").read_text())
    assert record["details"]["source"] == "once"
    assert record["details"]["source_provenance"]["details"]["source_fingerprint"] == fingerprint(sft)
    card = (tmp_path / "twice/README.md").read_text()
    assert card.count("`convert`, ") == 2
    assert f"`{fingerprint(sft)}`" in card
    assert record["packages"]["vilavt-hf"]


def test_converting_twice_changes_nothing(sft, tmp_path):
    convert_checkpoint(sft, tmp_path / "once")
    convert_checkpoint(tmp_path / "once", tmp_path / "twice")
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


# ---------------------------------------------------------------------- fingerprint


def test_fingerprint_depends_on_weights_not_on_layout(golden, sft, tmp_path):
    rename_tensors(sft, nested_name)
    assert len({fingerprint(folder) for folder in (golden.checkpoint, golden.sharded)}) == 1
    before = fingerprint(sft)  # the SFT configuration has other full-attention blocks than the golden checkpoint
    convert_checkpoint(sft, tmp_path / "out")
    assert fingerprint(tmp_path / "out") == before
    path = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.001
    path.unlink()  # it is linked to the source's
    save_file(tensors, path)
    assert fingerprint(tmp_path / "out") != before
    assert fingerprint(sft, exact=True) != before


def test_fingerprint_depends_on_the_integration_settings(golden, tmp_path):
    shutil.copytree(golden.checkpoint, tmp_path / "copy")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    config["vision_config"]["fullatt_block_indexes"] = [1]
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    assert fingerprint(tmp_path / "copy") != fingerprint(golden.checkpoint)


# ---------------------------------------------------------------------- refusals


def refuse(source: Path, destination: Path, message: str, **options) -> None:
    """Conversion raises `message` and leaves nothing behind."""
    around = set(destination.parent.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, destination, **options)
    assert set(destination.parent.iterdir()) == around


def drop_tensor(folder: Path, name: str, from_index: bool = True) -> None:
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    if from_index:
        del index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.5.attn.instruct_key_proj.weight",
        "text_proj.bias",
        "text_encoder.layers.1.mlp.up_proj.weight",
        "visual.blocks.2.norm1.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_refused_by_name(sft, tmp_path, name):
    drop_tensor(sft, name)
    refuse(sft, tmp_path / "out", name.removeprefix("text_encoder.").replace(".", r"\."))


def test_an_absent_lm_head_is_accepted_if_it_is_tied(sft, tmp_path):
    drop_tensor(sft, "lm_head.weight")
    edit_json(sft / "config.json", tie_word_embeddings=True)
    assert convert_checkpoint(sft, tmp_path / "out").tensors == 170


def test_a_tensor_that_the_index_promises_but_no_shard_has_is_refused(sft, tmp_path):
    drop_tensor(sft, "lm_head.weight", from_index=False)
    refuse(sft, tmp_path / "out", r"places lm_head\.weight in .*, which does not hold it")


def test_a_missing_shard_is_refused(sft, tmp_path):
    (sft / "model-00002-of-00003.safetensors").unlink()
    refuse(sft, tmp_path / "out", r"model-00002-of-00003\.safetensors is missing: the index places \d+ tensors there")


def test_a_shard_that_is_not_in_the_index_is_refused(sft, tmp_path):
    shutil.copy(sft / "model-00002-of-00003.safetensors", sft / "model-00004-of-00004.safetensors")
    refuse(sft, tmp_path / "out", r"model-00004-of-00004\.safetensors is not in model\.safetensors\.index\.json")


def test_several_shards_without_an_index_are_refused(sft, tmp_path):
    (sft / INDEX).unlink()
    refuse(sft, tmp_path / "out", "3 safetensors files .* but no model.safetensors.index.json")


def test_a_tensor_that_the_index_does_not_list_is_refused(sft, tmp_path):
    index = json.loads((sft / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (sft / INDEX).write_text(json.dumps(index))
    refuse(sft, tmp_path / "out", r"holds lm_head\.weight, which .* does not list")


def test_an_index_that_names_files_outside_the_folder_is_refused(sft, tmp_path):
    index = json.loads((sft / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (sft / INDEX).write_text(json.dumps(index))
    refuse(sft, tmp_path / "out", "names files outside the folder")


@pytest.mark.parametrize("keep", [0, 5, 100, 500_000, -1])
def test_a_truncated_file_is_refused(sft, tmp_path, keep):
    path = sft / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(sft, tmp_path / "out", r"model-00001-of-00003\.safetensors is truncated")


def test_trailing_bytes_are_refused(sft, tmp_path):
    with (sft / "model-00001-of-00003.safetensors").open("ab") as file:
        file.write(b"1234")
    refuse(sft, tmp_path / "out", r"has trailing bytes: 999620 bytes, its header describes 999616")


def test_a_header_that_lies_about_offsets_is_refused(sft, tmp_path):
    path = sft / "model-00001-of-00003.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])
    refuse(sft, tmp_path / "out", "takes bytes .*, expected")


def test_a_header_with_extreme_nesting_is_refused(sft, tmp_path):
    path = sft / "model-00001-of-00003.safetensors"
    encoded = b'{"a":' * 100_000
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    refuse(sft, tmp_path / "out", "malformed safetensors header")


def test_pickled_weights_are_refused(sft, tmp_path):
    for path in sft.glob("*.safetensors"):
        path.unlink()
    (sft / INDEX).unlink()
    (sft / "pytorch_model.bin").write_bytes(b"not read")
    refuse(sft, tmp_path / "out", "safe_serialization=True")


def test_the_same_folder_is_refused_however_it_is_spelled(sft, tmp_path):
    (tmp_path / "alias").symlink_to(sft)
    for destination in (sft, sft.parent / "x" / ".." / "sft", tmp_path / "alias"):
        with pytest.raises(CheckpointError, match="the same folder"):
            convert_checkpoint(sft, destination, force=True)
    for destination in (sft / "inside", sft.parent):
        with pytest.raises(CheckpointError, match="contain one another"):
            convert_checkpoint(sft, destination, force=True)
    assert Checkpoint.open(sft).problems == ()


def test_an_existing_destination_is_refused_without_force_and_replaced_whole_with_it(sft, tmp_path):
    convert_checkpoint(sft, tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("from before")
    refuse(sft, tmp_path / "out", "exists; .* --force")
    convert_checkpoint(sft, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_force_does_not_delete_a_folder_that_is_no_checkpoint(sft, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years of work")
    refuse(sft, tmp_path / "precious", "not a checkpoint", force=True)
    assert (tmp_path / "precious/thesis.txt").exists()


def test_a_stock_model_is_sent_to_init(sft, tmp_path):
    rename_tensors(sft, lambda name: name)
    for name in list(Checkpoint.open(sft).tensors):
        if name.startswith(("text_", "visual")) and ("text_" in name or "instruct" in name):
            drop_tensor(sft, name)
    refuse(sft, tmp_path / "out", "vilavt init")


def test_an_integration_point_that_contradicts_the_weights_is_refused_with_the_fitting_one(sft, tmp_path):
    config = json.loads((sft / "config.json").read_text())
    config["vision_config"]["integration_point"] = "late2"
    (sft / "config.json").write_text(json.dumps(config))
    refuse(sft, tmp_path / "out", r"blocks 4-7, but .*'late2' calls for 6-7; 'late' would fit")


def test_the_configuration_of_another_query_encoder_is_refused(sft, tmp_path, query_encoder):
    edit_json(query_encoder / "config.json", hidden_size=1024)
    refuse(
        sft,
        tmp_path / "out",
        r"embed_tokens.weight with shape \[300, 1024\], .* \[300, 48\]",
        query_encoder=query_encoder,
    )


def test_a_folder_without_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", tmp_path / "out", r"empty is empty, it has no config\.json")
    refuse(tmp_path / "nowhere", tmp_path / "out", "no such folder")


# ---------------------------------------------------------------------- interruption


def test_every_file_and_folder_is_synced_before_and_after_it_gets_its_name(sft, tmp_path, synced):
    convert_checkpoint(sft, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files <= set(synced)
    assert synced[-2].startswith("out.partial-")
    assert synced[-1] == tmp_path.name


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_the_old_destination_and_nothing_else(sft, tmp_path, monkeypatch, failure):
    convert_checkpoint(sft, tmp_path / "out")
    before = fingerprint(tmp_path / "out")

    def fail(*_args):
        raise failure

    monkeypatch.setattr(convert_module, "bring_companions", fail)
    with pytest.raises(type(failure)):
        convert_checkpoint(sft, tmp_path / "out", force=True)
    assert fingerprint(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def _convert_and_stall(source: Path, destination: Path, ready) -> None:
    def stall(*_args):
        ready.set()
        time.sleep(600)

    convert_module.bring_companions = stall  # in the forked process only
    convert_checkpoint(source, destination, link=False)


def test_a_killed_run_leaves_no_destination_and_the_next_run_succeeds(sft, tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=_convert_and_stall, args=(sft, tmp_path / "out", ready), daemon=True)
    process.start()
    assert ready.wait(timeout=300)  # the weights are there, the rest is not
    process.kill()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob("out.partial-*")
    assert list(left.glob("*.safetensors"))
    assert not (left / "config.json").exists()  # what is left does not look like a checkpoint either
    convert_checkpoint(sft, tmp_path / "out", verify=True)
    assert Checkpoint.open(tmp_path / "out").problems == ()


# ---------------------------------------------------------------------- commands


def run_reload_config(monkeypatch, *arguments: str | Path) -> object:
    """Run the script as ``python reload_config.py ...`` does and return its exit code or last words."""
    monkeypatch.setattr(sys, "argv", ["reload_config.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RELOAD_CONFIG), run_name="__main__")
    return ended.value.code


def test_reload_config_converts_and_reports_errors_in_one_line(sft, tmp_path, monkeypatch, capsys):
    assert run_reload_config(monkeypatch, sft, tmp_path / "out", "--verify") == 0
    printed = capsys.readouterr().out
    assert "171 tensors, 2.66 MB, hard-linked" in printed
    assert "verified" in printed
    assert "missing: query_tokenizer/" in printed
    message = run_reload_config(monkeypatch, sft, tmp_path / "out")
    assert str(message).startswith(f"reload_config.py: {tmp_path / 'out'} exists")


def test_reload_config_without_the_package_says_how_to_install_it():
    bare = [sys.executable, "-S", "-E", str(RELOAD_CONFIG), "a", "b"]  # -S: no site-packages
    done = subprocess.run(bare, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
