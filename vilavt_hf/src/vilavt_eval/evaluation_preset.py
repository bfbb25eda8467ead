"""Presets of an evaluation: versioned YAML files with everything that changes a score besides checkpoint and benchmark.

A file is complete: it names every limit and every sampling setting, so that what it means does not change with the
package. Only what is off unless it is set (its default is None) may be left out, so that a file outlives new limits.
``episode`` is the name of a preset of `vilavt_core.presets`, which says how turns are read and what a bad
call leads to; those are rules in code, versioned with the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vilavt_core.backends import BackendOptions
from vilavt_core.errors import EvaluationError
from vilavt_core.images import BENCHMARK_IMAGES
from vilavt_core.presets import PRESETS, Limits, Preset, Sampling
from vilavt_core.spelling import did_you_mean, meant
from vilavt_core.validation import problems
from vilavt_core.yaml_config import read_keys

FOLDER = Path(__file__).parent / "presets"
"""The files that come with the package."""

_PARTS: Mapping[str, type] = {"limits": Limits, "sampling": Sampling}


class EvaluationPreset(BaseModel):
    """One way to evaluate; unknown keys are refused, and none may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$", description="of its result files; default: the file's own")
    version: int = Field(ge=1, description="counted up whenever the file changes what it measures")
    description: str = Field(description="where its values come from")
    episode: str = Field(description="how turns are read and bad calls answered: a preset of `vilavt_core.presets`")
    sampling: Sampling = Field(description="how tokens are drawn; temperature 0 is greedy")
    limits: Limits = Field(description="budgets of a conversation, pixels included; a checkpoint's own are tighter")
    query_prefix: str = Field(description="put before every non-blank query")
    interleave: bool = Field(
        description="whether <image> marks in a question are where its images stand; else they are text"
    )
    prompts: str | None = Field(description="wording: a prompt set's name or folder; null: the checkpoint's own")
    prompts_sha256: str | None = Field(description="hash the wording must have; null: any, it is recorded")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        description="of the weights; auto: the checkpoint's own"
    )
    seeds: Literal["per_question", "per_run"] = Field(
        description="per_question: every question draws from a seed of its own, made of the run's seed and its id; "
        "per_run: all draw from the run's seed"
    )
    set_limits: tuple[str, ...] = Field(
        default=(), description="limits that were set by hand; they win over the checkpoint's own"
    )

    @field_validator("limits", "sampling", mode="before")
    @classmethod
    def _complete(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Mapping):
            known = {f.name: f.default for f in fields(_PARTS[str(info.field_name)])}
            needed = {name for name, default in known.items() if default is not None}
            for problem, names in (("unknown", set(value) - set(known)), ("missing", needed - set(value))):
                if names:
                    hint = meant(names, known) if problem == "unknown" else ""
                    raise ValueError(f"{problem} {', '.join(sorted(map(str, names)))}{hint}")
        return value

    @field_validator("episode")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(
                f"no episode preset {value!r}; known are {', '.join(PRESETS)}{did_you_mean(value, PRESETS)}"
            )
        return value

    @classmethod
    def load(cls, name: str | Path, changes: Mapping[str, Any] | None = None) -> Self:
        """Read a preset.

        Args:
            name: of a file that comes with the package, or the path of a YAML file.
            changes: fields, also of the limits and of the sampling, that shall differ.

        Raises:
            EvaluationError: no such preset, or one of its keys is unknown, missing or wrong; names the file.
        """
        path = FOLDER / f"{name}.yaml"
        if not path.is_file():
            path = Path(name)
        if not path.is_file():
            raise EvaluationError(
                f"no preset {str(name)!r}; known are {', '.join(known_presets())}, or give the path of a YAML file"
                f"{did_you_mean(name, known_presets())}"
            )
        data = {"name": path.stem} | read_keys(path, EvaluationError)
        return cls._checked(data, str(path)).changed(changes or {})

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """With some fields changed; those of `Limits` and `Sampling` go by their own names.

        Raises:
            EvaluationError: names the field.
        """
        data = self.model_dump()
        fixed = {"name", "version", "description", "set_limits", *_PARTS}
        for name, value in changes.items():
            part = next((part for part, kind in _PARTS.items() if name in {f.name for f in fields(kind)}), None)
            if part is not None:
                data[part][name] = value
            elif name in data and name not in fixed:
                data[name] = value
            else:
                known = [n for n in data if n not in fixed] + [f.name for k in _PARTS.values() for f in fields(k)]
                raise EvaluationError(
                    f"a preset has no {name!r} to set; it has {', '.join(known)}{did_you_mean(name, known)}"
                )
            if part == "limits":
                data["set_limits"] = (*data["set_limits"], name)
        return self._checked(data, "--set")

    @classmethod
    def _checked(cls, data: Mapping[str, Any], where: str) -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise EvaluationError(f"{where}: {problems(error, known=list(cls.model_fields))}") from None

    def of_episode(self) -> Preset:
        """How episodes run."""
        return replace(
            PRESETS[self.episode],
            limits=self.limits,
            sampling=self.sampling,
            query_prefix=self.query_prefix,
            interleave=self.interleave,
        )

    def options(self, **more: Any) -> BackendOptions:
        """What a backend is opened with; `more` are further fields of `BackendOptions`.

        Limits that were set by hand win over the checkpoint's own, the checkpoint's over this preset's.
        """
        return BackendOptions(
            preset=self.of_episode(),
            limits={name: getattr(self.limits, name) for name in self.set_limits},
            sampling=asdict(self.sampling),
            prompts=self.prompts,
            dtype=self.precision,
            image_limits=BENCHMARK_IMAGES,
            **more,
        )


def known_presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
