"""Two processes over gloo: copies (DDP) and shards (FSDP2) learn what one process learns, from the same samples."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vilavt_core.checkpoint import inspect_checkpoint
from vilavt_core.curves import read_log
from vilavt_core.data.dataset import SftDataset
from vilavt_core.data.order import Shuffled
from vilavt_core.sft_config import SftConfig
from vilavt_hf import VilavtForConditionalGeneration, VilavtProcessor
from vilavt_hf.tiny.records import REGISTRY, write_training_set
from vilavt_hf.tiny.scenes import MAX_PIXELS
from vilavt_hf.train.collator import VilavtCollator
from vilavt_hf.train.run import Run, make_dataset

pytestmark = pytest.mark.timeout(1100)

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "vilavt-tiny"
VALIDATED = {"validation": ["tiny_episodes"]}
RECORDS = 19
"""Odd in every way: the last step of an epoch has a sample for one of two ranks only."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training set, and the shipped model with a new head, so that there is something to learn."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    processor = VilavtProcessor.from_pretrained(SHIPPED)
    write_training_set(folder / "data", processor.tokenizer, processor.prompts, count=RECORDS)
    shutil.copytree(SHIPPED, folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors["lm_head.weight"] = 0.02 * torch.randn(tensors["lm_head.weight"].shape, generator=generator)
    save_file({name: value.float() for name, value in tensors.items()}, folder / "base" / "model.safetensors")
    return folder


def config(folder, name, **sections):
    values = {
        "model": {"path": str(folder / "base"), "precision": "fp32", "gradient_checkpointing": False, "frozen": []},
        "data": {"registry": str(folder / "data" / REGISTRY), "use": ["tiny_published"], "max_length": 512,
                 "max_pixels": MAX_PIXELS, "workers": 0},
        "batch": {"packing": False, "samples": 1, "accumulation": 1},
        "optimizer": {"learning_rate": 3e-3, "warmup": 2, "epochs": 2},
        "validation": {"steps": 16},
        "parallel": {"cpu": True},
        "output": {"folder": str(folder / name), "save_steps": 8, "final_dtype": "fp32"},
    }  # fmt: skip
    return {key: value | sections.get(key, {}) for key, value in values.items()}


def torchrun(log, *arguments):
    """Run two ranks to their end; returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_MAX_": "0",
           "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # fmt: skip
    with log.open("w") as file:
        ranks = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
        try:
            code = ranks.wait(timeout=480)
        except subprocess.TimeoutExpired:
            os.killpg(ranks.pid, signal.SIGKILL)  # torchrun and both ranks
            code = "they hang"
    assert code == 0, f"{code}: {log.read_text()[-6000:]}"
    return log.read_text()


def damage(folder, step):
    """Cut a picture of each rank's short behind its header: rank 0's in the first step, rank 1's in another one."""
    order = [sample for batch in Shuffled(np.arange(RECORDS), 1, 0).epoch(0) for sample in batch]
    shutil.copytree(folder / "data", folder / "damaged")
    for sample in (order[0], order[2 * step + 1]):
        picture = min((folder / "damaged" / "pictures").glob(f"{sample:05d}*.png"))
        picture.write_bytes(picture.read_bytes()[:-200])
    return {"registry": str(folder / "damaged" / REGISTRY), "max_dropped": 1.5 / RECORDS}


@pytest.fixture(scope="module")
def two_ranks(folder):
    """Runs of two ranks: copies, shards, shards that were broken off at step 16 and go on, and damaged pictures."""
    sharded = {"parallel": {"cpu": True, "strategy": "fsdp2"}, "data": VALIDATED}
    runs = [config(folder, "copies", data=VALIDATED, validation={"questions": 5}), config(folder, "shards", **sharded),
            config(folder, "resumed", **sharded) | {"broken_off": str(folder / "shards")},
            config(folder, "dropping", data=damage(folder, step=3))]  # fmt: skip
    train_on_two_ranks(folder, "two_ranks", *runs)
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """The same steps in this process: two micro-batches each."""
    batch, asked = {"packing": False, "accumulation": 2}, {"questions": 5}
    Run(SftConfig.model_validate(config(folder, "alone", batch=batch, data=VALIDATED, validation=asked))).train()
    return folder / "alone"


def curve(folder):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(folder / "log.jsonl")]


@pytest.mark.parametrize("name", ["copies", "shards", "resumed"])
def test_two_ranks_have_the_curve_of_one_process(two_ranks, one_process, name):
    found, expected = curve(two_ranks / name), curve(one_process)
    assert [step for step, _, _ in found] == list(range(1, 21))
    for (step, loss, norm), (_, same_loss, same_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(same_loss, abs=2e-3, rel=2e-3), step
        assert norm == pytest.approx(same_norm, rel=0.02), step
    for (_, loss, norm), (_, same_loss, same_norm) in zip(found[:5], expected[:5], strict=True):
        assert loss == pytest.approx(same_loss, abs=1e-4)
        assert norm == pytest.approx(same_norm, rel=1e-3)


@pytest.mark.parametrize("name", ["copies", "shards", "resumed"])
def test_two_ranks_validate_as_one_process(two_ranks, one_process, name):
    """An odd number of samples and of questions; shards are not asked."""
    found, expected = (read_log(folder / "validation.jsonl") for folder in (two_ranks / name, one_process))
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [0, 16, 20]
    for line, alone in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(alone["loss"], abs=2e-3, rel=2e-3)
        assert line["tokens_right"] == pytest.approx(alone["tokens_right"], abs=0.01)
        assert line.get("questions") == (5 if name == "copies" else None)
        if name == "copies":
            assert line["answers_right"] == pytest.approx(alone["answers_right"], abs=0.21)  # one of five
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]
    best = json.loads((two_ranks / name / "best" / "provenance.json").read_text())["details"]
    assert best["step"] == min(found, key=lambda line: line["loss"])["step"]
    assert inspect_checkpoint(two_ranks / name / "best").complete


def test_one_process_goes_on_where_two_ranks_stopped(two_ranks):
    """Ranks x accumulation stays, so a step takes the same samples."""
    folder = two_ranks / "fewer"
    shutil.copytree(two_ranks / "copies", folder, ignore=shutil.ignore_patterns("final", "checkpoint-20"))
    Run(SftConfig.model_validate(config(two_ranks, "fewer", batch={"packing": False, "accumulation": 2}))).train()
    for (step, loss, _), (same, expected, _) in zip(curve(folder), curve(two_ranks / "copies"), strict=True):
        assert (step, loss) == (same, pytest.approx(expected, abs=1e-3))


def tokens_right(folder, checkpoint):
    """Share of the labelled tokens that a checkpoint predicts, over the whole training set."""
    dataset: SftDataset = make_dataset(SftConfig.model_validate(config(folder, "unused")))
    processor = VilavtProcessor.from_pretrained(checkpoint)
    collate = VilavtCollator(
        processor.encode_inquiries,
        pad_token_id=processor.tokenizer.pad_token_id,
        image_token_id=processor.image_token_id,
        ask_always=False,
    )
    model = VilavtForConditionalGeneration.from_pretrained(checkpoint).eval()
    right = total = 0
    for i in range(len(dataset)):
        batch = collate([dataset[i]])
        batch.pop("counts")
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            predicted = model(**batch).logits[:, :-1].argmax(-1)
        right += int((predicted == labels)[labels != -100].sum())
        total += int((labels != -100).sum())
    return right / total


def test_two_ranks_reach_the_accuracy_of_one_process(two_ranks, one_process):
    before = tokens_right(two_ranks, two_ranks / "base")
    alone = tokens_right(two_ranks, one_process / "final")
    assert before < 0.1
    assert alone > 0.6
    for name in ("copies", "shards"):
        assert tokens_right(two_ranks, two_ranks / name / "final") == pytest.approx(alone, abs=0.01)


@pytest.mark.parametrize("name", ["copies", "shards"])
def test_an_epoch_of_two_ranks_visits_every_sample_exactly_once(two_ranks, name):
    ranks = json.loads((two_ranks / name / "seen.json").read_text())["ranks"]
    assert len({len(rank) for rank in ranks}) == 1
    half = len(ranks[0]) // 2
    for epoch in (0, 1):
        visited = Counter(
            s for rank in ranks for step in rank[epoch * half : (epoch + 1) * half] for s in step["samples"]
        )
        assert visited == Counter(range(RECORDS))


def test_shards_survive_steps_in_which_one_rank_has_no_picture_or_no_sample(two_ranks):
    seen = json.loads((two_ranks / "shards" / "seen.json").read_text())
    assert seen["sharded"] == seen["parameters"] > 100
    pairs = list(zip(*seen["ranks"], strict=True))
    assert sum((one["images"] == 0) != (other["images"] == 0) for one, other in pairs) >= 3
    assert sum(not other["samples"] for _, other in pairs) == 2  # the last step of each epoch


def test_ranks_that_drop_too_many_samples_together_end_together(two_ranks):
    """One rank met one damaged picture, the other another; one is allowed, two are not."""
    seen = json.loads((two_ranks / "dropping" / "seen.json").read_text())
    assert [text.split(" samples")[0] for text in seen["ended"]] == ["2 of 19"] * 2
    dropped = read_log(two_ranks / "dropping" / "log.jsonl")
    assert [line["dropped"] for line in dropped] == [1, 0, 0, 1]
    assert len(read_log(two_ranks / "dropping" / "dropped.jsonl")) == 2


@pytest.mark.parametrize("name", ["copies", "shards", "resumed"])
def test_checkpoints_of_two_ranks_are_complete(two_ranks, name):
    for checkpoint in (*sorted((two_ranks / name).glob("checkpoint-*")), two_ranks / name / "final"):
        found = inspect_checkpoint(checkpoint)
        assert found.complete, (checkpoint, found)
        assert not found.nested_names
    VilavtForConditionalGeneration.from_pretrained(two_ranks / name / "checkpoint-20")


def two_steps(folder, name, *, shards, output=None, lora=None, **model):
    """Two steps, as packs."""
    values = config(
        folder, name, optimizer={"max_steps": 2, "warmup": 0},
        batch={"packing": True, "pack_tokens": 512, "accumulation": 2 if shards else 4},
        parallel={"cpu": True, "strategy": "fsdp2" if shards else "ddp"},
        model={"frozen": ["text_encoder"], **model}, output=output or {},
    )  # fmt: skip
    return values | ({"lora": lora} if lora else {})


def train_on_two_ranks(folder, name, *runs):
    (folder / f"{name}.json").write_text(json.dumps(runs))
    torchrun(folder / f"{name}.log", str(Path(__file__).with_name("sft_ranks.py")), str(folder / f"{name}.json"))


@pytest.fixture(scope="module")
def by_default(folder):
    """Shards on two ranks with the precision that runs default to, and the same of one process in fp32."""
    bf16 = {"precision": "bf16", "gradient_checkpointing": True}
    train_on_two_ranks(folder, "by_default", two_steps(folder, "default", shards=True, **bf16))
    Run(SftConfig.model_validate(two_steps(folder, "default-alone", shards=False))).train()
    return folder


@pytest.fixture(scope="module")
def with_adapters(folder):
    """Shards on two ranks, broken off after a step and gone on with too; and the same of one process."""
    lora = {"rank": 4, "alpha": 8}
    half = {"save_steps": 1, "resume": str(folder / "adapters" / "checkpoint-1")}
    train_on_two_ranks(
        folder, "with_adapters",
        two_steps(folder, "adapters", shards=True, output={"save_steps": 1}, lora=lora),
        two_steps(folder, "adapters-resumed", shards=True, output=half, lora=lora),
    )  # fmt: skip
    Run(SftConfig.model_validate(two_steps(folder, "adapters-alone", shards=False, lora=lora))).train()
    return folder


@pytest.mark.nightly("autocast to bf16 takes a minute on a CPU without instructions for it")
def test_two_steps_of_shards_in_bf16_have_the_loss_of_one_process_in_fp32(by_default):
    found, expected = curve(by_default / "default"), curve(by_default / "default-alone")
    assert [step for step, _, _ in found] == [1, 2]
    for (_, loss, norm), (_, same_loss, same_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(same_loss, rel=0.02)
        assert norm == pytest.approx(same_norm, rel=0.1)
    precision = json.loads((by_default / "default" / "seen.json").read_text())["precision"]
    assert "param_dtype=torch.bfloat16, reduce_dtype=torch.float32" in precision
    for name in ("checkpoint-2", "final"):
        assert inspect_checkpoint(by_default / "default" / name).complete
    before, after = (load_file(by_default / name / "model.safetensors") for name in ("base", "default/checkpoint-2"))
    assert {value.dtype for value in after.values()} == {torch.float32}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name].float())}
    assert len(moved) > 100
    assert not any("text_encoder" in name for name in moved)


@pytest.mark.nightly("one more start of two ranks; test_train_run.py holds adapters, the runs above hold shards")
def test_two_steps_of_shards_with_adapters_have_the_curve_of_one_process(with_adapters):
    alone = curve(with_adapters / "adapters-alone")
    for name, expected in (("adapters", alone), ("adapters-resumed", alone[1:])):
        for (step, loss, norm), (same, same_loss, same_norm) in zip(curve(with_adapters / name), expected, strict=True):
            assert step == same
            assert loss == pytest.approx(same_loss, abs=1e-3), name
            assert norm == pytest.approx(same_norm, rel=1e-2), name


@pytest.mark.nightly("one more start of two ranks; test_train_run.py holds adapters, the runs above hold shards")
def test_two_steps_of_shards_with_adapters_are_merged_as_those_of_one_process(with_adapters):
    base, alone = (load_file(with_adapters / name / "model.safetensors") for name in ("base", "adapters-alone/merged"))
    moved = {name for name, value in alone.items() if not torch.equal(value, base[name])}
    assert moved
    for name in ("adapters/merged", "adapters-resumed/merged"):
        assert inspect_checkpoint(with_adapters / name).complete
        merged = load_file(with_adapters / name / "model.safetensors")
        assert merged.keys() == alone.keys()
        assert {key for key, value in merged.items() if not torch.equal(value, base[key])} == moved
        assert all(torch.allclose(merged[key], alone[key], atol=1e-5) for key in moved)


def test_the_documented_command_trains_on_two_ranks_and_ends_in_the_ordinary_way(folder):
    values = config(folder, "command", optimizer={"max_steps": 2, "warmup": 0})
    (folder / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
    command = ("-m", "vilavt_hf.train", str(folder / "run.yaml"), "optimizer.learning_rate=1e-3")
    said = torchrun(folder / "command.log", *command)
    assert said.count("2 steps over 19 samples") == 1, said
    assert [step for step, _, _ in curve(folder / "command")] == [1, 2]
    assert inspect_checkpoint(folder / "command" / "final").complete
    assert "destroy_process_group" not in said
    assert "terminate called" not in said
