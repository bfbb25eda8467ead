"""Options by which the interactive commands name a model, and opening it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..backends import Backend, BackendOptions, names_server, open_backend
from ..errors import AttentionError, EngineError
from .quiet import open_quietly

Model = Annotated[str, typer.Option(help="Checkpoint folder, hub id, or the URL of a running vilavt-serve (…/v1).")]
Preset = Annotated[str | None, typer.Option(help="How the episode runs; default: the checkpoint's own.")]
MaxTurns = Annotated[int | None, typer.Option(min=1, help="Turns at most, the answer included.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Tokens per turn at most.")]
MaxPixels = Annotated[float | None, typer.Option(min=784, help="Pixels of an image as the model sees it, at most.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy; default: the preset's.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of sampling; default: a new one for each question, recorded in the result.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes CUDA if there is one. Not for a server.")]
Dtype = Annotated[str, typer.Option(help="Type the weights are loaded as; auto is the checkpoint's. Not for a server.")]
Attention = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2. Not for a server.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto spreads the weights over GPUs and memory (needs accelerate). Not for a server.")
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Weights as int8 or fp8 (need torchao) or int4 (needs bitsandbytes). Not for a server."),
]
Base = Annotated[
    str | None, typer.Option(help="Checkpoint under an adapter (--model); default: the one that the adapter names.")
]


def engine_of(
    device_map: str | None, quantize: str | None, base: str | None, attention: str | None = None
) -> dict[str, str]:
    """Options of a local model's engine that were given."""
    given = {"device_map": device_map, "quantize": quantize, "base": base, "attn_implementation": attention}
    return {name: value for name, value in given.items() if value is not None}


AttentionMaps = Annotated[
    bool,
    typer.Option(
        "--attention-maps",
        help="Also record where the patches of each zoom look, for the trace and JSON: one more encode of each zoom. "
        "Not for a server.",
    ),
]


def limits_of(max_turns: int | None, max_new_tokens: int | None, max_pixels: float | None) -> dict[str, Any]:
    """Fields of `Limits` that were given."""
    given = {"max_turns": max_turns, "max_new_tokens_per_turn": max_new_tokens, "max_pixels": max_pixels}
    return {name: value for name, value in given.items() if value is not None}


def require_attention_maps(model: str) -> None:
    """Stop before a server is reached, or a model loaded, that gives no attention.

    Raises:
        AttentionError: it is a server.
    """
    if names_server(model):
        raise AttentionError(
            f"--attention-maps: the server {model} gives no attention; pass --model CKPT instead of its URL"
        )


def open_model(
    model: str,
    *,
    preset: str | None = None,
    limits: dict[str, Any] | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
    device_map: str | None = None,
    quantize: str | None = None,
    base: str | None = None,
    allow_urls: bool = False,
) -> Backend:
    """Load a checkpoint quietly, or reach a server.

    Raises:
        EngineError: an option that a server does not support, or none answers.
        VilavtError: the checkpoint cannot be loaded.
    """
    options = BackendOptions(
        preset=preset,
        limits=limits or {},
        sampling={} if temperature is None else {"temperature": temperature},
        seed=seed,
        device=device,
        dtype=dtype,
        allow_urls=allow_urls,
        engine=engine_of(device_map, quantize, base, attention),
    )
    given = {"--attention": attention, "--device-map": device_map, "--quantize": quantize, "--base": base}
    for option, value in given.items():
        if value is not None and names_server(model):
            raise EngineError(f"{option} {value}: a server's engine is set up when it is started; remove it")
    if names_server(model):
        return open_backend(model, options=options)
    return open_quietly(model, lambda: open_backend(model, options=options))
