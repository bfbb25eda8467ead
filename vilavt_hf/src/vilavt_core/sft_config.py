"""The one schema of a training run: what ``vilavt sft CONFIG.yaml`` reads. Unknown keys are refused."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .architecture import PARTS, Part
from .data.dataset import OverLong
from .data.registry import DataSource, Registry
from .data.rendering import QWEN_SYSTEM, Labels
from .errors import EpisodeError, TrainingError
from .protocol import Rules
from .regions import MIN_PIXELS
from .settings import ChatSettings
from .shipped import find_recipe, recipe_names
from .spelling import did_you_mean
from .validation import problems
from .yaml_config import parse_change, read_keys, set_key

LossMean = Literal["tokens", "micro_batch"]
SHARDED = ("fsdp2", "zero3")
"""Strategies under which no rank holds the whole model."""
Schedule = Literal["cosine", "linear", "constant", "stable_decay"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class ModelConfig(_Section):
    """What is trained."""

    path: str = Field(description="checkpoint folder or hub id; `vilavt init` makes one from a Qwen2.5-VL")
    attention: Literal["auto", "sdpa", "flash_attention_2", "flash_attention_3", "eager"] = Field(
        default="auto",
        description="of language model and tower; auto: SDPA, and torch's variable-length kernel for packs on CUDA",
    )
    frozen: tuple[Part, ...] = Field(
        default=("text_encoder",),
        description=f"parts without gradient, out of {', '.join(PARTS)}; the published recipe also freezes text_proj",
    )
    gradient_checkpointing: bool = Field(default=True, description="recompute activations in the backward pass")
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="of the computation; weights and optimiser states are fp32 in any case"
    )


class LoraSettings(_Section):
    """Low-rank adapters on the language model, through peft; everything else is frozen then."""

    rank: int = Field(default=64, ge=1, description="rank of the update")
    alpha: float = Field(default=128, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the adapters' input")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers of each block of the language model",
    )
    quantize: Literal["int8", "int4"] | None = Field(
        default=None, description="bits of the weights under the adapters (QLoRA), which are frozen; only with ddp"
    )
    merge: bool = Field(default=True, description="also write the merged checkpoint, to merged/, at the end")


class DataConfig(_Section):
    """What it is trained on."""

    use: tuple[str, ...] = Field(min_length=1, description="names of data sets; name%25 takes a quarter of one")
    validation: tuple[str, ...] = Field(
        default=(),
        description="names of data sets to measure the model on now and then, written as in use",
    )
    registry: Path | None = Field(default=None, description="YAML file of data sets of your own")
    root: Path | None = Field(
        default=None, description="folder of the published data sets; wins over the registry's data_root"
    )
    max_length: int = Field(default=24576, ge=16, description="tokens of a sample")
    over_long: OverLong = Field(
        default="drop", description="longer samples: drop, or cut behind the last turn that fits"
    )
    max_pixels: float = Field(default=200704, gt=0, description="pixels of one image, unless the record says otherwise")
    min_pixels: float = Field(default=MIN_PIXELS, gt=0, description="smaller images are enlarged to this many pixels")
    labels: Labels = Field(
        default="turn",
        description="turn: what the model samples, <|im_end|> included; turn_and_newline: the published mask, which "
        "also trains the newline after it",
    )
    system: str | None = Field(
        default=QWEN_SYSTEM, description="system turn of published records that have none; null for no system turn"
    )
    image_rules: Rules = Field(default="strict", description="published: leave the EXIF orientation unapplied")
    frames: int | None = Field(
        default=None,
        ge=1,
        description="of each video, unless the record says otherwise; default: 32, unless fps is set",
    )
    fps: float | None = Field(default=None, gt=0, description="instead, frames per second of each video")
    preset: str | None = Field(
        default=None, description="how episode records run; default: what the checkpoint asks for"
    )
    max_dropped: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of samples that may be unusable (too long ones aside); more end the run",
    )
    workers: int = Field(default=4, ge=0, description="data loader processes per rank")

    @model_validator(mode="after")
    def _frames(self) -> "DataConfig":
        if self.frames is not None and self.fps is not None:
            raise ValueError(f"frames: {self.frames} and fps: {self.fps:g}; give one of the two")
        return self


class ValidationConfig(_Section):
    """How data.validation is measured."""

    steps: float = Field(
        default=0.1, gt=0, description="steps between validations, or below 1 a fraction of all steps; the last too"
    )
    questions: int | None = Field(
        default=None,
        ge=0,
        description="episodes whose question is asked, greedily, and whose answer is compared; default: 64, or 0 if "
        "parallel.strategy is fsdp2 or zero3, whose shards cannot be asked",
    )
    best: Literal["loss", "answers_right"] = Field(
        default="loss", description="what the checkpoint in best/ is best in"
    )


class InferenceConfig(_Section):
    """How the trained checkpoint is run by whoever names nothing else: its vilavt_chat.json."""

    preset: str | None = Field(default=None, description="default: the preset of training")
    limits: dict[str, float | None] = Field(
        default={},
        description="limits that differ from those of training, as {max_pixels: 6422528} for larger images",
    )


class BatchConfig(_Section):
    """What one step holds. Tokens of a step: ranks x accumulation x micro-batch."""

    packing: bool = Field(
        default=True, description="pack samples into one row of block-diagonal attention instead of padding"
    )
    pack_tokens: int | None = Field(default=None, ge=16, description="tokens of a pack; default: data.max_length")
    samples: int = Field(default=1, ge=1, description="samples of a micro-batch without packing")
    accumulation: int = Field(default=4, ge=1, description="micro-batches of a rank per step")
    loss_mean: LossMean = Field(
        default="tokens",
        description="tokens: mean over the labelled tokens of the step, on all ranks; micro_batch: mean of the "
        "micro-batches' means, as published",
    )


class OptimizerConfig(_Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=5e-5, gt=0, description="peak")
    learning_rates: dict[Part, float] = Field(
        default={}, description="peaks of single parts (as in model.frozen), where they differ"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices")
    decay_norms: bool = Field(default=False, description="weight decay on norms as well, as published")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of AdamW")
    epsilon: float = Field(default=1e-8, gt=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    schedule: Schedule = Field(
        default="cosine",
        description="cosine, linear, constant, or stable_decay (constant, then linear), after a linear warm-up",
    )
    decay_from: float = Field(
        default=0.6, ge=0, le=1, description="of stable_decay: fraction of the steps where it starts"
    )
    final_rate: float = Field(
        default=0.03, ge=0, le=1, description="of stable_decay: last rate, as a fraction of the peak"
    )
    warmup: float = Field(default=0.03, ge=0, description="steps, or below 1 a fraction of all steps")
    epochs: float = Field(default=3, gt=0, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="stop after this many steps, whatever epochs says")


class ParallelConfig(_Section):
    """How ranks share the work; start them with torchrun."""

    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = Field(
        default="ddp",
        description="ddp: copies; fsdp2, zero2, zero3: shards, through accelerate, with the shipped settings",
    )
    settings: Path | None = Field(default=None, description="JSON file instead of the shipped settings of the strategy")
    timeout: int = Field(default=7200, ge=1, description="seconds that ranks wait for one another")
    cpu: bool = Field(default=False, description="stay off the GPUs")


class OutputConfig(_Section):
    """What is written."""

    folder: Path = Field(description="of the run: checkpoint-<step>/, final/, best/, log.jsonl, …")
    save_steps: float = Field(
        default=300, gt=0, description="steps between checkpoints, or below 1 a fraction of all steps"
    )
    keep: int | None = Field(default=4, ge=1, description="checkpoints that are kept; null keeps all")
    resume: Literal["auto", "never"] | Path = Field(
        default="auto", description="auto: go on from the last whole checkpoint in the folder; or a checkpoint"
    )
    final_dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="of the weights in final/")
    log_steps: int = Field(default=1, ge=1, description="steps between log lines")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="tensorboard, wandb, trackio, beside the console and log.jsonl; they must be installed"
    )
    run_name: str | None = Field(default=None, description="name there")


class SftConfig(_Section):
    """A training run."""

    model: ModelConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    inference: InferenceConfig = InferenceConfig()
    lora: LoraSettings | None = Field(default=None, description="train adapters instead of the weights")
    parallel: ParallelConfig = ParallelConfig()
    output: OutputConfig
    seed: int = Field(default=0, ge=0, description="of data order, samples drawn and new weights")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "SftConfig":
        """Read a YAML file.

        Args:
            path: the file, or the name of a recipe; relative paths in it start at the current folder, as on the command
                line.
            overrides: ``section.key=value``, values as in YAML.

        Raises:
            TrainingError: the file cannot be read, or a key is unknown or has a wrong value; names all of them.
        """
        found = find_recipe(path) or Path(path)
        if not found.is_file():
            known = ", ".join(recipe_names())
            hint = did_you_mean(found, recipe_names())
            raise TrainingError(f"{found}: there is no such file; check the path, or name a recipe: {known}{hint}")
        path = found
        values = read_keys(path, TrainingError)
        for override in overrides:
            key, value = parse_change(override, TrainingError, "section.key=value, as optimizer.learning_rate=1e-5")
            set_key(values, key, value, TrainingError)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            found_problems = problems(error, known=[*cls.model_fields, *(key for key, _, _ in describe())])
            raise TrainingError(f"{path}: {found_problems}; `vilavt sft --keys` lists all keys") from None

    @model_validator(mode="after")
    def _used(self) -> Self:
        """Refuse what differs from its default and is left without effect by another key."""
        usual = OptimizerConfig()
        undecayed = self.optimizer.schedule != "stable_decay"
        unheard = {
            "batch.samples": self.batch.packing and self.batch.samples > 1,
            "batch.pack_tokens": self.batch.pack_tokens is not None and not self.batch.packing,
            "optimizer.decay_from": undecayed and self.optimizer.decay_from != usual.decay_from,
            "optimizer.final_rate": undecayed and self.optimizer.final_rate != usual.final_rate,
            "parallel.settings": self.parallel.settings is not None and self.parallel.strategy == "ddp",
        }
        because = {
            "batch.samples": "batch.packing=true fills packs of batch.pack_tokens",
            "batch.pack_tokens": "batch.packing=false pads batch.samples; set it to null",
            "optimizer.decay_from": f"optimizer.schedule is {self.optimizer.schedule}, not stable_decay",
            "optimizer.final_rate": f"optimizer.schedule is {self.optimizer.schedule}, not stable_decay",
            "parallel.settings": "parallel.strategy is ddp, which has none",
        }
        if found := [f"{key} has no effect: {because[key]}" for key, is_unheard in unheard.items() if is_unheard]:
            raise ValueError("; ".join(found))
        return self

    @model_validator(mode="after")
    def _quantised_is_whole(self) -> Self:
        if self.lora is not None and self.lora.quantize is not None and self.parallel.strategy != "ddp":
            raise ValueError(
                f"lora.quantize is {self.lora.quantize}, but parallel.strategy is {self.parallel.strategy}, which "
                "cannot share such weights out: use ddp, or set lora.quantize to null"
            )
        return self

    @model_validator(mode="after")
    def _answers_are_asked(self) -> Self:
        if self.validation.questions and self.parallel.strategy in SHARDED:
            raise ValueError(
                f"validation.questions is {self.validation.questions}, but parallel.strategy is "
                f"{self.parallel.strategy}, whose shards cannot be asked: set it to 0, or use ddp or zero2"
            )
        if self.validation.best == "answers_right" and not self.validation_questions:
            raise ValueError("validation.best is answers_right, but no question is asked: see validation.questions")
        return self

    @property
    def validation_questions(self) -> int:
        """Episodes that a validation asks."""
        asked = self.validation.questions
        return (0 if self.parallel.strategy in SHARDED else 64) if asked is None else asked

    def chat_settings(self, base: ChatSettings | None) -> tuple[ChatSettings, ChatSettings]:
        """How the run trains, and how what it trains is run by whoever names nothing else.

        Args:
            base: of the checkpoint that it starts from.

        Raises:
            TrainingError: a preset or a limit is unknown, or cannot be.
        """
        low, high = min(self.data.min_pixels, self.data.max_pixels), self.data.max_pixels
        pixels = {"min_pixels": low, "max_pixels": high}
        trained = (base or ChatSettings()).changed(self.data.preset, {k: _whole(v) for k, v in pixels.items()})
        wanted = self.inference
        later = trained.changed(wanted.preset, {k: _whole(v) for k, v in wanted.limits.items()})
        for section, settings in (("data", trained), ("inference", later)):
            try:
                settings.apply()
            except EpisodeError as error:
                raise TrainingError(f"{section}: {error}") from None
        return trained, later

    @property
    def pack_tokens(self) -> int:
        """Tokens of a pack."""
        return self.batch.pack_tokens or self.data.max_length


def _whole(value: float | None) -> float | int | None:
    """Pixels and counts that are whole, as whole numbers."""
    return int(value) if value is not None and float(value).is_integer() else value


def find_sources(data: DataConfig, names: Sequence[str] | None = None) -> list[DataSource]:
    """The data sets that a run uses.

    Args:
        data: of the run.
        names: which; None: those it trains on.

    Raises:
        DataError: an unknown name, or a file that is not there.
    """
    registry = Registry() if data.registry is None else Registry.load(data.registry)
    if data.root is not None:
        registry = registry.model_copy(update={"data_root": data.root})
    return [registry.find(name) for name in (data.use if names is None else names)]


def describe(section: type[BaseModel] = SftConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and description of every field, depth first; what must be given has the default ``required``."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = _inner_section(field.annotation)
        if inner is None or field.description:
            default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
            yield key, default, field.description or ""
        if inner is not None:
            yield from describe(inner, f"{key}{_MANY.get(get_origin(field.annotation), '')}.")


_MANY: Mapping[Any, str] = {dict: ".NAME", list: "[]", tuple: "[]"}
"""Written behind a key that holds several sections."""


def _inner_section(annotation: Any) -> type[BaseModel] | None:
    choices = getattr(annotation, "__args__", (annotation,))
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _shown(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()
