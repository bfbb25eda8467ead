"""What must be true on a GPU, of the figures of `benchmarks/gpu.py`. How fast it is decides nothing."""

import json

import pytest

VISION, LOGITS = 5e-5, 5e-4  # tests/golden/README.md
REUSE = 1e-4  # tests/hf/test_engine.py


def test_fp32_equals_the_published_model(report):
    way = report.part("golden")["ways"]["fp32 sdpa"]
    assert way["features"]["max"] < VISION
    assert way["logits"]["max"] < LOGITS


def test_bf16_rounds_alike_in_every_kernel(report):
    ways = report.part("golden")["ways"]
    sdpa = ways["bf16 sdpa"]
    assert sdpa["features"]["relative"] < 0.05  # bf16 keeps 8 bits; 0.022 on a CPU
    for name, way in ways.items():
        if name.startswith("bf16"):
            for what in ("features", "logits"):
                assert way[what]["relative"] < 1.5 * sdpa[what]["relative"], (name, what)


def test_the_engine_equals_a_forward_pass_over_everything(report):
    found = report.part("reuse")
    assert found["fp32"]["max"] < REUSE
    assert found["bf16"]["rms"] < found["bf16 rounding"]["rms"]


def test_a_conversation_does_not_depend_on_those_beside_it(report):
    found = report.part("batch")
    assert found["fp32"]["max"] < REUSE
    assert found["fp32"]["same_greedy_token"] == 1
    assert found["bf16"]["rms"] < report.part("reuse")["bf16 rounding"]["rms"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_samples_have_the_gradient_of_each_alone(report, precision):
    found = report.part("gradient")[precision]
    assert found["without_gradient"] == []
    assert found["finite"]
    if precision == "fp32":
        assert found["cosine"] > 1 - 1e-8
        assert found["relative_difference"] < 1e-4
    else:  # how much bf16 rounds differs between processors: by 18 % on one without AVX-512
        assert found["relative_difference"] < 2 * found["rounding"] < 0.5


def test_a_step_along_the_gradient_lowers_the_loss(report):
    found = report.part("gradient")
    assert found["loss_after_step"] < found["loss_before_step"]


def test_nothing_is_computed_twice_at_the_real_size(report):
    found = report.part("conversation")
    assert found["patches_work_ratio"] == pytest.approx(1, abs=1e-9)
    assert found["tokens_work_ratio"] == pytest.approx(1, abs=1e-9)
    assert found["plain_patches_work_ratio"] > 2
    assert found["plain_tokens_work_ratio"] > 2
    assert set(found["per_turn"]["ours"]) == {"encode", "prefill", "decode", "total"}


def test_both_loops_end_in_the_same_logits_but_for_rounding(report):
    found = report.part("conversation")
    rounding = 1e-5 if report.setting.conversation is None else 0.05  # fp32 and bf16
    assert max(found["logit_difference_rms"].values()) < rounding * found["logit_spread"]


def test_weights_keys_and_values_take_what_was_planned(report):
    memory = report.part("conversation")["memory"]
    assert memory["weights"]["measured"] == memory["weights"]["planned"]
    assert memory["kv_per_token"]["measured"] == pytest.approx(memory["kv_per_token"]["planned"], rel=1e-9)


def test_the_peak_is_within_the_plan(report):
    memory = report.part("conversation")["memory"]
    if report.setting.device == "cpu":
        assert "peak" not in memory  # torch counts what a GPU holds, and nothing else
    else:
        assert memory["weights"]["measured"] < memory["peak"]["measured"] < memory["peak"]["planned"]


def test_encoding_is_timed_for_every_number_of_groups(report):
    for figures in report.part("groups").values():
        assert list(figures["seconds"]) == ["1", "4", "16"]


def test_packs_waste_nothing_in_training(report):
    packed, *others = report.part("training")["rows"]
    assert packed["padding"] == pytest.approx(0, abs=1e-9)
    assert max(row["padding"] for row in others) > 0.1
    rounding = 1e-4 if report.setting.training is None else 0.05
    assert all(row["loss"] == pytest.approx(packed["loss"], abs=rounding) for row in others)


def test_every_part_is_in_the_file(report):
    for name in ("golden", "reuse", "batch", "gradient", "conversation", "groups", "training"):
        report.part(name)
    written = json.loads(report.file.read_text())
    assert written == json.loads(json.dumps(report.figures))
    assert sum(written["seconds"].values()) > 0
