"""A training run from its configuration: data measured, model prepared, trained, saved."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.integrations import deepspeed

from vilavt_core.checkpoint import require_vilavt
from vilavt_core.checkpoint.build_info import write_build_info
from vilavt_core.checkpoint.card import CARD, write_card
from vilavt_core.checkpoint.config import set_dtype
from vilavt_core.checkpoint.hub import checkpoint_folder
from vilavt_core.checkpoint.layout import CONFIG
from vilavt_core.checkpoint.writing import replace_folder, write_json
from vilavt_core.curves import draw, read_log
from vilavt_core.data.dataset import Lengths
from vilavt_core.data.order import Order, Packed, Shuffled
from vilavt_core.errors import TrainingError
from vilavt_core.failures import loading
from vilavt_core.json_text import parse_json
from vilavt_core.presets import Limits
from vilavt_core.progress import waiting
from vilavt_core.settings import describe_preset
from vilavt_core.sft_config import SftConfig
from vilavt_core.training_curves import LOG, VALIDATION, TrainingLog, training_panels
from vilavt_core.training_set import make_dataset

from .. import compat
from ..configuration_vilavt import VilavtConfig
from ..processing_vilavt import VilavtProcessor
from ..quantization import quantization_config
from .attention import PACKED
from .collator import VilavtCollator
from .drops import Drops
from .lora import add_adapters, merge_adapter
from .measuring import measure_all
from .reporting import ConsoleReport, LastStep, LogFile, ValidationFile
from .resuming import describe_run, resume_from
from .trainer import StableDecay, VilavtTrainer
from .training_model import VilavtForTraining, freeze
from .validating import Best, Figures, Validation

logger = logging.getLogger(__name__)

FINAL, MERGED, BEST, LOSS, DROPPED = "final", "merged", "best", "loss.png", "dropped.jsonl"
"""What a run leaves in its folder, beside its logs and checkpoints."""


@dataclass(frozen=True)
class RunReport:
    """What came of a run."""

    folder: Path
    """The finished checkpoint, or adapter."""
    steps: int
    samples: int
    """Trained on, per epoch."""
    dropped: dict[str, int]
    """Samples left out, by reason: when they were measured, and when their images turned out to be damaged."""
    cut: int
    last_loss: float | None
    trained_as: str
    """How episodes ran in training."""
    runs_as: str
    """How the checkpoint is run by whoever names nothing else."""
    validations: tuple[dict[str, Any], ...] = ()
    """Lines of ``validation.jsonl``."""
    best: dict[str, Any] | None = None
    """Step and figures of the checkpoint in ``best/``."""

    def summary(self) -> str:
        """In a few lines."""
        loss = "" if self.last_loss is None else f", last loss {self.last_loss:.4f}"
        lines = [f"{self.folder}: {self.steps} steps over {self.samples} samples{loss}"]
        lines += [f"left out: {count} ({kind})" for kind, count in sorted(self.dropped.items())]
        lines += [f"cut at a turn: {self.cut}"] if self.cut else []
        if self.validations:
            first, last = self.validations[0], self.validations[-1]
            lines.append(f"validation: {_told(first)} at step {first['step']}, {_told(last)} at step {last['step']}")
        if self.best is not None:
            lines.append(f"{self.folder.with_name(BEST)}: {_told(self.best)} at step {self.best['step']}")
        other = "" if self.runs_as == self.trained_as else f"; trained with {self.trained_as}"
        return "\n".join([*lines, f"unless told otherwise it runs with {self.runs_as}{other}"])


def _told(figures: Mapping[str, Any]) -> str:
    return str(Figures(**{f.name: figures[f.name] for f in fields(Figures) if f.name in figures}))


class Run:
    """A run that is ready to train: data measured, model loaded, order settled.

    Make it on every rank of a distributed run, with the same configuration.

    Raises:
        TrainingError: the run cannot start; says what to change.
        DataError: a data set is not there.
        CheckpointError: the model is incomplete.
    """

    def __init__(self, config: SftConfig):
        self.config = config
        args = _arguments(config)
        set_seed(config.seed)
        self.out = config.output.folder
        first = args.process_index == 0
        base = checkpoint_folder(config.model.path)
        require_vilavt(base)
        if config.model.attention != "auto":
            compat.require_attention(config.model.attention)
        self.processor = VilavtProcessor.from_pretrained(base)
        self.trained_as, self.runs_as = config.chat_settings(self.processor.chat_settings)
        self.processor.chat_settings = self.runs_as
        allow_pixels(self.processor, self.runs_as.apply().limits)
        dataset = make_dataset(config, base, self.processor.tokenizer)
        self.out.mkdir(parents=True, exist_ok=True)
        self.lengths = measure_all(dataset, workers=config.data.workers, cache=self.out / "cache", progress=first)
        order = _order(config, self.lengths)
        self.record = describe_run(config, base, self.lengths, order, args)
        self.resume = resume_from(config, self.record)
        collate = VilavtCollator(
            self.processor.encode_inquiries,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            image_token_id=self.processor.image_token_id,
            merge_size=self.processor.image_processor.merge_size,
            packed=config.batch.packing,
        )
        self.validation = self._validation(base, collate, first)
        self.best: Best | None = None
        if self.validation is not None:
            measured = self.validation.digest
            self.best = Best(self.out / BEST, config.validation.best, measured, resumed=self.resume is not None)
        self.drops = Drops(config, dataset, self.lengths, self.out / DROPPED, first, keep=self.resume is not None)
        with waiting(f"loading {base.name}", shown=first):
            model = _model(config, base, args.device)
        self.console = ConsoleReport()
        self.trainer = VilavtTrainer(
            model=model,
            args=args,
            train_dataset=dataset,  # type: ignore[arg-type]
            eval_dataset=None if self.validation is None else self.validation.dataset,  # type: ignore[arg-type]
            data_collator=collate,
            processing_class=self.processor,  # type: ignore[arg-type]
            callbacks=[
                LogFile(self.out / LOG),
                ValidationFile(self.out / VALIDATION),
                self.console,
                LastStep(),
                self.drops,
            ],
            order=order,
            learning_rates=config.optimizer.learning_rates,
            stable_decay=_stable_decay(config),
            loss_mean=config.batch.loss_mean,
            decay_norms=config.optimizer.decay_norms,
            validate=self._validate if self.validation is not None else None,
            record=self.record,
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.on_dropped = self.drops.untold.append

    def _validation(self, base: Path, collate: VilavtCollator, first: bool) -> Validation | None:
        names = self.config.data.validation
        if not names:
            return None
        return Validation(
            self.config,
            make_dataset(self.config, base, self.processor.tokenizer, names),
            self.processor,
            collate=collate,
            preset=self.trained_as.apply(),
            make_order=_order,
            cache=self.out / "cache",
            first=first,
        )

    def _validate(self, trainer: VilavtTrainer, model: Any) -> Mapping[str, float]:
        assert self.validation is not None
        assert self.best is not None
        figures = self.validation.figures(trainer, model, self.console.counting)
        if self.best.improved_by(figures, trainer.state.global_step):
            self._save(BEST, {**self.record, "validation": self.best.record})
        return figures.to_json()

    def _record_of_last_validation(self) -> dict[str, Any]:
        lines = read_log(self.out / VALIDATION) if self.validation is not None else []
        return self.record | ({"validation": lines[-1]} if lines else {})

    def _save(self, name: str, record: Mapping[str, Any]) -> Path:
        dtype = "fp32" if self.config.lora is not None else self.config.output.final_dtype
        return save_final(self.trainer, self.processor, self.out / name, dtype, record)

    def train(self) -> RunReport:
        """Train, save, and say what came of it.

        Raises:
            TrainingError: the run cannot go on, or its way of sharing the model is not available here.
        """
        config, trainer, out = self.config, self.trainer, self.out
        if config.parallel.strategy == "fsdp2" and not trainer.is_fsdp_enabled:
            raise TrainingError("parallel.strategy is fsdp2, but accelerate shards on GPUs only; use ddp here")
        trainer.args.eval_on_start = self.validation is not None and self.resume is None
        trainer.train(resume_from_checkpoint=None if self.resume is None else str(self.resume))
        folder = self._save(FINAL, self._record_of_last_validation())
        lines = read_log(out / LOG)
        if trainer.args.process_index == 0:
            if lines and find_spec("matplotlib"):
                draw(training_panels([(out.name, TrainingLog.read(out))]), out / LOSS)
            if config.lora is not None and config.lora.merge:
                with _whole_models(trainer.args):
                    merge_adapter(folder, _fresh(out / MERGED), base=config.model.path, dtype=config.output.final_dtype)
        trainer.accelerator.wait_for_everyone()
        return RunReport(
            folder=folder,
            steps=trainer.state.global_step,
            samples=len(self.lengths.kept),
            dropped=dict(self.lengths.dropped + Counter(one.kind for one in self.drops.damaged.values())),
            cut=int((self.lengths.cut_from > 0).sum()),
            last_loss=lines[-1]["loss"] if lines else None,
            runs_as=describe_preset(self.runs_as.apply()),
            trained_as=describe_preset(self.trained_as.apply()),
            validations=tuple(read_log(out / VALIDATION)) if self.validation is not None else (),
            best=None if self.best is None else self.best.record,
        )


# ---------------------------------------------------------------------------------------------------- preparation


def _arguments(config: SftConfig) -> TrainingArguments:
    optimizer, output, parallel = config.optimizer, config.output, config.parallel
    for package in output.report_to:
        if find_spec(package) is None:
            raise TrainingError(f"output.report_to names {package}, which is not installed: pip install {package}")
    settings = _parallel_settings(config)
    strategy: dict[str, Any] = {}
    if parallel.strategy == "fsdp2":
        if "LOCAL_RANK" not in os.environ:
            raise TrainingError("parallel.strategy is fsdp2: start the run with torchrun")
        strategy["fsdp"] = settings
    elif parallel.strategy in ("zero2", "zero3"):
        if find_spec("deepspeed") is None:
            raise TrainingError(f'parallel.strategy is {parallel.strategy}: pip install "vilavt-hf[deepspeed]"')
        strategy["deepspeed"] = settings
    bf16 = config.model.precision == "bf16"
    # the configuration decides, not what a launcher or an earlier run of this process left there
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    # read when the model is loaded: the other ranks then leave the weights to the first one
    os.environ["ACCELERATE_USE_FSDP"] = str(parallel.strategy == "fsdp2").lower()
    workers = config.data.workers
    return compat.training_arguments(
        output_dir=str(output.folder),
        num_train_epochs=optimizer.epochs,
        max_steps=optimizer.max_steps or -1,
        per_device_train_batch_size=1 if config.batch.packing else config.batch.samples,
        gradient_accumulation_steps=config.batch.accumulation,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant_with_warmup" if optimizer.schedule in ("constant", "stable_decay")
        else optimizer.schedule,
        warmup=optimizer.warmup,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.epsilon,
        max_grad_norm=optimizer.max_grad_norm,
        bf16=bf16,
        recompute=config.model.gradient_checkpointing,
        seed=config.seed,
        save_strategy="steps",
        save_steps=output.save_steps,
        save_total_limit=output.keep,
        logging_steps=output.log_steps,
        eval_strategy="steps" if config.data.validation else "no",
        eval_steps=config.validation.steps,
        logging_nan_inf_filter=False,
        logging_first_step=True,
        report_to=list(output.report_to),
        run_name=output.run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=2 if workers else None,
        dataloader_pin_memory=torch.cuda.is_available() and not parallel.cpu,
        ddp_find_unused_parameters=False,
        ddp_timeout=parallel.timeout,
        use_cpu=parallel.cpu or not torch.cuda.is_available(),
        **strategy,
    )  # fmt: skip


def _stable_decay(config: SftConfig) -> StableDecay | None:
    optimizer = config.optimizer
    wanted = optimizer.schedule == "stable_decay"
    return StableDecay(optimizer.decay_from, optimizer.final_rate) if wanted else None


def _parallel_settings(config: SftConfig) -> dict[str, Any]:
    parallel = config.parallel
    if parallel.strategy == "ddp":
        return {}
    if parallel.settings is None:
        shipped = resources.files("vilavt_hf.train") / "parallel" / f"{parallel.strategy}.json"
        return json.loads(shipped.read_text(encoding="utf-8"))
    try:
        return parse_json(parallel.settings.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{parallel.settings}: cannot be read: {error}; it must be a JSON object") from None


def _order(config: SftConfig, lengths: Lengths) -> Order:
    if not len(lengths.kept):
        reasons = "; ".join(text for _, text in list(lengths.problems.values())[:3])
        raise TrainingError(f"none of {len(lengths.tokens)} samples can be trained on: {reasons}")
    if config.batch.packing:
        if config.model.attention == "eager":
            raise TrainingError("packs need SDPA or flash attention: change model.attention or batch.packing")
        return Packed(lengths.kept, lengths.tokens, config.pack_tokens, config.seed)
    return Shuffled(lengths.kept, config.batch.samples, config.seed)


def _model(config: SftConfig, base: Path, device: torch.device) -> Any:
    choice = config.model.attention
    plain = "sdpa" if choice == "auto" else choice
    text = PACKED if config.batch.packing and plain == "sdpa" else plain
    stored: dict[str, Any] = {"dtype": torch.float32}
    if config.lora is not None and config.lora.quantize is not None:
        stored = _quantised(config, config.lora.quantize, base, device)
    with loading(config.model.path):
        model = VilavtForTraining.from_pretrained(
            base,
            attn_implementation={"text_config": text, "vision_config": plain, "text_encoder_config": "sdpa"},
            **stored,
        )
    model.config.use_cache = False
    if config.lora is not None:
        return add_adapters(model, config.lora, config.model.path)
    freeze(model, config.model.frozen)
    return model


def _quantised(config: SftConfig, method: str, base: Path, device: torch.device) -> dict[str, Any]:
    """How to load weights that stay as they are: in few bits, the others in the type that computes."""
    settings = quantization_config(method, VilavtConfig.from_pretrained(base), device)
    options: dict[str, Any] = {"quantization_config": settings}
    if device.type != "cpu":
        options["device_map"] = {"": str(device)}  # quantised where they stay
    return options | {"dtype": torch.bfloat16 if config.model.precision == "bf16" else torch.float32}


# ---------------------------------------------------------------------------------------------------- bookkeeping


def allow_pixels(processor: VilavtProcessor, limits: Limits) -> None:
    """Widen the pixel bounds of an image processor where they would keep a checkpoint from its own limits."""
    images = processor.image_processor
    low = min(images.size["shortest_edge"], int(limits.min_pixels))
    high = max(images.size["longest_edge"], int(limits.max_pixels))
    if (low, high) != (images.size["shortest_edge"], images.size["longest_edge"]):
        images.size = type(images.size)(shortest_edge=low, longest_edge=high)
        if getattr(images, "min_pixels", None) is not None:
            images.min_pixels, images.max_pixels = low, high


def save_final(
    trainer: VilavtTrainer,
    processor: VilavtProcessor,
    folder: Path,
    dtype: str,
    record: Mapping[str, Any],
) -> Path:
    """Write the trained model as a complete checkpoint (an adapter run: the adapter); call it on every rank."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.whole_state_dict()
    if trainer.args.should_save:
        target = torch.bfloat16 if dtype == "bf16" else torch.float32
        cast = {name: value.to(target) if value.is_floating_point() else value for name, value in state.items()}
        partial = _fresh(folder.with_name(f"{folder.name}.partial-{os.getpid()}"))
        model.save_pretrained(partial, state_dict=cast)
        processor.save_pretrained(partial)
        if (partial / CONFIG).is_file():
            values = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
            set_dtype(values, str(target).removeprefix("torch."))
            write_json(partial / CONFIG, values)
        write_build_info(partial, {**record, "step": trainer.state.global_step, "epoch": trainer.state.epoch})
        (partial / CARD).unlink(missing_ok=True)  # peft leaves a form to fill in
        write_card(partial)
        replace_folder(partial, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


@contextmanager
def _whole_models(args: TrainingArguments) -> Iterator[None]:
    """Models loaded in here are whole. Under ZeRO-3 transformers shards what it loads, and waits for all ranks to."""
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if (sharding := getattr(args, "hf_deepspeed_config", None)) is not None:
            deepspeed.set_hf_deepspeed_config(sharding)


def _fresh(folder: Path) -> Path:
    """This folder, gone."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
