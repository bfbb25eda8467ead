"""Can this be asked, trained or served as a ViLaVT? Judged from headers, before anything is loaded: one verdict with
one remedy, the same in every command, in the server and in `vilavt doctor`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .companions import Missing
from .hub import hub_config, names_hub_id
from .inspection import Flavour, flavour_of, inspect_checkpoint
from .layout import CONFIG, read_json

NEEDED = ("tokenizer.json", "preprocessor_config.json", "query_tokenizer/")
"""Companions without which no question can be asked."""


@dataclass(frozen=True)
class Verdict:
    """What keeps a checkpoint from being used, and what to do."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


def judge_checkpoint(
    checkpoint: str | os.PathLike, *, hub: Mapping[str, Any] | None = None, sft: bool = False
) -> Verdict | None:
    """What keeps `checkpoint` from being used as a ViLaVT; None if nothing does.

    Of a hub id only the configuration is looked at, from the hub or its cache.

    Args:
        checkpoint: folder or hub id.
        hub: how to reach the hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.
        sft: whether the published SFT format will do.
    """
    name = os.fspath(checkpoint)
    try:
        if names_hub_id(name):
            return _of_flavour(name, flavour_of(read_json(hub_config(name, hub or {}))), (), sft)
        found = inspect_checkpoint(name)
    except CheckpointError as error:
        return Verdict(str(error), "")
    verdict = _of_flavour(name, found.flavour, found.missing, sft)
    if found.problems and (verdict is None or found.flavour not in (Flavour.STOCK, Flavour.QUERY_ENCODER)):
        return Verdict(f"{name} cannot be used: {'; '.join(found.problems)}", f"`vilavt inspect {name}` says more")
    return verdict


def require_vilavt(checkpoint: str | os.PathLike, *, hub: Mapping[str, Any] | None = None, sft: bool = False) -> None:
    """Stop if `judge_checkpoint` finds anything.

    Raises:
        CheckpointError: with problem and remedy.
    """
    if (verdict := judge_checkpoint(checkpoint, hub=hub, sft=sft)) is not None:
        raise CheckpointError(str(verdict))


def _of_flavour(name: str, flavour: Flavour, missing: tuple[Missing, ...], sft: bool) -> Verdict | None:
    if flavour is Flavour.STOCK:
        return Verdict(
            f"{name} is a stock Qwen2.5-VL, without a query encoder",
            f"make a ViLaVT from it: vilavt init {name} --query-encoder QWEN3_EMBEDDING --out NEW",
        )
    if flavour is Flavour.QUERY_ENCODER:
        return Verdict(
            f"{name} is a query encoder (Qwen3), one part of a ViLaVT",
            f"vilavt init QWEN2_5_VL --query-encoder {name} --out NEW makes one with it",
        )
    if flavour is Flavour.UNKNOWN:
        return Verdict(
            f"{name} is neither a ViLaVT nor a model that one is made from",
            f"`vilavt inspect {name}` says what its {CONFIG} holds",
        )
    lacks = [item for item in missing if item.name in NEEDED]
    if flavour is Flavour.PUBLISHED_SFT and not sft:
        return Verdict(f"{name} is a ViLaVT in the published SFT format", _convert(name, lacks))
    if lacks:
        return Verdict(f"{name} lacks {', '.join(item.name for item in lacks)}", _convert(name, lacks))
    return None


def _convert(name: str, lacks: list[Missing]) -> str:
    """The command that adds what is missing."""
    encoder = [" --query-encoder QWEN3_EMBEDDING" for item in lacks if item.name == NEEDED[-1]]
    processor = [" --processor QWEN2_5_VL"] if len(lacks) > len(encoder) else []
    return f"convert it: vilavt convert {name} NEW{''.join([*encoder, *processor])}"
