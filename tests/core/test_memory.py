"""What a model takes on one GPU: the table, and what of the formula needs no torch (the rest is in tests/hf)."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_size import QUERY, TEXT, VISION
from typer.testing import CliRunner

from vilavt_core.architecture import expected_tensors
from vilavt_core.cli import app
from vilavt_core.errors import CheckpointError, PlanError
from vilavt_core.memory import SHAPES, STRATEGIES, Load, ModelSizes, asked, memory_table, taught, trained, ways

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "vilavt-tiny"
SIZES = {name: ModelSizes.of(config) for name, config in SHAPES.items()}


def test_the_table_of_the_docs_is_the_formula_s():
    shown = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert memory_table({name.upper(): sizes for name, sizes in SIZES.items()}) in shown


def test_the_shapes_are_those_of_the_published_models():
    published = {"text_config": TEXT, "vision_config": VISION, "text_encoder_config": QUERY}
    assert expected_tensors(SHAPES["7b"]) == expected_tensors(published)
    billions = {name: round(sizes.count() / 1e9, 1) for name, sizes in SIZES.items()}
    # Qwen2.5-VL has 3.75, 8.29, 33.45 and 73.41 billion; encoder and projections add 0.65
    assert billions == {"3b": 4.4, "7b": 8.9, "32b": 34.1, "72b": 74.1}


def test_all_that_is_trained_takes_16_bytes_and_is_shared_out():
    sizes = SIZES["7b"]
    frozen = sizes.count(("text_encoder",))
    learns = sizes.count() - frozen
    for gpus in (1, 2, 8):
        shared = trained(sizes, strategy="fsdp2", gpus=gpus)
        states = shared.weights + shared.gradients + shared.optimizer
        assert states == pytest.approx((16 * learns + 4 * frozen) / gpus, abs=8)
    alone = trained(sizes)
    assert alone.weights + alone.gradients + alone.optimizer == 16 * learns + 4 * frozen


def test_an_adapter_has_two_matrices_on_every_linear_layer_of_a_block():
    text = SHAPES["3b"]["text_config"]
    hidden, inner, keys = text["hidden_size"], text["intermediate_size"], 2 * 128
    layers = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), *[(hidden, inner)] * 3]
    assert SIZES["3b"].adapter(8) == 36 * 8 * sum(map(sum, layers))


def test_less_precise_weights_take_less():
    for sizes in SIZES.values():
        whole, eight, four = (asked(sizes, quantize=q).weights for q in (None, "int8", "int4"))
        assert whole == 2 * sizes.count()
        assert whole > 1.3 * eight > 1.3 * four
        assert trained(sizes, method="qlora").total < trained(sizes, method="lora").total < trained(sizes).total


def test_what_the_3b_size_was_seen_to_take_is_near_the_plan():
    """docs/benchmarks.md: 9,167 MiB of resident memory, of which about 400 are imports; a picture and two crops."""
    planned = asked(SIZES["3b"], Load(tokens=3697, picture_tokens=1998, labelled=0)).total / 2**20
    assert planned == pytest.approx(9167 - 400, rel=0.15)


works = st.tuples(st.integers(1, 10**5), st.integers(0, 10**5), st.integers(0, 10**5), st.integers(1, 64)).map(
    lambda w: Load(w[0], min(w[1], w[0]), min(w[2], w[0]), w[3])
)


@settings(max_examples=10)  # each asks for 13 plans
@given(works, st.integers(1, 64))
def test_more_work_never_takes_less_and_more_gpus_never_more(work, gpus):
    sizes = SIZES["3b"]
    more = Load(2 * work.tokens, 2 * work.picture_tokens, 2 * work.labelled, work.conversations + 1)
    assert asked(sizes, work).total <= asked(sizes, more).total
    for strategy in STRATEGIES:
        one, two = (trained(sizes, work, strategy=strategy, gpus=n).total for n in (gpus, 2 * gpus))
        assert two <= one
        assert one <= trained(sizes, more, strategy=strategy, gpus=gpus).total
    assert taught(sizes, work, gpus=2 * gpus).total <= taught(sizes, work, gpus=gpus).total


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 8, "picture_tokens": 9}, "picture_tokens is 9, more than all 8"),
        ({"tokens": 8, "picture_tokens": 0, "labelled": 9}, "labelled is 9"),
        ({"conversations": 0}, "conversations is 0"),
    ],
)
def test_work_that_cannot_be_is_refused_by_name(wrong, says):
    with pytest.raises(PlanError, match=says):
        Load(**wrong)


def test_weights_in_4_bits_are_not_shared_out():
    with pytest.raises(PlanError, match="fsdp2 trains adapters with method lora"):
        trained(SIZES["7b"], method="qlora", strategy="fsdp2", gpus=8)


def test_a_configuration_without_a_query_encoder_has_no_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["3b"], "text_encoder_config": None}))
    with pytest.raises(CheckpointError, match="neither weights nor a text_encoder_config"):
        ModelSizes.of_checkpoint(tmp_path)


def test_the_plan_of_a_checkpoint_has_every_way():
    words = ["doctor", "--plan", "--model", str(TINY), "--picture", "280x140", "--training-gpus", "2"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "training: 2 GPUs" in shown.output
    memory = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["memory"]
    assert set(memory) == {"asked", *ways()}
    assert all(way in shown.output for way in ways())
    sizes = ModelSizes.of_checkpoint(TINY)
    assert memory["SFT, all weights, fsdp2"]["gradients"] == math.ceil(
        4 * (sizes.count() - sizes.count(("text_encoder",))) / 2
    )
