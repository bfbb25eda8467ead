"""`vilavt doctor --plan`: memory and tokens from headers, held to counts that are known otherwise."""

import json
import math
from pathlib import Path

import pytest
from published_size import QUERY, TEXT, VISION
from typer.testing import CliRunner

from vilavt_core.checkpoint import inspect_checkpoint
from vilavt_core.cli import app
from vilavt_core.errors import CheckpointError, PlanError
from vilavt_core.sizing import GIB, Machine, PlannedTalk, largest_inquiry_pixels, plan

TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
runner = CliRunner()


@pytest.fixture
def published(tmp_path):
    """A folder that holds the published model's configuration and no weights."""
    config = {
        "model_type": "vilavt",
        "text_config": TEXT | {"max_position_embeddings": 128000},
        "vision_config": VISION,
        "text_encoder_config": QUERY,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def without_reserve(memory: float, **more) -> Machine:
    return Machine(gpu_memory=memory, utilization=1, reserve=0, **more)


def test_the_published_model_has_the_known_sizes(published):
    found = plan(published, Machine(gpu_memory=80), PlannedTalk((4000, 3000)))
    millions = {name: part.parameters / 1e6 for name, part in found.parts.items()}
    assert round(millions["vision_tower"] + millions["merger"], 1) == 676.6
    assert round(millions["query_projections"], 1) == 52.5
    assert round(millions["text_encoder"], 1) == 595.8
    assert round(found.parameters / 1e9, 2) == 8.94
    assert found.weight_bytes == 2 * found.parameters
    assert found.kv_bytes_per_token == 57_344
    assert found.context == 128_000
    assert found.encoder_cache_bytes == 16384 * 3584 * 2
    assert found.kv_cache_bytes == int((80 * 0.92 - 4) * GIB) - found.weight_bytes - found.encoder_cache_bytes


def test_the_shipped_checkpoint_has_what_its_headers_say():
    found, inspected = plan(TINY), inspect_checkpoint(TINY)
    assert found.parts == inspected.parts  # bfloat16, as it is stored
    assert found.weight_bytes == sum(part.nbytes for part in inspected.parts.values())
    assert plan(TINY, dtype="float32").weight_bytes == 2 * found.weight_bytes
    config = json.loads((TINY / "config.json").read_text())["text_config"]
    heads, size = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    assert found.kv_bytes_per_token == 2 * config["num_hidden_layers"] * heads * size * 2
    assert (found.crop_tokens, found.context) == (36, 4096)  # its settings: 28224 pixels


def test_a_configuration_and_the_weights_made_for_it_have_the_same_size(tmp_path):
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    assert plan(tmp_path).parts == plan(TINY).parts


@pytest.mark.parametrize(
    "picture, tokens",
    [((4000, 3000), 104 * 78), ((2800, 2800), 90 * 90), ((280, 140), 10 * 5), ((9, 9), 2 * 2)],
)
def test_a_picture_has_as_many_tokens_as_the_episode_would_give_it(published, picture, tokens):
    assert plan(published, talk=PlannedTalk(picture)).picture_tokens == tokens


def test_conversations_fill_what_the_weights_leave_in_whole_blocks(published):
    talk = PlannedTalk((280, 140), pictures=1, crops=0, text_tokens=51)  # 101 tokens: 7 blocks of 16
    bare = plan(published, without_reserve(80), talk)
    assert bare.conversation_tokens == 101
    one = 7 * 16 * bare.kv_bytes_per_token
    assert bare.conversations == bare.kv_cache_bytes // one
    needed = (bare.weight_bytes + bare.encoder_cache_bytes + 3 * one) / GIB
    assert plan(published, without_reserve(needed), talk).conversations == 3
    assert plan(published, without_reserve(needed - 1e-6), talk).conversations == 2
    assert plan(published, Machine(gpu_memory=16), talk).conversations == 0


def test_no_conversation_is_longer_than_the_context(published):
    found = plan(published, talk=PlannedTalk(crops=1000))
    assert found.conversation_tokens == found.context
    assert found.conversations == found.full_conversations


def test_gpus_share_everything_but_the_query_encoder(published):
    one, two = plan(published), plan(published, Machine(gpus=2))
    whole = sum(one.parts[name].nbytes for name in ("text_encoder", "text_proj"))
    assert two.weight_bytes == whole + sum(
        math.ceil(part.nbytes / 2) for name, part in one.parts.items() if name not in ("text_encoder", "text_proj")
    )
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token
    with pytest.raises(PlanError, match="28 attention heads cannot be shared out among 3 GPUs"):
        plan(published, Machine(gpus=3))


def test_attention_over_whole_pictures_is_counted(published):
    """Four times the tokens are four times the weights' work and sixteen times the attention's."""
    small, large = (plan(published, talk=PlannedTalk((n, n), crops=0)).vision_flops for n in (1120, 2240))
    tower, merger = (plan(published).parts[name].parameters for name in ("vision_tower", "merger"))
    weights = 2.0 * (tower * 4 * 1600 + merger * 1600)
    attention = 4.0 * 18 * 1280 * (4 * 1600) ** 2  # blocks 16 to 31, 7 and 15
    assert small == pytest.approx(weights + attention)
    assert large == pytest.approx(4 * weights + 16 * attention)


@pytest.mark.parametrize(
    "image, regions, pixels",
    [(28_224, 16, 16 * 28_224), (6_422_528, 16, 12_845_056), (20_000_000, 16, 20_000_000), (784, 3, 2352)],
)
def test_the_largest_inquiry_is_so_many_images_or_the_largest_one(image, regions, pixels):
    assert largest_inquiry_pixels(image, regions) == pixels


@pytest.mark.parametrize(
    "machine",
    [{"gpu_memory": 0}, {"gpus": 0}, {"utilization": 1.1}, {"reserve": -1}, {"batched_tokens": 0}],
    ids=lambda machine: next(iter(machine)),
)
def test_a_machine_that_cannot_be_is_refused_by_name(machine):
    with pytest.raises(PlanError, match=next(iter(machine))):
        Machine(**machine)


def test_a_damaged_or_unknown_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vilavt"}')
    with pytest.raises(CheckpointError, match="neither weights nor a text_encoder_config"):
        plan(tmp_path)
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        plan(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"max_pixels": "many"}')
    with pytest.raises(CheckpointError, match="max_pixels is 'many'"):
        plan(tmp_path)


def test_the_command_prints_the_plan(published):
    words = ["doctor", "--plan", "--model", str(published), "--gpu-memory", "48", "--picture", "280x140"]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "57,344 bytes a token" in shown.output
    assert json.loads(runner.invoke(app, [*words, "--json"]).stdout)["picture_tokens"] == 50
    short = runner.invoke(app, ["doctor", "--plan", "--model", str(published), "--gpu-memory", "16"])
    assert "not one fits" in short.output


@pytest.mark.parametrize(
    "words, says",
    [
        (["--plan"], "--plan needs --model"),
        (["--plan", "--load", "--model", str(TINY)], "drop --load"),
        (["--gpus", "2"], "--gpus has no effect without --plan"),
        (["--text-tokens", "2"], "--text-tokens has no effect without --plan"),
        (["--plan", "--model", str(TINY), "--picture", "4000"], "expected width and height"),
        (["--plan", "--model", str(TINY), "--dtype", "int3"], "choose bfloat16, float16 or float32"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(words, says):
    result = runner.invoke(app, ["doctor", *words])
    assert result.exit_code == 2
    assert says in result.output
