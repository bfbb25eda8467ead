"""What `inspect_checkpoint` says about each kind of folder, whole and damaged."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vilavt_core.checkpoint import Flavour, inspect_checkpoint
from vilavt_core.cli import app
from vilavt_core.errors import CheckpointError


@pytest.fixture
def copy(golden, tmp_path) -> Path:
    """A single-file golden checkpoint that a test may damage."""
    return Path(shutil.copytree(golden.checkpoint, tmp_path / "copy"))


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, tensors: dict) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_our_own_checkpoint_is_recognised_and_complete(tiny_checkpoint, tiny_model):
    found = inspect_checkpoint(tiny_checkpoint)
    assert found.flavour is Flavour.OURS
    assert found.complete, (found.problems, found.missing)
    assert found.parameters == sum(p.numel() for p in tiny_model.parameters())
    assert (found.integration_point, found.depth, found.query_aware_blocks) == ("late", 4, (2, 3))
    assert found.fullatt_block_indexes == (1, 3)
    assert found.dtypes == {"F32": found.parameters}
    assert not found.nested_names
    assert not found.prompts


def test_parts_add_up_from_headers_alone(golden):
    found = inspect_checkpoint(golden.checkpoint)
    assert {name: part.parameters for name, part in found.parts.items()} == {
        "language_model": 2 * (64 * 64 * 2 + 32 * 64 * 2 + 64 + 32 + 32 + 3 * 64 * 128 + 128) + 64 + 400 * 64,
        "lm_head": 400 * 64,
        "text_encoder": 2 * (64 * 48 * 2 + 32 * 48 * 2 + 32 + 3 * 48 * 96 + 96) + 48 + 300 * 48,
        "query_projections": 4 * 2 * (64 * 64 + 64),
        "text_proj": 64 * 48 + 64,
        "merger": 64 + 256 * 256 + 256 + 64 * 256 + 64,
        "vision_tower": found.parts["vision_tower"].parameters,
    }
    assert found.parameters == 663920
    assert sum(part.nbytes for part in found.parts.values()) == 2655680


def test_sharded_and_single_file_checkpoints_look_the_same(golden):
    one, many = inspect_checkpoint(golden.checkpoint), inspect_checkpoint(golden.sharded)
    assert one.fingerprint == many.fingerprint
    assert one.parts == many.parts
    assert len(many.files) == 3


@pytest.mark.parametrize("version", ["4.56.2", "4.57.1"])
def test_published_flavours_are_told_apart(golden, copy, version):
    for stem, flavour in (
        ("rl_before", Flavour.PUBLISHED_RL),
        ("rl_after", Flavour.PUBLISHED_RL),
        ("sft_after", Flavour.PUBLISHED_RL),
        ("sft_before", Flavour.PUBLISHED_SFT),
    ):
        shutil.copy(golden.configs / f"{stem}_reload.tf{version}.json", copy / "config.json")
        found = inspect_checkpoint(copy)
        assert found.flavour is flavour
        assert found.problems == ()
    assert any("vilavt convert" in note for note in found.notes)


def test_a_stock_model_is_sent_to_init_and_needs_no_query_tokenizer(golden, copy):
    shutil.copy(golden.configs / "sft_base_hub_style.tf4.57.1.json", copy / "config.json")
    tensors = load_file(copy / "model.safetensors")
    rewrite(copy, {n: t for n, t in tensors.items() if "text_" not in n and "instruct" not in n})
    found = inspect_checkpoint(copy)
    assert found.flavour is Flavour.STOCK
    assert found.query_aware_blocks == ()
    assert any("vilavt init" in note for note in found.notes)
    assert "query_tokenizer/" not in [item.name for item in found.missing]


def test_a_stock_config_over_vilavt_weights_is_not_stock(golden, copy):
    shutil.copy(golden.configs / "sft_base_hub_style.tf4.57.1.json", copy / "config.json")
    found = inspect_checkpoint(copy)
    assert found.flavour is Flavour.PUBLISHED_SFT
    assert "blocks 4-7, but vision_config.integration_point=None calls for none; 'late' would fit" in found.problems[0]


def test_nested_names_are_reported(copy):
    tensors = load_file(copy / "model.safetensors")
    rewrite(copy, {f"model.{n}" if n.startswith(("visual", "text_")) else n: t for n, t in tensors.items()})
    found = inspect_checkpoint(copy)
    assert found.nested_names
    assert found.problems == ()


def test_a_query_encoder_is_recognised(tmp_path, copy):
    edit(copy, model_type="qwen3", text_encoder_config=None, vision_config=None)
    assert inspect_checkpoint(copy).flavour is Flavour.QUERY_ENCODER


def test_missing_files_and_tensors_are_listed_not_raised(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual.blocks.6.attn.instruct_value_proj.weight"]
    rewrite(copy, tensors)
    (copy / "generation_config.json").unlink()
    found = inspect_checkpoint(copy)
    assert not found.complete
    assert found.problems == ("1 tensors are missing: visual.blocks.6.attn.instruct_value_proj.weight",)
    names = [item.name for item in found.missing]
    assert names == ["generation_config.json", "tokenizer.json", "preprocessor_config.json", "query_tokenizer/"]


def test_damage_is_listed_not_raised(golden, tmp_path):
    folder = Path(shutil.copytree(golden.sharded, tmp_path / "copy"))
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    (folder / "model-00003-of-00003.safetensors").unlink()
    found = inspect_checkpoint(folder)
    assert found.fingerprint is None
    assert any("00001" in problem and "truncated" in problem for problem in found.problems)
    assert any("00003" in problem and "is missing" in problem for problem in found.problems)


def test_tensors_of_another_shape_are_listed_with_both_shapes(copy):
    edit(copy, vocab_size=401)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] = 401
    (copy / "config.json").write_text(json.dumps(config))
    assert (
        "model.embed_tokens.weight has shape [400, 64], config.json calls for [401, 64]"
        in inspect_checkpoint(copy).problems
    )


def test_unknown_tensors_are_a_note(copy):
    tensors = load_file(copy / "model.safetensors")
    rewrite(copy, tensors | {"value_head.weight": tensors["text_proj.bias"].clone()})
    found = inspect_checkpoint(copy)
    assert found.problems == ()
    assert any("value_head.weight" in note for note in found.notes)


def test_shards_of_a_training_run_are_sent_to_merge(tmp_path):
    (tmp_path / "model_world_size_2_rank_0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="vilavt-rl merge"):
        inspect_checkpoint(tmp_path)


def run(*arguments: str | Path) -> str:
    """Output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_command_prints_json_that_equals_the_report(golden):
    printed = json.loads(run("inspect", golden.checkpoint, "--json"))
    assert printed == json.loads(json.dumps(inspect_checkpoint(golden.checkpoint).to_json()))
    assert printed["flavour"] == "published_rl"


def test_command_prints_findings_for_people(golden, tiny_checkpoint):
    text = run("inspect", golden.checkpoint)
    assert "published RL/vLLM format" in text
    assert "integration point: late; query-aware blocks: 4, 5, 6, 7 of 8" in text
    assert "663,920" in text
    assert "missing: query_tokenizer/" in text
    assert run("inspect", tiny_checkpoint).endswith("complete\n")


GROUPED = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int"},
        "input_activations": {"num_bits": 8, "type": "int"},
    }
}


@pytest.mark.parametrize(
    "settings, kinds, words",
    [
        (
            {"quant_method": "awq", "bits": 4, "version": "gemm", "modules_to_not_convert": ["visual", "lm_head"]},
            ("qweight", "qzeros", "scales"),
            "quantised with awq (gemm, W4A16), but for visual, lm_head",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*visual.*": {}, "+:.*down.*": {"bits": 8}}},
            ("qweight", "qzeros", "scales", "g_idx"),
            "quantised with gptq (W4A16), but for -:.*visual.*",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": GROUPED,
                "ignore": ["a"],
            },
            ("weight", "weight_scale"),
            "quantised with compressed-tensors (int-quantized, W8A8), but for a",
        ),
        ({"quant_method": "bitsandbytes"}, ("weight", "weight.absmax"), "quantised with bitsandbytes, all layers"),
    ],
)
def test_a_quantised_checkpoint_is_told_by_its_method_and_complete(copy, settings, kinds, words):
    tensors = load_file(copy / "model.safetensors")
    linear = [name for name in tensors if ".self_attn." in name and name.endswith("_proj.weight")]
    for name in linear:
        weight = tensors.pop(name)
        for kind in kinds:
            tensors[f"{name.removesuffix('.weight')}.{kind}"] = weight[:1].clone()
    rewrite(copy, tensors)
    assert not inspect_checkpoint(copy).complete  # its configuration does not say so
    edit(copy, quantization_config=settings)
    found = inspect_checkpoint(copy)
    assert found.problems == ()
    assert str(found.quantisation) == words
    printed = " ".join(CliRunner().invoke(app, ["inspect", str(copy)]).output.split())
    assert words in printed
    del tensors["text_proj.weight"]
    rewrite(copy, {name: tensor for name, tensor in tensors.items() if not name.startswith(linear[0][:-7])})
    (problem,) = inspect_checkpoint(copy).problems
    assert "2 tensors are missing" in problem or "3 tensors are missing" in problem
    assert linear[0] in problem


@pytest.mark.parametrize("settings", [None, {}, [], "awq", 4])
def test_whatever_is_no_quantisation_leaves_a_checkpoint_whole(copy, settings):
    edit(copy, quantization_config=settings)
    assert inspect_checkpoint(copy).quantisation is None


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": ["\x1b[2J"], "bits": "4", "ignore": "all", "config_groups": [1], "dynamic": 7},
        {"quant_method": "x" * 10_000, "ignore": [None, {}, "\x1b]0;"], "config_groups": {"a": 1, "b": {"weights": 2}}},
    ],
)
def test_settings_of_wrong_types_are_told_in_printable_words(copy, settings):
    edit(copy, quantization_config=settings)
    words = str(inspect_checkpoint(copy).quantisation)
    assert words.isprintable()
    assert len(words) < 1500
