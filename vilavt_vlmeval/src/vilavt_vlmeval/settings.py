"""How the model is run: from a ``--config`` file or the model's name, else from the environment, else by default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, create_model

from vilavt_core.backends import BackendOptions, names_server
from vilavt_core.images import BENCHMARK_IMAGES
from vilavt_core.json_text import parse_json
from vilavt_core.presets import Limits, Sampling, optional_fields
from vilavt_core.shipped import shipped
from vilavt_core.sources import Video
from vilavt_core.spelling import did_you_mean
from vilavt_core.validation import problems

from .errors import SettingsError

PREFIX = "VILAVT_VLMEVAL_"
"""Of environment variables: this and the name of the setting in capitals."""

ELSEWHERE = ("AUTOLOAD",)
"""Variables with our prefix that are no settings; see `_autoload`."""


def _parsed(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) else value


_Overrides = create_model("_Overrides", **optional_fields(Limits), **optional_fields(Sampling))


class AdapterSettings(_Overrides):  # type: ignore[valid-type, misc]
    """These settings and the fields of `Limits` and `Sampling`; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    checkpoint: Literal["rl", "sft", "tiny"] = Field(
        "rl", description="`rl`, `sft` (at the paths below) or `tiny` (shipped); our model names say it themselves"
    )
    model_path: str | None = Field(None, description="checkpoint folder or hub id of `ViLaVT-7B` and `ViLaVT-7B-vLLM`")
    sft_model_path: str | None = Field(None, description="checkpoint folder or hub id of `ViLaVT-SFT-7B`")
    backend: str = Field("hf", description="`hf` (transformers), `vllm`, or the URL of a running `vilavt-serve`")
    preset: str | None = Field(
        None, description="how conversations run: `default`, `rl`, `eval-vllm`, `eval-hf`, `vlmevalkit`"
    )
    prompts: str | None = Field(None, description="wording: a prompt set's name or folder")
    seed: int = Field(0, description="every sample's own seed is made from this and its id")
    dtype: str = Field("auto", description="of the weights")
    device: str = Field("auto", description="with `hf`; under torchrun every rank takes its own GPU")
    engine: Annotated[dict[str, Any], BeforeValidator(_parsed)] = Field(
        default_factory=dict,
        description="JSON, for what computes: `from_pretrained`, `vllm.LLM`, or `openai.OpenAI`, e.g. "
        '`{"tensor_parallel_size": 4}`',
    )
    frames: int | None = Field(
        None, ge=1, description="of each video that a benchmark hands over as a file; default: 32, unless `fps` is set"
    )
    fps: float | None = Field(None, gt=0, description="instead, frames per second of such a video")
    video_files: bool = Field(
        False, description="`1`: VLMEvalKit hands over video files, not frames: they keep their size and have times"
    )
    custom_prompts: bool = Field(True, description="`0`: the toolkit's prompt for every benchmark")
    trace_dir: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = Field(
        Path("vilavt_traces"), description="folder of the traces, made if missing; empty: no traces, no resuming"
    )
    resume: bool = Field(True, description="`0`: ask again what the traces already answer")

    @classmethod
    def resolve(cls, given: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Self:
        """Settings that were `given`, completed from the environment.

        Raises:
            SettingsError: names the setting, and where it came from.
        """
        found = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environment.items()
            if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in ELSEWHERE
        }

        def label(place: tuple[Any, ...]) -> str:
            name = str(place[0])
            return repr(name) if name in given else PREFIX + name.upper()

        values = {**found, **given}
        if unknown := [name for name in values if name not in cls.model_fields]:
            hint = did_you_mean(unknown[0], cls.model_fields)
            raise SettingsError(
                f"unknown setting {label((unknown[0],))}; known are {', '.join(cls.model_fields)}{hint}"
            )
        try:
            settings = cls(**values)
        except ValidationError as error:
            raise SettingsError(problems(error, name=label, values=True)) from None
        if settings.frames is not None and settings.fps is not None:
            names = f"{label(('frames',))} is {settings.frames} and {label(('fps',))} is {settings.fps:g}"
            raise SettingsError(f"{names}; give one of the two")
        return settings

    @property
    def video(self) -> Video:
        """Which frames are taken of a video of which a benchmark says nothing."""
        return Video("", self.frames, self.fps)

    @property
    def path(self) -> str:
        """The checkpoint, or the server's URL.

        Raises:
            SettingsError: it is not named.
        """
        if names_server(self.backend):
            return self.backend
        if self.checkpoint == "tiny":
            return str(shipped("vilavt-tiny"))
        name = "sft_model_path" if self.checkpoint == "sft" else "model_path"
        value: str | None = getattr(self, name)
        if not value:
            raise SettingsError(
                f"no checkpoint: set {PREFIX}{name.upper()} to a folder or hub id, or {name!r} in the --config file"
            )
        return value

    @property
    def backend_name(self) -> str:
        """``hf``, ``vllm`` or ``server``."""
        return "server" if names_server(self.backend) else self.backend

    def options(self) -> BackendOptions:
        """For `vilavt_core.backends.open_backend`."""
        return BackendOptions(
            preset=self.preset,
            prompts=self.prompts,
            seed=self.seed,
            limits=self._set(Limits),
            sampling=self._set(Sampling),
            dtype=self.dtype,
            device=self.device,
            engine=self.engine,
            image_limits=BENCHMARK_IMAGES,
        )

    def _set(self, kind: type) -> dict[str, Any]:
        return {name: value for name in [f.name for f in fields(kind)] if (value := getattr(self, name)) is not None}
