"""Build the tiny checkpoint from nothing: data, three training stages, the saved folder and where it came from.

Stages, each a Trainer run over generated examples: ``read`` (the tower reads digits and finds cards), ``place`` (the
language model binds colour words to places), ``talk`` (whole conversations). Every stage saves what it reached.
"""

import dataclasses
import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from vilavt_core.architecture import Part, find_part
from vilavt_core.checkpoint.writing import staged_folder
from vilavt_core.data.order import InOrder
from vilavt_core.errors import TrainingError
from vilavt_core.prompts import PromptSet
from vilavt_core.settings import save_chat_settings
from vilavt_core.versions import installed

from ..processing_vilavt import VilavtProcessor
from ..train.ranks import rank_and_world
from ..train.reporting import LogFile
from ..train.trainer import StableDecay
from .benchmark import write_clip
from .lesson import Lesson
from .scenes import (
    ACROSS_KINDS,
    CLIP_KINDS,
    MAX_PIXELS,
    MOST_PICTURES,
    PHOTOGRAPHS,
    SHARED_KINDS,
    QuestionKind,
    Scene,
    Split,
    ask_about,
    make_scene,
    make_series,
    scene_about,
)
from .teacher import (
    Encoder,
    arithmetic_example,
    blind_example,
    direct_example,
    episode_example,
    listing_example,
    order_example,
    reading_example,
    shared_reading_example,
)
from .teaching import TeachingCollator, TeachingTrainer, VilavtForTeaching
from .tiny_model import ATTENTION, fast_encoder, linear_patches, tiny_auxiliary, tiny_config, tiny_model, tiny_processor

logger = logging.getLogger(__name__)

TOWER: tuple[Part, ...] = ("vision_tower", "merger", "text_encoder", "text_proj")
NOTE = (
    "This example model knows drawn scenes of numbered cards only: what it says about any other picture, a photograph "
    "for instance, means nothing."
)
"""What people are told before they ask it."""
KINDS_OF_ONE_CARD = (QuestionKind.ONE, QuestionKind.PAIR, QuestionKind.NESTED)
"""What the tower learns to read from."""

KIND_SHARES = {
    QuestionKind.ONE: 0.12,
    QuestionKind.PAIR: 0.16,
    QuestionKind.NESTED: 0.14,
    QuestionKind.SUM: 0.10,
    QuestionKind.LARGER: 0.06,
    QuestionKind.SHARED: 0.13,
    QuestionKind.WHICH: 0.04,
    QuestionKind.SUM_ACROSS: 0.06,
    QuestionKind.LARGER_ACROSS: 0.04,
    QuestionKind.SHARED_ACROSS: 0.04,
    QuestionKind.FRAME: 0.04,
    QuestionKind.FIRST: 0.07,
}
"""How often training asks each."""


@dataclass(frozen=True)
class Stage:
    """One Trainer run."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 60
    decay_from: float = 0.6
    final_rate: float = 0.1
    tower_rate: float = 1.0
    """Factor on the rate of tower, query encoder and projection."""
    language: bool = True
    """Whether the language model is trained."""
    mix: tuple[tuple[str, float], ...] = ()
    """Shares of the kinds of examples: read, look (read with a first look), listing, episode, blind; sums and order
    (text only); direct (no zoom offered), guess (offered, not used), shared (plates two by two), twins (the same,
    without a digit)."""
    pad_to: int = 32
    heads: tuple[tuple[str, float], ...] = ()
    """Weights of auxiliary heads in this stage, where they differ from `tiny_auxiliary`."""


_LATER = (("row", 0.2), ("column", 0.2), ("colour", 1.0), ("digit_seen", 0.1), ("digit", 1.0))

STAGES = (
    Stage("read", 500, 24, 2e-3, decay_from=0.8, final_rate=0.4, language=False, mix=(("read", 0.9), ("look", 0.1))),
    Stage("match", 250, 16, 1e-3, final_rate=1.0, language=False, mix=(("twins", 0.8), ("read", 0.2))),
    Stage(
        "meet", 1200, 16, 1e-3, decay_from=0.8, final_rate=0.5, language=False, mix=(("shared", 0.75), ("read", 0.25))
    ),
    Stage(
        "place",
        350,
        16,
        1.5e-3,
        tower_rate=0.4,
        decay_from=0.9,
        final_rate=0.7,
        mix=(("listing", 0.6), ("episode", 0.25), ("shared", 0.1), ("order", 0.05)),
        heads=_LATER,
    ),
    Stage(
        "talk",
        1500,
        16,
        1.2e-3,
        tower_rate=0.5,
        decay_from=0.5,
        final_rate=0.02,
        mix=(
            ("episode", 0.61),
            ("listing", 0.05),
            ("blind", 0.13),
            ("shared", 0.09),
            ("direct", 0.03),
            ("sums", 0.05),
            ("order", 0.04),
        ),
        heads=_LATER,
    ),
)
"""``read``: the tower reads digits and finds cards; ``match``, ``meet``: its joint blocks learn to compare two crops,
first whether they agree at all, then where; ``place``: the language model binds colour words to places; ``talk``: whole
conversations."""


class Lessons(Dataset):
    """Generated examples; item i depends on the seed and i alone, so that runs repeat exactly and can resume."""

    def __init__(self, stage: Stage, encoder: Encoder, seed: int):
        self.stage, self.encoder, self.seed = stage, encoder, seed
        self.names = [name for name, _ in stage.mix]
        self.shares = np.array([share for _, share in stage.mix])

    def __len__(self) -> int:
        return self.stage.steps * self.stage.batch

    def __getitem__(self, i: int) -> Lesson:
        rng = np.random.default_rng([self.seed, i])
        return self.make(str(rng.choice(self.names, p=self.shares / self.shares.sum())), rng)

    def make(self, name: str, rng: np.random.Generator) -> Lesson:
        """An example of one kind."""
        kind = list(KIND_SHARES)[rng.choice(len(KIND_SHARES), p=list(KIND_SHARES.values()))]
        if name in ("shared", "twins"):
            return shared_reading_example([_plates(rng, name == "twins") for _ in range(3)], rng)
        if name == "sums":
            return arithmetic_example(self.encoder, rng)
        if name == "order":
            return order_example(self.encoder, rng)
        if name in ("read", "look"):
            return reading_example(training_scene(rng, KINDS_OF_ONE_CARD[rng.integers(3)]), rng, name == "look")
        if name == "blind" and kind not in SHARED_KINDS and rng.random() < 0.5:
            kind = QuestionKind.PAIR  # where the query alone decides
        scene = training_scene(rng, kind)
        if name == "listing":
            return listing_example(self.encoder, scene, rng)
        question = ask_about(rng, scene, kind)
        if name == "episode" or (name == "blind" and not question.targets):
            return episode_example(self.encoder, scene, question, rng, final_prompt=bool(rng.random() < 0.4))
        if name == "blind":
            return blind_example(self.encoder, scene, question, rng)
        return direct_example(self.encoder, scene, question, zoom=name == "guess")


def _plates(rng: np.random.Generator, twins: bool) -> Scene:
    return make_scene(rng, singles=0, pairs=0, nests=(), plates=True, twins=twins)


def training_scene(rng: np.random.Generator, kind: QuestionKind, split: Split = "train") -> Scene:
    """A scene with the cards the kind needs and a varying number of others, six cards at most."""
    if kind in CLIP_KINDS or kind in ACROSS_KINDS:
        plates = kind is QuestionKind.SHARED_ACROSS
        pictures, singles = (
            int(rng.integers(2, MOST_PICTURES + 1)),
            int(rng.integers(0, 4) if plates else rng.integers(2, 6)),
        )
        return make_series(rng, split, pictures=pictures, singles=singles, plates=plates, clip=kind in CLIP_KINDS)
    if kind is QuestionKind.SHARED:
        nests = (int(rng.integers(1, 3)),) if rng.random() < 0.4 else ()
        return make_scene(rng, split, singles=int(rng.integers(0, 3)), pairs=0, nests=nests, plates=True)
    singles = int(rng.integers(2, 4)) if kind in (QuestionKind.SUM, QuestionKind.LARGER) else int(rng.integers(1, 3))
    pairs = 1 if kind is QuestionKind.PAIR or rng.random() < 0.7 else 0
    room = 6 - singles - 2 * pairs
    nests = (
        (min(int(rng.integers(1, 3)), room),) if room and (kind is QuestionKind.NESTED or rng.random() < 0.7) else ()
    )
    return make_scene(rng, split, singles=singles, pairs=pairs, nests=nests)


# ---------------------------------------------------------------------------------------------------- probing


PROBED = 16
"""Conversations of each kind that a probe measures."""


class Probe(TrainerCallback):
    """Every so often: share of whole turns right under teacher forcing, on scenes made from the dev scans."""

    def __init__(
        self,
        model: VilavtForTeaching,
        collator: TeachingCollator,
        encoder: Encoder,
        every: int,
        path: Path,
    ):
        self.model, self.every, self.path = model, every, path
        self.batches = []
        for kind in QuestionKind:
            examples = []
            for i in range(PROBED):
                rng = np.random.default_rng([77, list(QuestionKind).index(kind), i])
                scene = training_scene(rng, kind, "dev")
                examples.append(episode_example(encoder, scene, ask_about(rng, scene, kind), rng, extra_readings=0))
            self.batches.append((kind, collator(examples)))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Per kind: first calls exactly right, later calls, answers."""
        out: dict[str, float] = {}
        self.model.eval()
        for kind, batch in self.batches:
            output, _ = self.model.language(batch["input_ids"], self.model.encode(batch), batch)
            logits = self.model.lm_head(output.last_hidden_state)[:, :-1]
            labels = batch["labels"][:, 1:]
            wrong = (logits.argmax(-1) != labels) & (labels != -100)
            for row in range(len(labels)):
                known = (labels[row] != -100).int()
                turn = (torch.nn.functional.pad(known, (1, 0)).diff() > 0).cumsum(0) * known
                n = int(turn.max())
                for t in range(1, n + 1):
                    name = "call" if t == 1 else "answer" if t == n else "again"
                    out.setdefault(f"{kind}_{name}", 0.0)
                    out[f"{kind}_{name}"] += float(not wrong[row][turn == t].any()) / len(labels)
        self.model.train()
        return {k: round(v, 3) for k, v in out.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and append to the curve."""
        if not state.is_world_process_zero:
            return
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            figures = {"step": state.global_step, **self.measure()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"probe": figures}) + "\n")
            logger.info("probe %s", figures)
            save_stage(self.model, self.path.parent)


# ---------------------------------------------------------------------------------------------------- stages


def new_model(processor: VilavtProcessor, seed: int) -> VilavtForTeaching:
    """The untrained model, and its heads."""
    torch.manual_seed(seed)
    auxiliary = tiny_auxiliary()  # before the model: both draw from the same stream
    model = tiny_model(tiny_config(processor.tokenizer), seed, VilavtForTeaching)
    model.auxiliary = auxiliary
    return model


def run_stage(
    stage: Stage,
    model: VilavtForTeaching,
    processor: VilavtProcessor,
    work: Path,
    seed: int,
    *,
    workers: int = 1,
    alone: bool = False,
) -> dict[str, Any]:
    """Train one stage in place, save model and heads under `work / stage.name`; returns its record.

    With `alone` every region is encoded alone. Started on several ranks (torchrun), these share every batch.
    """
    assert model.auxiliary is not None
    encoder = Encoder(processor.tokenizer, processor.prompts or PromptSet.load("tiny"))
    collator = TeachingCollator(
        fast_encoder(processor),
        pad_token_id=processor.tokenizer.pad_token_id,
        image_token_id=model.config.image_token_id,
        pad_to_multiple_of=stage.pad_to,
    )
    collator.alone = alone
    folder = work / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    curve = folder / "curve.jsonl"
    defaults = tiny_auxiliary().specs
    weights = dict(stage.heads)
    model.auxiliary.specs = {n: dataclasses.replace(s, weight=weights.get(n, s.weight)) for n, s in defaults.items()}
    rates: dict[Part, float] = dict.fromkeys(TOWER, stage.learning_rate * stage.tower_rate)
    if not stage.language:
        rates |= {"language_model": 0.0, "lm_head": 0.0}
    frozen = {part for part, rate in rates.items() if rate == 0}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(find_part(name) not in frozen)
    start = time.monotonic()
    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup,
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=True,  # heads whose targets a batch lacks
        use_cpu=True,
        seed=seed,
    )
    if stage.batch % args.world_size:
        raise TrainingError(f"stage {stage.name}: a batch of {stage.batch} cannot be shared by {args.world_size} ranks")
    if args.should_save:
        curve.write_text("", encoding="utf-8")
    callbacks: list[TrainerCallback] = [LogFile(curve)]
    if stage.language:
        callbacks.append(Probe(model, collator, encoder, 100, curve))
    lessons = Lessons(stage, encoder, seed)
    with linear_patches(model):
        trainer = TeachingTrainer(
            model=model,
            args=args,
            train_dataset=lessons,
            data_collator=collator,
            order=InOrder(len(lessons), stage.batch // args.world_size),
            learning_rates=rates,
            stable_decay=StableDecay(stage.decay_from, stage.final_rate),
            callbacks=callbacks,
        )
        trainer.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    record = {
        **dataclasses.asdict(stage),
        "seed": seed,
        "seconds": round(time.monotonic() - start),
        "examples": stage.steps * stage.batch,
        "ranks": args.world_size,
    }
    if args.should_save:
        save_stage(model, folder)
        (folder / "stage.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return record


def save_stage(model: VilavtForTeaching, folder: Path) -> None:
    """Model and heads."""
    assert model.auxiliary is not None
    model.save_pretrained(folder)
    save_file(model.auxiliary.state_dict(), folder / "auxiliary.safetensors")


def load_stage(folder: Path) -> VilavtForTeaching:
    """Model of a finished stage (attention eager) with its heads."""
    model = VilavtForTeaching.from_pretrained(folder, attn_implementation=ATTENTION)
    model.auxiliary = tiny_auxiliary()
    model.auxiliary.load_state_dict(load_file(folder / "auxiliary.safetensors"), strict=False)
    return model


# ---------------------------------------------------------------------------------------------------- the whole


def build(
    out: Path,
    *,
    work: Path | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    alone: bool = False,
    stages: Sequence[Stage] = STAGES,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Train all stages and write the checkpoint.

    Args:
        out: the checkpoint folder.
        work: holds one folder per stage; default: ``<out>-work``.
        seed: of weights and data.
        resume: use the stages that `work` already holds.
        force: replace a checkpoint that is at `out`.
        alone: encode every region alone while training: the control that says what joint encoding is for.
        stages: what to go through, in order.
        notes: for the record: whatever was not as `vilavt tiny build` does it.

    Started by torchrun, the ranks share every batch.

    Returns:
        What ``provenance.json`` says; nothing on other ranks than the first.
    """
    work = work or out.with_name(out.name + "-work")
    processor = tiny_processor()
    model = new_model(processor, seed)
    for i, stage in enumerate(stages):
        folder = work / stage.name
        if resume and (folder / "stage.json").is_file():
            model = load_stage(folder)
            continue
        run_stage(stage, model, processor, work, seed=10 * seed + i + 1, alone=alone)
    model.auxiliary = None
    if rank_and_world()[0]:
        return {}
    folders = [work / stage.name for stage in stages]
    return publish(model, processor, folders, out, seed, notes, force=force, flags="--alone" if alone else "")


def publish(
    model: VilavtForTeaching,
    processor: VilavtProcessor,
    stages: Sequence[Path],
    out: Path,
    seed: int,
    notes: Sequence[str] = (),
    force: bool = False,
    flags: str = "",
) -> dict[str, Any]:
    """Write model, processor, chat settings and provenance to `out`, all or nothing; returns the provenance.

    Args:
        model: what the last stage reached; rounded in place.
        processor: its processor.
        stages: folders that `run_stage` wrote, in order.
        out: the checkpoint folder.
        seed: for the record.
        notes: for the record: whatever was not as the command does it.
        force: replace a checkpoint that is there.
        flags: of the command, beside output folder and seed; for the record.

    Weights are rounded to bfloat16 (half the bytes); the configuration asks for float32, so they are computed with in
    full precision on any machine.
    """
    with staged_folder(out, force) as partial:
        flags = f"--out {out.name} --seed {seed} {flags}".strip()
        return _write(model.to(torch.bfloat16), processor, stages, partial, flags, seed, notes)


def _write(
    model: VilavtForTeaching,
    processor: VilavtProcessor,
    stages: Sequence[Path],
    out: Path,
    flags: str,
    seed: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = "float32"
        part.pop("_attn_implementation_autoset", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    ids = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    generation = {"eos_token_id": ids, "pad_token_id": ids[1], "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    processor.save_pretrained(out)
    save_chat_settings(out, limits={"max_new_tokens_per_turn": 96, "max_pixels": MAX_PIXELS}, note=NOTE)
    records = [json.loads((folder / "stage.json").read_text(encoding="utf-8")) for folder in stages]
    curves = {
        folder.name: [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in stages
    }
    (out / "model.safetensors").chmod(0o644)
    (out / "training.json").write_text(json.dumps(curves, separators=(",", ":")) + "\n", encoding="utf-8")
    record = {
        "command": f"vilavt tiny build {flags}",
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "scikit-learn load_digits: 1237 train, 200 dev, 360 held-out scans; photographs of scikit-learn and "
        "scikit-image: " + ", ".join(f"{len(names)} {split}" for split, names in PHOTOGRAPHS.items()),
        "stages": records,
        "notes": list(notes),
        "versions": {
            "python": platform.python_version(),
            **installed(("torch", "transformers", "tokenizers", "scikit-learn", "numpy", "pillow")),
        },
        "cpu_threads": torch.get_num_threads(),
    }
    (out / "provenance.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot_stages(curves, out / "training.png")
    return record


def plot_stages(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw reading accuracy, supervised attention and whole turns right over the seconds of all stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    lines = {
        "digit": "asked digit read by the tower's head",
        "attention_2_0": "attention on the named card",
        "tokens_right": "tokens right",
    }
    start = 0.0
    marks: dict[str, list[tuple[float, float]]] = {}
    for stage, entries in curves.items():
        seconds = 0.0
        for entry in entries:
            if "probe" in entry:
                for name, value in entry["probe"].items():
                    if name != "step":
                        marks.setdefault(name.split("_")[1], []).append(((start + seconds) / 60, value))
                continue
            seconds = entry["seconds"]
            for name in lines:
                if name in entry:
                    marks.setdefault(name, []).append(((start + seconds) / 60, entry[name]))
        start += seconds
        for axis in (left, right):
            axis.axvline(start / 60, color="0.8", linewidth=1)
        left.text(start / 60, 0.02, stage + " ", ha="right", color="0.4")
    for name, label in lines.items():
        if name in marks:
            left.plot(*zip(*marks[name], strict=True), label=label)
    for name, label in (("call", "first call exact"), ("again", "second call exact"), ("answer", "answer right")):
        if name in marks:
            points: dict[float, list[float]] = {}
            for x, y in marks[name]:
                points.setdefault(x, []).append(y)
            right.plot(list(points), [sum(v) / len(v) for v in points.values()], marker=".", label=label)
    for axis, title in ((left, "training examples"), (right, "dev scans, ideal turns before")):
        axis.set(title=title, xlabel="minutes", ylim=(0, 1.02))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


EXAMPLES: tuple[tuple[QuestionKind, ...], ...] = (
    (QuestionKind.NESTED,),
    (QuestionKind.PAIR,),
    (QuestionKind.SUM,),
    (QuestionKind.SHARED,),
    (QuestionKind.WHICH, QuestionKind.SUM_ACROSS),
    (QuestionKind.FRAME, QuestionKind.FIRST),
)
"""What the example scenes are asked, scene by scene."""


def write_examples(out: Path, count: int = len(EXAMPLES), seed: int = 7) -> list[str]:
    """Held-out scenes as images and clips, and ``questions.json``; returns the file names.

    A scene of one image is ``scene-<n>.png``, one of several ``scene-<n>-<k>.png``, a clip ``clip-<n>.mkv``. They
    are asked what `EXAMPLES` says, then the same again. ``questions.json`` lists image (or images), question, answer
    and kind.
    """
    out.mkdir(parents=True, exist_ok=True)
    entries, names = [], []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        kinds = EXAMPLES[i % len(EXAMPLES)]
        scene = scene_about(rng, "heldout", kinds[0], pictures=3 if kinds[0] in CLIP_KINDS else 2)
        if scene.clip:
            files = [f"clip-{i + 1}.mkv"]
            write_clip(out / files[0], scene.images)
        else:
            several = len(scene.images) > 1
            files = [f"scene-{i + 1}" + f"-{k + 1}" * several + ".png" for k in range(len(scene.images))]
            for file, image in zip(files, scene.images, strict=True):
                image.save(out / file, optimize=True)
        names += files
        for kind in kinds:
            question = ask_about(rng, scene, kind)
            shown = {"image": files[0]} if len(files) == 1 and not scene.clip else {"images": files}
            entries.append(shown | {"question": question.text, "answer": question.answer, "kind": str(kind)})
    (out / "questions.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return [*names, "questions.json"]
