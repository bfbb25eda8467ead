"""Whole training runs of a model that fits in a test: order, resuming, checkpoints, adapters, what is refused."""

import io
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from clips import clip, marked
from family import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.integrations import deepspeed
from typer.testing import CliRunner

from vilavt_core.checkpoint import inspect_checkpoint
from vilavt_core.cli import app
from vilavt_core.curves import read_log
from vilavt_core.data.order import InOrder, Packed, RankShare, Shuffled, best_fit, digest
from vilavt_core.errors import CheckpointError, DataError, EngineError, TrainingError
from vilavt_core.progress import time_left
from vilavt_core.prompts import PromptSet
from vilavt_core.sft_config import SftConfig, describe
from vilavt_core.shipped import recipe_names
from vilavt_hf import VilavtChat, VilavtForConditionalGeneration, VilavtProcessor
from vilavt_hf.train.lora import merge_adapter
from vilavt_hf.train.reporting import ConsoleReport
from vilavt_hf.train.run import Run
from vilavt_hf.train.validating import same_answer

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=80),
    world=st.integers(1, 5),
    size=st.integers(1, 7),
    kind=st.sampled_from(["shuffled", "packed", "in order"]),
)
def test_an_epoch_visits_every_sample_exactly_once_on_any_number_of_ranks(lengths, world, size, kind):
    samples, tokens = np.arange(len(lengths)), np.array(lengths)
    order = {
        "shuffled": lambda: Shuffled(samples, size, 1),
        "packed": lambda: Packed(samples, tokens, 100 + size, 1),
        "in order": lambda: InOrder(len(lengths), size),
    }[kind]()
    for epoch in range(3):
        shares = [list(RankShare(order, rank, world, lambda epoch=epoch: epoch)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # no rank waits for another
        visited = Counter(sample for share in shares for batch in share for sample in batch)
        assert visited == Counter(samples.tolist())
    if kind == "packed":
        assert all(tokens[pack].sum() <= 100 + size for pack in order.packs)


def test_the_order_is_the_seed_s_and_changes_with_the_epoch():
    samples, tokens = np.arange(50), np.full(50, 10)
    for make in (lambda seed: Shuffled(samples, 2, seed), lambda seed: Packed(samples, tokens, 20, seed)):
        first = [list(b) for b in make(3).epoch(0)]
        assert first == [list(b) for b in make(3).epoch(0)]
        assert first != [list(b) for b in make(3).epoch(1)]
        assert first != [list(b) for b in make(4).epoch(0)]


def test_samples_that_are_left_out_are_in_no_batch():
    kept = np.array([1, 4, 7])
    assert sorted(s for b in Shuffled(kept, 2, 0).epoch(0) for s in b) == [1, 4, 7]
    assert sorted(s for b in Packed(kept, np.full(9, 5), 10, 0).epoch(0) for s in b) == [1, 4, 7]


def test_packs_are_nearly_full():
    lengths = np.random.default_rng(0).lognormal(7.5, 0.7, 3000).astype(int).clip(50, 16384)
    packs = best_fit(np.arange(3000), lengths, 16384)
    assert lengths.sum() / (len(packs) * 16384) > 0.98


def test_a_sample_longer_than_a_pack_is_refused():
    with pytest.raises(TrainingError, match=r"has 30 tokens, a pack holds 20; raise batch\.pack_tokens"):
        Packed(np.array([0, 1]), np.array([5, 30]), 20, 0)


# ------------------------------------------------------------------------------------------- configuration


def test_the_published_recipe_has_the_published_hyper_parameters():
    config = SftConfig.load("vilavt_7b_sft")
    optimizer = config.optimizer
    assert set(config.model.frozen) == {"text_encoder", "text_proj"}
    assert (config.model.precision, config.model.gradient_checkpointing, config.lora) == ("bf16", True, None)
    assert optimizer.learning_rate == 5e-5
    assert optimizer.learning_rates == {"vision_tower": 5e-5, "merger": 5e-5}
    assert (optimizer.epochs, optimizer.max_steps, optimizer.warmup, optimizer.schedule) == (3, None, 0.03, "cosine")
    assert (optimizer.betas, optimizer.epsilon) == ((0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.decay_norms, optimizer.max_grad_norm) == (0, True, 1)
    assert (config.batch.packing, config.batch.samples, config.batch.accumulation) == (False, 1, 4)
    assert config.batch.loss_mean == "micro_batch"
    assert (config.data.max_length, config.data.max_pixels, config.data.min_pixels) == (24576, 200704, 3136)
    assert (config.data.labels, config.data.image_rules) == ("turn_and_newline", "published")
    assert config.data.system == "You are a helpful assistant."
    assert config.data.workers == 4
    assert config.data.use == (
        "sr_91k_v2", "spar7m_v2", "vgr_v2", "thyme_2turn_v2", "sr_91k_text", "spar7m_text", "thyme_text_v2",
        "vica_cot", "vica_text",
    )  # fmt: skip
    assert (config.output.save_steps, config.output.keep, config.output.log_steps) == (300, 4, 1)
    assert (config.output.report_to, config.parallel.strategy) == (("tensorboard",), "zero2")


def test_every_recipe_is_valid_and_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == ["vilavt_7b_sft", "vilavt_tiny_sft"]
    for name in recipe_names():
        (tmp_path / "copy.yaml").write_text(CliRunner().invoke(app, ["recipe", name]).output)
        assert SftConfig.load(name) == SftConfig.load(f"{name}.yaml") == SftConfig.load(tmp_path / "copy.yaml")
    with pytest.raises(TrainingError, match="or name a recipe: vilavt_7b_sft, vilavt_tiny_sft"):
        SftConfig.load(f"recipes/{name}.yaml")


def test_the_names_of_recipes_are_listed():
    assert CliRunner().invoke(app, ["recipe"]).output.split() == recipe_names()
    with pytest.raises(TrainingError, match=r"no recipe 'gone'; there are vilavt_7b_sft"):
        CliRunner().invoke(app, ["recipe", "gone"], catch_exceptions=False)


def test_the_documentation_lists_every_key_as_it_is():
    page = (ROOT / "docs" / "sft.md").read_text().replace("\\|", "|")
    for key, default, text in describe():
        assert text, key
        shown = default if default == "required" else f"`{default}`"
        assert f"| `{key}` | {shown} | {text} |" in page.replace("`<|im_end|>`", "<|im_end|>"), key


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["optimizer.learning_rat=1"], r"optimizer\.learning_rat: Extra inputs are not permitted"),
        (["optimizer.learning_rate=-1"], r"optimizer\.learning_rate: Input should be greater than 0"),
        (["optimizer.learning_rates={nose: 1}"], r"optimizer\.learning_rates\.nose"),
        (["seed"], "write section.key=value"),
        (["seed.x=1"], "seed is a value, not a section"),
    ],
)
def test_a_wrong_key_is_refused_by_name(tmp_path, overrides, problem):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {use: [a]}\noutput: {folder: out}\nseed: 1\n")
    with pytest.raises(TrainingError, match=problem):
        SftConfig.load(path, overrides)


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ndata: {use: [a]}\noutput: {folder: out}\n")
    config = SftConfig.load(
        path, ["optimizer.learning_rate=1e-3", "data.use=[b, c%5]", "lora.rank=4", "output.keep=null"]
    )
    assert (config.optimizer.learning_rate, config.data.use) == (1e-3, ("b", "c%5"))
    assert (config.lora.rank, config.output.keep) == (4, None)


# ------------------------------------------------------------------------------------------- runs


SHORT = {"max_turns": 3, "max_new_tokens_per_turn": 24}
"""Limits of the base: a model that learned nothing talks until it is stopped."""


@pytest.fixture(scope="module")
def base(tiny_checkpoint, tmp_path_factory):
    """A complete checkpoint with prompts and settings."""
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    PromptSet.load("tiny").save(folder / "prompts")
    (folder / "vilavt_chat.json").write_text(json.dumps({"preset": "default", "limits": SHORT}))
    return folder


def records(folder, count):
    """Published records with pictures, crops under a query, and text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((112, 84)).convert("RGB").save(folder / "a.png")
    Image.radial_gradient("L").resize((56, 56)).convert("RGB").save(folder / "b.png")
    out = []
    for i in range(count):
        if i % 3 == 2:
            record = {
                "conversations": [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": "x" * (i + 2)}]
            }
        else:
            record = {
                "images": ["a.png", "b.png", "b.png"],
                "conversations": [
                    {"from": "human", "value": f"<image>find {i}"},
                    {"from": "gpt", "value": "<think>" + "y" * i + "</think>zoom"},
                    {"from": "human", "value": "<image><image>"},
                    {"from": "gpt", "value": f"<answer>{i}</answer>"},
                ],
                "queries": ["", f"number {i}"],
                "image_to_query_mapping": [0, 1, 1],
            }
        out.append(record)
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in out))
    (folder / "sets.yaml").write_text("datasets: [{name: set, annotations: set.jsonl}]")
    return folder / "sets.yaml"


@pytest.fixture(scope="module")
def configure(base, tmp_path_factory):
    """`configure(folder, **{"section.key": value})` -> SftConfig; 12 records in 5 packs, 3 steps an epoch."""
    registry = records(tmp_path_factory.mktemp("data"), 12)

    def make(folder, **overrides):
        values = {
            "model": {"path": str(base), "precision": "fp32", "gradient_checkpointing": False, "frozen": []},
            "data": {"registry": str(registry), "use": ["set"], "max_length": 300, "max_pixels": 28 * 28 * 16,
                     "workers": 0},
            "batch": {"packing": True, "pack_tokens": 320, "accumulation": 2},
            "optimizer": {"learning_rate": 1e-3, "epochs": 2, "warmup": 1},
            "parallel": {"cpu": True},
            "output": {"folder": str(folder), "save_steps": 2, "final_dtype": "fp32"},
        }  # fmt: skip
        for key, value in overrides.items():
            section, _, name = key.rpartition(".")
            (values.setdefault(section, {}) if section else values)[name] = value
        return SftConfig.model_validate(values)

    return make


@pytest.fixture(scope="module")
def unbroken(configure, tmp_path_factory):
    """A run of two epochs of three steps."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run = Run(configure(folder))
    assert len(run.trainer.order) == 5
    report = run.train()
    return folder, report


def curve(folder):
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in read_log(folder / "log.jsonl")}


def assert_same_curve(found, expected):
    assert found.keys() == expected.keys()
    for step, (loss, norm) in expected.items():
        assert found[step][0] == pytest.approx(loss, abs=1e-5), step
        assert found[step][1] == pytest.approx(norm, rel=1e-4), step


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other, tolerance=1e-6):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name].float(), value.float(), atol=tolerance, rtol=0, msg=name)


def test_a_run_learns_and_leaves_its_figures(unbroken):
    folder, report = unbroken
    lines = read_log(folder / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"loss", "grad_norm", "tokens_per_second", "images_per_second", "padding_share"} <= lines[0].keys()
    assert sum(line["samples"] for line in lines) == 24  # two epochs of twelve
    assert sum(line["samples"] for line in lines[:3]) == 12
    assert all(line["padding_share"] == 0 for line in lines)
    assert (folder / "loss.png").stat().st_size > 5000
    assert (report.steps, report.samples, report.dropped, report.cut) == (6, 12, {}, 0)
    assert report.last_loss == lines[-1]["loss"]


def test_every_checkpoint_is_complete(unbroken, base):
    folder, _ = unbroken
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for checkpoint in (*folder.glob("checkpoint-*"), folder / "final"):
        found = inspect_checkpoint(checkpoint)
        assert found.complete, found
        assert not found.nested_names
        assert found.prompts
        record = json.loads((checkpoint / "provenance.json").read_text())
        assert record["details"]["config"]["optimizer"]["learning_rate"] == 1e-3
        assert record["details"]["base_fingerprint"] == inspect_checkpoint(base).fingerprint
        assert json.loads((checkpoint / "vilavt_chat.json").read_text()) == TRAINED
        VilavtForConditionalGeneration.from_pretrained(checkpoint)
        assert VilavtProcessor.from_pretrained(checkpoint).query_tokenizer is not None
    assert_same_weights(folder / "checkpoint-6", folder / "final")


TRAINED = {"preset": "default", "limits": SHORT | {"min_pixels": 3136, "max_pixels": 28 * 28 * 16}}
"""Of every checkpoint: what the base asks for, and the pixels of the run."""


@pytest.fixture
def hub(base, hub_cache):
    """Makes ``someone/vilavt`` a hub id."""
    return hub_cache(base)


def test_checkpoints_of_a_model_from_the_hub_are_complete(hub, configure, base, tmp_path):
    config = configure(tmp_path / "run", **{"model.path": "someone/vilavt", "optimizer.max_steps": 2})
    run = Run(config)
    assert run.trainer.train_dataset.renderer.preset.limits.max_turns == 3
    run.train()
    for checkpoint in (tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "final"):
        assert inspect_checkpoint(checkpoint).complete
        assert json.loads((checkpoint / "vilavt_chat.json").read_text()) == TRAINED
        details = json.loads((checkpoint / "provenance.json").read_text())["details"]
        assert details["config"]["model"]["path"] == "someone/vilavt"
        assert details["base_fingerprint"] == inspect_checkpoint(base).fingerprint


def test_a_model_that_is_nowhere_is_an_error_that_names_it(hub, configure, tmp_path):
    for path in ("someone/else", str(tmp_path / "gone")):
        with pytest.raises(CheckpointError, match=f"{path}: no such folder, and no"):
            Run(configure(tmp_path / "run", **{"model.path": path}))


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_has_the_curve_of_the_unbroken_one(unbroken, configure, tmp_path, step):
    """Step 2 lies within the first epoch, step 4 within the second."""
    folder, _ = unbroken
    broken = tmp_path / "run"
    shutil.copytree(folder, broken, ignore=lambda path, names: {n for n in names if n == "final" or (
        n.startswith("checkpoint-") and int(n.split("-")[1]) > step)})  # fmt: skip
    report = Run(configure(broken)).train()
    assert report.steps == 6
    assert_same_curve(curve(broken), curve(folder))
    assert_same_weights(folder / "final", broken / "final", 1e-5)


KILLED = """
import json, os, signal, sys
from vilavt_core.sft_config import SftConfig
from vilavt_hf.train.run import Run

run = Run(SftConfig.model_validate(json.loads(sys.argv[1])))

def die(folder):
    if run.trainer.state.global_step == 4:  # the weights are written, the state is not
        os.kill(os.getpid(), signal.SIGKILL)

run.trainer._save_rng_state = die
run.trainer.train()
"""


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(unbroken, configure, tmp_path):
    folder, _ = unbroken
    config = configure(tmp_path / "run", **{"output.keep": 1})
    command = [sys.executable, "-c", KILLED, config.model_dump_json()]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "run"
    assert (run / "unfinished.partial" / "checkpoint-4" / "model.safetensors").is_file()
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert inspect_checkpoint(run / "checkpoint-2").complete
    Run(config).train()
    assert_same_curve(curve(run), curve(folder))
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not list(run.glob("*.partial"))


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("seed", 1, "seed was 0 and is 1 now"),
        ("optimizer.learning_rate", 2e-3, r"optimizer\.learning_rate was 0\.001 and is 0\.002 now"),
        ("optimizer.epochs", 3, r"optimizer\.epochs was 2\.0 and is 3\.0 now"),
        ("model.frozen", ["merger"], r"model\.frozen was \[\] and is \['merger'\] now"),
        ("model.precision", "bf16", r"model\.precision was 'fp32' and is 'bf16' now"),
        ("batch.loss_mean", "micro_batch", r"batch\.loss_mean was 'tokens' and is 'micro_batch' now"),
        ("batch.accumulation", 3, r"ranks x batch\.accumulation\) was 2 and is 3 now"),
        ("batch.pack_tokens", 321, r"batch\.pack_tokens was 320 and is 321 now"),
        ("data.use", ["set%50"], r"data\.use was \['set'\] and is \['set%50'\] now; .*data was '\w+' and is '\w+' now"),
        ("data.system", "x", r"data\.system was 'You are a helpful assistant\.' and is 'x' now"),
        ("lora", {"rank": 4}, r"lora\.rank was None and is 4 now"),
        ("output.resume", "never", "checkpoint-6 of an earlier run"),
    ],
)
def test_a_resumed_run_must_be_the_same_run(unbroken, configure, key, value, told):
    folder, _ = unbroken
    with pytest.raises(TrainingError, match=told):
        Run(configure(folder, **{key: value}))


def broken_off(folder, run, changes):
    """A run's folder with a checkpoint that says it was made by another run in some details."""
    record = json.loads((run / "checkpoint-2" / "provenance.json").read_text())
    for path, value in changes.items():
        section, key = path.split("/")
        whole = record["details"][section]
        whole[key] = whole[key] | value if isinstance(value, dict) else value
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "provenance.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "recorded, told",
    [
        ({"config/parallel": {"strategy": "zero2"}}, r"parallel\.strategy was 'zero2' and is 'ddp' now"),
        ({"resume/order of the samples": "0" * 16}, r"order of the samples was '0+' and is '\w+' now"),
        (
            {"resume/model.path (its fingerprint)": "0" * 64},
            r"model\.path \(its fingerprint\) was '0+' and is '\w+'",
        ),
    ],
)
def test_a_run_with_other_ranks_packs_or_weights_is_not_gone_on_with(unbroken, configure, tmp_path, recorded, told):
    with pytest.raises(TrainingError, match=told):
        Run(configure(broken_off(tmp_path, unbroken[0], recorded)))


def test_what_does_not_change_the_curve_may_change(unbroken, configure, base, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    folder = broken_off(tmp_path / "run", unbroken[0], {"config/optimizer": {"schedule": "constant"}})
    changes = {
        "model.path": str(tmp_path / "moved"), "model.gradient_checkpointing": True, "data.workers": 1,
        "data.max_dropped": 0.5, "parallel.timeout": 60, "output.save_steps": 3, "output.log_steps": 2,
        "output.keep": None, "optimizer.schedule": "constant", "optimizer.epochs": 5, "optimizer.max_steps": 7,
    }  # fmt: skip
    assert Run(configure(folder, **changes)).resume == folder / "checkpoint-2"


def test_orders_with_as_many_packs_but_others_are_told_apart():
    samples, tokens = np.arange(6), np.array([8, 7, 5, 4, 3, 3])
    one, other = Packed(samples, tokens, 11, 0), Packed(samples, tokens, 12, 0)
    assert len(one) == len(other) == 3
    assert digest(one) == digest(Packed(samples, tokens, 11, 0)) != digest(other)


def test_gradient_checkpointing_and_bf16_change_cost_and_not_the_loss(unbroken, configure, tmp_path):
    folder, _ = unbroken
    short = {"optimizer.max_steps": 1, "optimizer.warmup": 6}
    recomputed = configure(tmp_path / "a", **short, **{"model.gradient_checkpointing": True})
    Run(recomputed).train()
    loss, norm = curve(tmp_path / "a")[1]
    assert (loss, norm) == (pytest.approx(curve(folder)[1][0], abs=1e-5), pytest.approx(curve(folder)[1][1], rel=1e-4))
    half = configure(tmp_path / "b", **short, **{"model.precision": "bf16", "output.final_dtype": "bf16"})
    report = Run(half).train()
    assert report.last_loss == pytest.approx(loss, rel=0.02)
    assert {value.dtype for value in weights(report.folder).values()} == {torch.bfloat16}
    assert json.loads((report.folder / "config.json").read_text()).get("dtype", "") in ("bfloat16", "")
    assert {value.dtype for value in weights(tmp_path / "b" / "checkpoint-1").values()} == {torch.float32}


def test_padded_batches_have_the_same_loss_as_packs(configure, tmp_path):
    """One step over all twelve samples, so that the order does not matter."""
    one = {"optimizer.max_steps": 1, "batch.accumulation": 1}
    packed = Run(configure(tmp_path / "a", **one, **{"batch.pack_tokens": 4000})).train()
    padded = Run(
        configure(tmp_path / "b", **one, **{"batch.packing": False, "batch.pack_tokens": None, "batch.samples": 12})
    ).train()
    assert padded.last_loss == pytest.approx(packed.last_loss, abs=1e-5)
    assert read_log(tmp_path / "b" / "log.jsonl")[0]["padding_share"] > 0.1


@pytest.mark.parametrize(
    "start",
    [
        "fork",
        *(
            pytest.param(name, marks=pytest.mark.nightly("its process imports torch and transformers anew"))
            for name in ("spawn", "forkserver")
        ),
    ],
)
def test_batches_are_the_same_however_their_processes_start(configure, tmp_path, start):
    """fork is Linux's, up to Python 3.13; forkserver from 3.14; spawn is macOS's."""
    run = Run(configure(tmp_path / "run", **{"data.workers": 0}))
    given = {"dataset": run.trainer.train_dataset, "batch_size": 6, "collate_fn": run.trainer.data_collator}
    expected = list(DataLoader(**given))
    found = list(DataLoader(**given, num_workers=1, multiprocessing_context=start))
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value, name


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"batch.packing": False}, r"batch\.pack_tokens has no effect: batch\.packing=false pads batch\.samples"),
        ({"batch.samples": 2}, r"batch\.samples has no effect: batch\.packing=true"),
        ({"optimizer.final_rate": 0.1}, r"optimizer\.final_rate has no effect: optimizer\.schedule is cosine"),
        ({"optimizer.decay_from": 0.1}, r"optimizer\.decay_from has no effect: optimizer\.schedule is cosine"),
        ({"parallel.settings": "mine.json"}, r"parallel\.settings has no effect: parallel\.strategy is ddp"),
    ],
)
def test_a_key_that_another_one_leaves_without_effect_is_named(configure, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        configure(tmp_path, **changes)


def test_an_adapter_trains_the_language_model_alone_and_merges(configure, base, tmp_path):
    run = Run(configure(tmp_path / "run", lora={"rank": 4, "alpha": 8}, **{"optimizer.epochs": 1}))
    trained = {n for n, p in run.trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".language_model.layers." in n and ".lora_" in n for n in trained)
    adapter = run.train().folder
    assert {p.name for p in adapter.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
                                                   "query_tokenizer", "provenance.json"}  # fmt: skip
    assert max(v.abs().max() for n, v in load_file(adapter / "adapter_model.safetensors").items() if "lora_B" in n) > 0
    merged = tmp_path / "run" / "merged"
    assert inspect_checkpoint(merged).complete
    cards = [(folder / "README.md").read_text() for folder in (adapter, merged)]
    assert "# ViLaVT adapter (LoRA)" in cards[0]
    assert "library_name: peft" in cards[0]
    assert "[More Information Needed]" not in cards[0]
    assert "# ViLaVT checkpoint, an adapter merged into it" in cards[1]
    assert "library_name: transformers" in cards[1]
    assert all(f"| base | {base.name} |" in card and "| data | set |" in card for card in cards)
    processor = VilavtProcessor.from_pretrained(merged)
    inputs = processor(text="<|im_start|>user\nfind 3<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    with torch.no_grad():
        run.trainer.model.eval()
        expected = run.trainer.model(**inputs).logits
        found = VilavtForConditionalGeneration.from_pretrained(merged)(**inputs).logits
        before = VilavtForConditionalGeneration.from_pretrained(base)(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - before).abs().max() > 1e-3
    again = merge_adapter(adapter, tmp_path / "again", dtype="fp32")
    assert_same_weights(merged, again)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2", "checkpoint-3"]


def quantised_run(configure, folder, method, **changes):
    """A run of adapters over weights in few bits; nothing but the adapters changes."""
    pytest.importorskip({"int8": "torchao", "int4": "bitsandbytes"}[method])
    lora = {"rank": 8, "alpha": 16, "quantize": method, "merge": False}
    run = Run(configure(folder, lora=lora, **{"optimizer.epochs": 6, "optimizer.learning_rate": 5e-3}, **changes))
    model = run.trainer.model
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".language_model.layers." in n and ".lora_" in n for n in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    adapter = run.train().folder
    losses = [line["loss"] for line in read_log(folder / "log.jsonl")]
    assert losses[-1] < 0.8 * losses[0]
    inputs = run.processor(text="<|im_start|>user\nfind 3<|im_end|>\n", return_tensors="pt")
    model.eval()
    with torch.no_grad():
        learnt = model(**inputs).logits
        with model.disable_adapter():
            before = model(**inputs).logits
        again = VilavtChat.from_pretrained(adapter, dtype=torch.float32, device="cpu", quantize=method).model
        found = again(**inputs).logits
    assert (learnt - before).abs().max() > 1e-2
    torch.testing.assert_close(found, learnt, atol=1e-5, rtol=0)
    return model


def test_adapters_are_trained_over_weights_in_8_bits(configure, tmp_path):
    model = quantised_run(configure, tmp_path / "run", "int8")
    layer = model.get_base_model().model.language_model.layers[0].mlp.up_proj
    assert type(layer.base_layer.weight.data).__name__ == "Int8Tensor"


def test_adapters_are_trained_over_weights_in_4_bits(configure, base, tmp_path):
    wide = VilavtProcessor.from_pretrained(base)
    config = tiny_config(wide.tokenizer, hidden=128)
    config.text_encoder_config.hidden_size = config.text_encoder_config.intermediate_size = 64
    config.text_encoder_config.head_dim = 32
    torch.manual_seed(0)
    VilavtForConditionalGeneration(config).save_pretrained(tmp_path / "wide")
    wide.save_pretrained(tmp_path / "wide")
    model = quantised_run(configure, tmp_path / "run", "int4", **{"model.path": str(tmp_path / "wide")})
    layer = model.get_base_model().model.language_model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.uint8


def test_4_bits_that_the_kernel_does_not_take_are_refused_before_the_weights_are_read(configure, tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(EngineError, match=r"multiples of 64, and text_config\.\w+ is \d+; use int8"):
        Run(configure(tmp_path / "run", lora={"quantize": "int4"}))


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_weights_in_few_bits_are_not_shared_out(configure, tmp_path, strategy):
    with pytest.raises(ValueError, match=f"lora.quantize is int4, but parallel.strategy is {strategy}"):
        configure(tmp_path, lora={"quantize": "int4"}, **{"parallel.strategy": strategy})


def test_bits_that_cannot_be_trained_over_are_refused(configure, tmp_path):
    with pytest.raises(ValueError, match="'int8' or 'int4'"):
        configure(tmp_path, lora={"quantize": "fp8"})


def test_an_adapter_of_a_zero3_run_is_merged_into_a_whole_model(configure, tmp_path, monkeypatch):
    """One rank merges. Sharded loading would make it wait for the others, which wait for it."""
    run = Run(configure(tmp_path / "run", lora={"rank": 2}, **{"optimizer.max_steps": 1}))
    seen = []

    class Sharding:
        config: ClassVar[dict] = {}

        def is_zero3(self):
            return True

    sharding = Sharding()

    class Begin(TrainerCallback):
        def on_train_end(self, args, *rest, **kwargs):
            args.hf_deepspeed_config = sharding
            deepspeed.set_hf_deepspeed_config(sharding)

    def merge(*args, **kwargs):
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        return merge_adapter(*args, **kwargs)

    monkeypatch.setattr("vilavt_hf.train.run.merge_adapter", merge)
    run.trainer.add_callback(Begin())
    try:
        run.train()
        assert deepspeed.is_deepspeed_zero3_enabled()  # the run's own model is still sharded
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert seen == [False]
    assert inspect_checkpoint(tmp_path / "run" / "merged").complete


# ------------------------------------------------------------------------------------------- how it is run later


def runs_as(checkpoint):
    chat = VilavtChat.from_pretrained(checkpoint, device="cpu")
    return chat.settings.preset.name, chat.settings.limits


def test_a_trained_checkpoint_is_run_as_it_was_trained(configure, tmp_path):
    changes = {"data.preset": "rl", "data.max_pixels": 28 * 28 * 9, "data.min_pixels": 784.0, "optimizer.max_steps": 2}
    report = Run(configure(tmp_path / "run", **changes)).train()
    for checkpoint in (report.folder, tmp_path / "run" / "checkpoint-2"):
        preset, limits = runs_as(checkpoint)
        assert (preset, limits.max_pixels, limits.min_pixels, limits.max_turns) == ("rl", 28 * 28 * 9, 784, 3)
        chat = VilavtChat.from_pretrained(checkpoint, device="cpu")
        assert chat.ask(Image.new("RGB", (400, 400)), "what?").views[0].image.size == (84, 84)
    assert report.summary().splitlines()[-1] == (
        "unless told otherwise it runs with preset rl, 784 to 7,056 pixels for an image, at most 3 turns and 52 images"
    )


def test_a_run_can_name_another_way_to_run_what_it_trains(configure, tmp_path):
    """As published: small pictures in training, large ones in evaluation, beyond what the base's processor allows."""
    large = 28 * 28 * 300
    changes = {"inference.preset": "eval-hf", "inference.limits": {"max_pixels": large}, "optimizer.max_steps": 1}
    run = Run(configure(tmp_path / "run", **changes))
    assert run.trainer.train_dataset.renderer.settings.max_pixels == 28 * 28 * 16
    assert run.trainer.train_dataset.renderer.preset.name == "default"
    report = run.train()
    preset, limits = runs_as(report.folder)
    assert (preset, limits.max_pixels, limits.max_turns) == ("eval-hf", large, 3)
    last = report.summary().splitlines()[-1]
    assert "runs with preset eval-hf, 3,136 to 235,200 pixels for all originals together" in last
    assert "; trained with preset default, 3,136 to 12,544 pixels for an image, at most 3 turns" in last


def test_an_adapter_and_what_is_merged_from_it_are_run_as_trained(configure, tmp_path):
    changes = {"data.max_pixels": 28 * 28 * 9, "optimizer.max_steps": 1, "lora": {"rank": 2}}
    adapter = Run(configure(tmp_path / "run", **changes)).train().folder
    merge_adapter(tmp_path / "run" / "checkpoint-1", tmp_path / "again", dtype="fp32")
    for folder in (adapter, tmp_path / "run" / "merged", tmp_path / "again"):
        assert json.loads((folder / "vilavt_chat.json").read_text())["limits"]["max_pixels"] == 28 * 28 * 9
    assert runs_as(tmp_path / "again")[1].max_pixels == 28 * 28 * 9


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"inference.preset": "rll"}, "inference: no preset 'rll'; known are default, rl"),
        ({"inference.limits": {"max_pixel": 5}}, "inference: unknown limits max_pixel"),
        ({"inference.limits": {"max_pixels": 5}}, r"inference: Limits\.max_pixels is 5, below min_pixels 3136"),
        ({"data.preset": "rll"}, "data: no preset 'rll'"),
    ],
)
def test_a_way_to_run_that_there_is_not_is_refused_before_training(configure, tmp_path, changes, told):
    with pytest.raises(TrainingError, match=told):
        Run(configure(tmp_path / "run", **changes))


def test_chat_settings_survive_save_pretrained(base, tmp_path):
    VilavtProcessor.from_pretrained(base).save_pretrained(tmp_path)
    kept, given = (json.loads((folder / "vilavt_chat.json").read_text()) for folder in (tmp_path, base))
    assert kept == given
    assert VilavtProcessor.from_pretrained(tmp_path).prompts.name == "tiny"


# ------------------------------------------------------------------------------------------- validation


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """A registry of twelve published records and of nine episodes."""
    folder = tmp_path_factory.mktemp("validation")
    registry = records(folder, 12)
    asked = [{"question": f"say {i}", "turns": [f"<think></think><answer>x{i}</answer>"]} for i in range(8)]
    asked.append({"images": ["a.png"], "question": "and this?", "max_turns": 1, "max_pixels": 3136,
                  "turns": ["<think></think><answer>grey</answer>"]})  # fmt: skip
    (folder / "asked.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    registry.write_text("datasets: [{name: set, annotations: set.jsonl}, {name: asked, annotations: asked.jsonl}]")
    return registry


@pytest.fixture(scope="module")
def validated(unbroken, configure, episodes, tmp_path_factory):
    """The unbroken run, with validation."""
    folder = tmp_path_factory.mktemp("validated") / "run"
    changes = {"data.validation": ["asked", "set%50"], "validation.steps": 2, "output.log_steps": 4}
    changes |= {"data.registry": str(episodes)}
    run = Run(configure(folder, **changes))
    return folder, run.train(), run, changes


def test_validation_is_measured_at_the_start_every_so_often_and_at_the_end(validated):
    folder, report, *_ = validated
    lines = read_log(folder / "validation.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert all(line["questions"] == 9 and 0 <= line["answers_right"] <= 1 for line in lines)
    card = (folder / "final" / "README.md").read_text()
    assert "# ViLaVT checkpoint, fine-tuned" in card
    assert f"| the run's validation data | answers right | {lines[-1]['answers_right']:g} | 9 |" in card
    assert lines[-1]["loss"] < lines[0]["loss"]  # some of it is trained on
    assert report.validations == tuple(lines)
    assert f"validation: loss {lines[0]['loss']:.4f}, 0 of 9 answers right at step 0, " in report.summary()


def test_a_validation_shows_how_far_it_is_below_the_bar_of_the_steps():
    report, state = ConsoleReport(), SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=4)
    report.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    report.on_train_begin(None, state, None)
    with report.counting(6, "validation answers", "question") as advance:
        advance(4)
        report.bar.refresh()
        shown = report.console.file.getvalue()
    assert "validation answers" in shown
    assert "4/6" in shown
    assert "1/4" in shown
    assert [task.description for task in report.bar.tasks] == ["step"]
    report.on_train_end(None, state, None)


def test_a_validation_of_a_rank_that_reports_nothing_is_silent(capfd):
    report, state = ConsoleReport(), SimpleNamespace(is_world_process_zero=False, global_step=1, max_steps=4)
    report.on_train_begin(None, state, None)
    with report.counting(6, "validation answers", "question") as advance:
        advance(4)
    assert capfd.readouterr() == ("", "")


def test_the_last_step_is_logged_whatever_the_interval(validated):
    assert [line["step"] for line in read_log(validated[0] / "log.jsonl")] == [1, 4, 6]


def test_validation_leaves_the_run_as_it_is(validated, unbroken):
    assert_same_weights(validated[0] / "final", unbroken[0] / "final", 1e-6)


def test_the_loss_of_validation_is_the_mean_over_its_labelled_tokens(validated):
    folder, _, run, _ = validated
    model = VilavtForConditionalGeneration.from_pretrained(folder / "final").eval()
    dataset = run.validation.dataset
    lost = count = right = 0
    for example in map(dataset.__getitem__, range(len(dataset))):
        groups = example.groups
        inputs = run.processor.encode_inquiries(groups) if groups else {}
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids]), **inputs).logits[0, :-1]
        labels = torch.tensor(example.labels)[1:]
        known = labels != -100
        lost += torch.nn.functional.cross_entropy(logits[known], labels[known], reduction="sum").item()
        right += int((logits.argmax(-1) == labels)[known].sum())
        count += int(known.sum())
    last = read_log(folder / "validation.jsonl")[-1]
    assert last["loss"] == pytest.approx(lost / count, abs=1e-4)
    assert last["tokens_right"] == pytest.approx(right / count, abs=1e-4)


def test_the_best_checkpoint_is_kept_and_complete(validated):
    folder, report, *_ = validated
    lines = read_log(folder / "validation.jsonl")
    best = min(lines, key=lambda line: line["loss"])
    details = json.loads((folder / "best" / "provenance.json").read_text())["details"]
    assert (details["step"], details["validation"]["loss"]) == (best["step"], best["loss"])
    assert report.best["step"] == best["step"]
    assert inspect_checkpoint(folder / "best").complete
    assert_same_weights(folder / "best", folder / f"checkpoint-{best['step']}")
    assert f"best: loss {best['loss']:.4f}" in report.summary()


def test_the_best_checkpoint_survives_resuming(validated, configure, tmp_path):
    folder, _, _, changes = validated
    broken = tmp_path / "run"
    shutil.copytree(folder, broken, ignore=shutil.ignore_patterns("final", "checkpoint-6"))
    record = json.loads((broken / "best" / "provenance.json").read_text())
    record["details"] |= {"step": 2, "validation": record["details"]["validation"] | {"step": 2, "loss": 0.0}}
    (broken / "best" / "provenance.json").write_text(json.dumps(record))
    run = Run(configure(broken, **changes))
    assert (run.best.record["step"], run.best.record["loss"]) == (2, 0.0)
    report = run.train()
    assert report.best["step"] == 2  # nothing is better than a loss of nothing
    assert json.loads((broken / "best" / "provenance.json").read_text()) == record
    assert [line["step"] for line in read_log(broken / "validation.jsonl")] == [0, 2, 4, 6]
    one, other = (read_log(path / "validation.jsonl")[-1] for path in (folder, broken))
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert Run(configure(broken, **{**changes, "data.validation": ["asked"]})).best.record is None


def test_an_answer_is_right_if_it_says_the_same():
    assert same_answer("The Red bicycle.", "red bicycle")
    assert same_answer("\\boxed{7}", "7")
    assert same_answer("A", "a")
    assert same_answer("?", "?")
    for found in (None, "", "8", "the", "7 or 8"):
        assert not same_answer(found, "7")
    assert not same_answer("the", "A")


def test_adapters_in_bf16_are_validated_and_the_best_merges(configure, episodes, tmp_path):
    changes = {"data.registry": str(episodes), "data.validation": ["asked"], "validation.steps": 1, "lora": {"rank": 2},
               "optimizer.max_steps": 2, "model.precision": "bf16", "validation.best": "answers_right"}  # fmt: skip
    report = Run(configure(tmp_path / "run", **changes)).train()
    assert [line["step"] for line in read_log(tmp_path / "run" / "validation.jsonl")] == [0, 1, 2]
    assert (report.best["answers_right"], report.best["step"]) == (0, 0)
    merged = merge_adapter(tmp_path / "run" / "best", tmp_path / "merged")
    assert inspect_checkpoint(merged).complete


def test_a_validation_that_cannot_be_is_refused(configure, episodes, tmp_path):
    options = {"data.registry": str(episodes)}
    with pytest.raises(DataError, match="there is no data set 'askd'"):
        Run(configure(tmp_path / "a", **options, **{"data.validation": ["askd"]}))
    with pytest.raises(TrainingError, match=r"validation\.best is answers_right, but set: no episode records"):
        Run(configure(tmp_path / "b", **options, **{"data.validation": ["set"], "validation.best": "answers_right"}))
    with pytest.raises(ValueError, match="fsdp2, whose shards cannot be asked"):
        configure(tmp_path / "c", **{"validation.questions": 4, "parallel.strategy": "fsdp2"})
    assert configure(tmp_path / "d", **{"parallel.strategy": "fsdp2"}).validation_questions == 0


def test_damaged_validation_data_ends_the_run_before_the_first_step(configure, episodes, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(episodes.parent, folder)
    (folder / "a.png").unlink()
    (folder / "sets.yaml").write_text(
        "datasets: [{name: text, annotations: text.jsonl}, {name: asked, annotations: asked.jsonl}]"
    )
    (folder / "text.jsonl").write_text((folder / "asked.jsonl").read_text().split("\n")[0])
    options = {"data.registry": str(folder / "sets.yaml"), "data.validation": ["asked"], "data.use": ["text"]}
    with pytest.raises(TrainingError, match=r"data.validation: 1 of 9 samples cannot be used.*asked\[8\]"):
        Run(configure(tmp_path / "run", **options))


def test_what_remains_of_a_run_is_told():
    assert time_left(90, 3, 10) == "left 0:05:00"
    assert time_left(5, 0, 10) == "left 0:00:50"


# ------------------------------------------------------------------------------------------- samples left out


def test_damaged_pictures_are_counted_and_reported(configure, tmp_path):
    registry = records(tmp_path / "data", 12)
    lines = [json.loads(line) for line in (tmp_path / "data" / "set.jsonl").read_text().splitlines()]
    whole = (tmp_path / "data" / "a.png").read_bytes()
    (tmp_path / "data" / "half.png").write_bytes(whole[: len(whole) // 2])
    lines[0]["images"][0] = "half.png"
    lines[1]["images"][0] = "gone.png"
    (tmp_path / "data" / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"data.registry": str(registry), "optimizer.epochs": 1}
    with pytest.raises(TrainingError, match=r"1 of 12 samples cannot be used, data.max_dropped allows 1.00%: set\[1\]"):
        Run(configure(tmp_path / "strict", **options))
    report = Run(configure(tmp_path / "run", **options, **{"data.max_dropped": 0.2})).train()
    assert report.dropped == {"missing file": 1, "image": 1}
    assert report.samples == 11
    told = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    assert [(line["sample"], line["kind"]) for line in told] == [("set[1]", "missing file"), ("set[0]", "image")]
    logged = read_log(tmp_path / "run" / "log.jsonl")
    assert sum(line["samples"] for line in logged) == 10
    assert sum(line["dropped"] for line in logged) == 1


@pytest.fixture
def one_damaged(tmp_path, configure):
    """`one_damaged(folder, **overrides)`: three epochs over four samples, one of them cut short behind its header."""
    registry = records(tmp_path / "data", 4)
    lines = [json.loads(line) for line in (tmp_path / "data" / "set.jsonl").read_text().splitlines()]
    whole = (tmp_path / "data" / "a.png").read_bytes()
    (tmp_path / "data" / "half.png").write_bytes(whole[: len(whole) // 2])
    lines[0]["images"][0] = "half.png"
    (tmp_path / "data" / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"data.registry": str(registry), "optimizer.epochs": 3, "output.save_steps": 1}
    return lambda folder, **overrides: configure(folder, **options, **overrides)


@pytest.mark.parametrize("log_steps", [1, 100])
def test_a_damaged_picture_counts_against_the_allowed_share(one_damaged, tmp_path, log_steps):
    with pytest.raises(TrainingError, match=r"1 of 4 samples cannot be used, data.max_dropped allows 0.00%: set\[0\]"):
        Run(one_damaged(tmp_path / "run", **{"data.max_dropped": 0, "output.log_steps": log_steps})).train()
    assert not (tmp_path / "run" / "final").exists()


def test_a_sample_that_is_dropped_in_every_epoch_counts_once(one_damaged, tmp_path):
    config = one_damaged(tmp_path / "run", **{"data.max_dropped": 0.25})
    assert Run(config).train().dropped == {"image": 1}
    assert sum(line["dropped"] for line in read_log(tmp_path / "run" / "log.jsonl")) == 3
    listed = [line["sample"] for line in read_log(tmp_path / "run" / "dropped.jsonl")]
    assert listed == ["set[0]"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")  # its last epoch is run again
    assert Run(config).train().dropped == {"image": 1}
    assert [line["sample"] for line in read_log(tmp_path / "run" / "dropped.jsonl")] == listed


def test_a_missing_picture_ends_the_run_until_it_is_there(configure, tmp_path):
    registry = records(tmp_path / "data", 4)
    (tmp_path / "data" / "a.png").rename(tmp_path / "a.png")
    options = {"data.registry": str(registry), "optimizer.max_steps": 1}
    with pytest.raises(TrainingError, match=r"3 of 4 samples .* start again, or raise data\.max_dropped"):
        Run(configure(tmp_path / "run", **options))
    (tmp_path / "a.png").rename(tmp_path / "data" / "a.png")
    assert Run(configure(tmp_path / "run", **options)).train().samples == 4


def test_long_samples_are_left_out_with_a_count(configure, tmp_path):
    report = Run(configure(tmp_path / "run", **{"data.max_length": 150, "optimizer.max_steps": 1})).train()
    assert set(report.dropped) == {"too long"}
    assert report.samples + report.dropped["too long"] == 12


def test_a_run_that_cannot_start_says_what_to_change(configure, tmp_path):
    with pytest.raises(TrainingError, match=r"none of 12 samples can be trained on: .* at most 16"):
        Run(configure(tmp_path / "a", **{"data.max_length": 16}))
    with pytest.raises(TrainingError, match="packs need SDPA or flash attention"):
        Run(configure(tmp_path / "b", **{"model.attention": "eager"}))
    with pytest.raises(DataError, match="there is no data set 'sett'"):
        Run(configure(tmp_path / "c", **{"data.use": ["sett"]}))
    with pytest.raises(TrainingError, match="start the run with torchrun"):
        Run(configure(tmp_path / "d", **{"parallel.strategy": "fsdp2"}))


def test_the_log_goes_to_tensorboard_too(configure, tmp_path):
    pytest.importorskip("tensorboard")
    Run(configure(tmp_path / "run", **{"output.report_to": ["tensorboard"], "optimizer.max_steps": 1})).train()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_configuration_files_are_what_provenance_records(unbroken, tmp_path):
    """A run can be repeated from what its checkpoint says."""
    folder, _ = unbroken
    config = json.loads((folder / "final" / "provenance.json").read_text())["details"]["config"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert SftConfig.load(tmp_path / "again.yaml").model_dump(mode="json") == config


def test_a_run_trains_and_is_validated_on_videos(configure, tmp_path):
    pytest.importorskip("av", reason='videos need the extra "video"')
    (tmp_path / "clip.mp4").write_bytes(clip(marked(8, (56, 56))))
    trained = {"conversations": [{"from": "human", "value": "<video>which?"}, {"from": "gpt", "value": "x"}],
               "video": "clip.mp4"}  # fmt: skip
    asked = {"videos": [{"path": "clip.mp4", "frames": 1}], "question": "and this?", "max_turns": 1,
             "turns": ["<think></think><answer>grey</answer>"]}  # fmt: skip
    for name, record, count in (("set", trained, 6), ("asked", asked, 2)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * count)
    registry = tmp_path / "registry.yaml"
    registry.write_text("datasets: [{name: set, annotations: set.jsonl}, {name: asked, annotations: asked.jsonl}]")
    changes = {"data.registry": str(registry), "data.validation": ["asked"], "data.frames": 3, "data.workers": 1,
               "data.max_length": 2000, "batch.pack_tokens": 2000}  # fmt: skip
    Run(configure(tmp_path / "run", **changes, **{"optimizer.max_steps": 2, "validation.steps": 2})).train()
    validations = read_log(tmp_path / "run" / "validation.jsonl")
    assert [line["questions"] for line in validations] == [2, 2]
    assert validations[1]["loss"] != validations[0]["loss"]
