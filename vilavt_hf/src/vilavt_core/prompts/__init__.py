"""Prompt sets: every sentence the model is given, as template files that a checkpoint can carry.

A set is a folder with one ``<template>.txt`` per name in `TEMPLATES` and a ``prompts.json`` (name, version).
A template is used byte for byte, the line end at its end included. ``$name`` or ``${name}`` is a placeholder,
``$$`` a dollar sign. Substituted values are never scanned again, so a question that contains ``$image`` stays text.
``$image`` marks where the image itself goes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import PromptError
from ..json_text import parse_json
from ..spelling import did_you_mean

FORMAT = 1
"""Version of the folder layout, written to ``prompts.json``."""


@dataclass(frozen=True)
class TemplateInfo:
    """What a template is for, the placeholders it must have and the ones it may have."""

    purpose: str
    needs: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    falls_back_to: str | None = None
    """Name of the template that stands in if a set leaves this one out; None: it must be there."""


def _info(purpose: str, needs: str = "", may: str = "", falls_back_to: str | None = None) -> TemplateInfo:
    return TemplateInfo(purpose, frozenset(needs.split()), frozenset(may.split()), falls_back_to)


TEMPLATES: Mapping[str, TemplateInfo] = MappingProxyType(
    {
        "system": _info("the system turn"),
        "original": _info("one original image and its index line", "image", "index"),
        "original_sized": _info("the same, with the size as shown", "image", "index width height", "original"),
        "frame": _info("one frame of a video and its line", "image", "index time", "original"),
        "frame_sized": _info("the same, with the size as shown", "image", "index time width height", "original_sized"),
        "crop": _info("one crop and its index line, in a tool response", "image", "index width height"),
        "images_one": _info("first line of the question block: one image", "", "width height"),
        "images_many": _info(
            "first line of the question block: several images, one size for all", "", "count last width height"
        ),
        "images_many_unsized": _info(
            "first line of the question block: several images, no size", "", "count last", "images_many"
        ),
        "user": _info("the question block; $images is the first line above", "question", "images"),
        "user_reduced": _info(
            "the question block of the toolkit preset: no heading, fewer rules", "question", "images", "user"
        ),
        "user_raw": _info("the question block when the question comes first and bare", "question", "images", "user"),
        "user_no_zoom": _info(
            "the question block of an episode whose first turn is its last", "question", "images", "fallback_user"
        ),
        "follow_up": _info("a later question in the same conversation", "question"),
        "continue": _info("end of a tool response: go on"),
        "final": _info("end of the last tool response: answer now"),
        "bad_call": _info("begin of a tool response to a call that was refused", "problem"),
        "no_action": _info("begin of a tool response to a turn that neither zoomed nor answered"),
        "images_full": _info("begin of a tool response when no image slot is left", "", "limit"),
        "fallback_system": _info("the system turn of the forced-answer conversation"),
        "fallback_user": _info("the question block of the forced-answer conversation", "question"),
    }
)

_PLACEHOLDER = re.compile(r"\$(?:(\$)|([a-z_]+)|\{([a-z_]+)\}|)")

PromptPart = str | int
"""A piece of a rendered turn: text, or the index of the image that goes here."""


@dataclass(frozen=True)
class PromptSet:
    """All templates of one wording.

    Raises:
        PromptError: on construction, if a template is missing, unknown, or has a wrong placeholder.
    """

    name: str
    templates: Mapping[str, str]
    version: str = "1"
    _sha256: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", MappingProxyType(dict(self.templates)))
        if unknown := sorted(set(self.templates) - set(TEMPLATES)):
            raise PromptError(
                f"prompt set {self.name!r} has unknown templates {unknown}; known are {sorted(TEMPLATES)}"
            )
        missing = [n for n, info in TEMPLATES.items() if n not in self.templates and info.falls_back_to is None]
        if missing:
            raise PromptError(
                f"prompt set {self.name!r} lacks the templates {missing}; add {', '.join(n + '.txt' for n in missing)}"
            )
        for name, text in self.templates.items():
            self._check(name, text)
        canonical = json.dumps([self.name, self.version, sorted(self.templates.items())], ensure_ascii=False)
        object.__setattr__(self, "_sha256", hashlib.sha256(canonical.encode()).hexdigest())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy it by what it is made of: a read-only mapping can be neither."""
        return type(self), (self.name, dict(self.templates), self.version)

    def _check(self, name: str, text: str) -> None:
        info = TEMPLATES[name]
        found = []
        for match in _PLACEHOLDER.finditer(text):
            if match.group() == "$":
                raise PromptError(
                    f"prompt set {self.name!r}, template {name!r}: a bare $ at character {match.start()}; write "
                    "$$ for a dollar sign"
                )
            if not match.group(1):
                found.append(match.group(2) or match.group(3))
        if unknown := sorted(set(found) - info.needs - info.may):
            allowed = sorted(info.needs | info.may)
            raise PromptError(
                f"prompt set {self.name!r}, template {name!r}: unknown placeholders {unknown}; it may use {allowed}"
            )
        if missing := sorted(info.needs - set(found)):
            raise PromptError(f"prompt set {self.name!r}, template {name!r}: placeholders {missing} are missing")
        if found.count("image") > 1:
            raise PromptError(
                f"prompt set {self.name!r}, template {name!r}: $image occurs {found.count('image')} times, it "
                "must occur once"
            )

    @property
    def sha256(self) -> str:
        """Hex digest of name, version and every template; results record it."""
        return self._sha256

    def render(self, template: str, **values: str | int | tuple[PromptPart, ...]) -> tuple[PromptPart, ...]:
        """Fill a template; texts of neighbouring pieces are joined, ``image=<index>`` becomes an ``int`` piece, a
        tuple is pieces.

        Raises:
            PromptError: unknown template name, or a placeholder without a value.
        """
        name = template
        while name not in self.templates:
            stand_in = TEMPLATES[name].falls_back_to if name in TEMPLATES else None
            if stand_in is None:
                raise PromptError(
                    f"prompt set {self.name!r} has no template {template!r}; known are {sorted(TEMPLATES)}"
                )
            name = stand_in
        text, done = self.templates[name], 0
        pieces: list[PromptPart] = []
        for match in _PLACEHOLDER.finditer(text):
            key = match.group(2) or match.group(3)
            pieces.append(text[done : match.start()])
            done = match.end()
            if match.group(1):
                pieces.append("$")
            elif key not in values:
                raise PromptError(f"prompt set {self.name!r}, template {name!r}: no value for ${key}")
            else:
                value = values[key]
                pieces.extend(value if isinstance(value, tuple) else (value if key == "image" else str(value),))
        pieces.append(text[done:])
        return join(pieces)

    def text(self, template: str, **values: str | int) -> str:
        """Fill a template that holds no image."""
        return "".join(str(part) for part in self.render(template, **values))

    def save(self, directory: str | Path) -> Path:
        """Write the set as a folder; other files there are left alone."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for stale in set(TEMPLATES) - set(self.templates):
            (directory / f"{stale}.txt").unlink(missing_ok=True)
        for name, text in self.templates.items():
            (directory / f"{name}.txt").write_bytes(text.encode())
        manifest = {"format": FORMAT, "name": self.name, "version": self.version, "sha256": self.sha256}
        (directory / "prompts.json").write_text(
            json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return directory

    @classmethod
    def load(cls, path_or_name: str | Path) -> PromptSet:
        """Load a set from a folder, or a built-in one by its name (`builtin_names`).

        Raises:
            PromptError: no such set, or the folder is not a complete one.
        """
        directory = Path(path_or_name)
        if isinstance(path_or_name, str) and path_or_name in builtin_names():
            directory = Path(__file__).parent / path_or_name
        manifest_file = directory / "prompts.json"
        if not manifest_file.is_file():
            raise PromptError(
                f"no prompt set {str(path_or_name)!r}: no {manifest_file.name} there; built in are {builtin_names()}"
                f"{did_you_mean(path_or_name, builtin_names())}"
            )
        try:
            manifest = parse_json(manifest_file.read_text(encoding="utf-8-sig"))
            if not isinstance(manifest, dict):
                raise ValueError("it is not an object")
            texts = {
                n: (directory / f"{n}.txt").read_bytes().decode("utf-8-sig")
                for n in TEMPLATES
                if (directory / f"{n}.txt").is_file()
            }
        except ValueError as error:
            raise PromptError(f"prompt set {str(directory)!r} cannot be read: {error}") from None
        if manifest.get("format", FORMAT) != FORMAT:
            raise PromptError(
                f"prompt set {str(directory)!r} has format {manifest['format']}, this version reads {FORMAT}; "
                "update vilavt-hf"
            )
        return cls(str(manifest.get("name", directory.name)), texts, str(manifest.get("version", "1")))


def join(parts: list[PromptPart] | tuple[PromptPart, ...]) -> tuple[PromptPart, ...]:
    """Join neighbouring texts; drop empty ones."""
    joined: list[PromptPart] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)


def builtin_names() -> list[str]:
    """Names of the sets that ship with the package."""
    return sorted(entry.parent.name for entry in Path(__file__).parent.glob("*/prompts.json"))


__all__ = ["FORMAT", "TEMPLATES", "Part", "PromptSet", "TemplateInfo", "builtin_names", "join"]
