"""``vilavt doctor``: what is installed, whether it works, and what serving a checkpoint takes; ``vilavt version``."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .showing import markup

if TYPE_CHECKING:
    from ..memory import Load, ModelSizes
    from ..sizing import Machine, Plan, PlannedTalk

PLANNING = "Plan"
"""Title of the options that only `--plan` takes."""


def doctor(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder to check too.")] = None,
    load: Annotated[
        bool, typer.Option("--load", help="Load the checkpoint's weights and run them, in every package installed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout; with --plan, one object.")] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Instead of checks: what serving the checkpoint takes, from its headers. Needs no GPU."
        ),
    ] = False,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GiB of one GPU. Default: 80.", rich_help_panel=PLANNING)
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs that hold one replica together. Default: 1.", rich_help_panel=PLANNING)
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(help="Share of a GPU's memory that vLLM takes. Default: 0.92.", rich_help_panel=PLANNING),
    ] = None,
    reserve: Annotated[
        float | None, typer.Option(help="GiB of each GPU kept for activations. Default: 4.", rich_help_panel=PLANNING)
    ] = None,
    batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step of the engine. Default: 8192.", rich_help_panel=PLANNING)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type that is served. Default: bfloat16.", rich_help_panel=PLANNING)
    ] = None,
    picture: Annotated[
        str | None, typer.Option(help="Size of an image as sent. Default: 4000x3000.", rich_help_panel=PLANNING)
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(help="Images of a conversation. Default: 1.", rich_help_panel=PLANNING)
    ] = None,
    crops: Annotated[
        int | None, typer.Option(help="Crops of a conversation. Default: 4.", rich_help_panel=PLANNING)
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Tokens of text in a conversation. Default: 1500.", rich_help_panel=PLANNING)
    ] = None,
    training_gpus: Annotated[
        int | None, typer.Option(help="GPUs that share a training run. Default: 8.", rich_help_panel=PLANNING)
    ] = None,
) -> None:
    """Check this installation; exit code 1 if something has to be done."""
    machine = _given(
        gpu_memory=gpu_memory, gpus=gpus, utilization=utilization, reserve=reserve, batched_tokens=batched_tokens
    )
    talk = _given(picture=picture, pictures=pictures, crops=crops, text_tokens=text_tokens)
    if plan:
        if model is None or load:
            raise typer.BadParameter("--plan needs --model" if model is None else "--plan loads nothing: drop --load")
        _plan(model, machine, talk, dtype, training_gpus, as_json)
        return
    if useless := [*machine, *talk, *_given(dtype=dtype, training_gpus=training_gpus)]:
        raise typer.BadParameter(f"--{useless[0].replace('_', '-')} has no effect without --plan")
    _examine(model, load, as_json)


def _examine(model: Path | None, load: bool, as_json: bool) -> None:
    from rich.console import Console

    from ..doctor import Check, Status, examine

    if load and model is None:
        raise typer.BadParameter("--load needs --model")
    colours = {Status.OK: "green", Status.NOTE: "yellow", Status.FAILED: "red"}
    console = Console(soft_wrap=True, highlight=False)
    found: list[Check] = []
    for check in examine(model, load=load):
        found.append(check)
        if not as_json:
            mark = f"[{colours[check.status]}]{check.status.value:>6}[/]"
            console.print(f"{mark}  [bold]{markup(check.name)}[/]: {markup(check.detail)}")
            if check.remedy:
                console.print(f"        {markup(check.remedy)}")
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in found], indent=2))
    if any(check.status is Status.FAILED for check in found):
        raise typer.Exit(1)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _plan(
    model: Path,
    machine: dict[str, Any],
    talk: dict[str, Any],
    dtype: str | None,
    training_gpus: int | None,
    as_json: bool,
) -> None:
    from ..memory import Load, ModelSizes, asked, ways
    from ..sizing import DTYPES, Machine, PlannedTalk
    from ..sizing import plan as planned
    from .running import choice

    choice(dtype or "bfloat16", tuple(DTYPES), "--dtype")
    if "picture" in talk:
        size = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", talk["picture"])
        if size is None:
            raise typer.BadParameter(f"--picture {talk['picture']!r}: expected width and height, as 4000x3000")
        talk["picture"] = (int(size[1]), int(size[2]))
    of, about = Machine(**machine), PlannedTalk(**talk)
    found = planned(model, of, about, dtype=dtype or "bfloat16")  # type: ignore[arg-type]
    at_once = max(about.pictures * found.picture_tokens, about.crops * found.crop_tokens)
    tokens = found.conversation_tokens
    work = Load(tokens, min(at_once, tokens), labelled=min(about.text_tokens, tokens))
    sizes, gpus = ModelSizes.of_checkpoint(model), training_gpus or 8
    if as_json:
        memory: dict[str, Any] = {"asked": asdict(asked(sizes, work, dtype=found.dtype))}
        memory |= {way: asdict(takes(sizes)) for way, takes in ways(work, gpus).items()}
        typer.echo(json.dumps(found.to_json() | {"memory": memory}, indent=2))
        return
    typer.echo("\n".join([*_lines(found, of, about), "", *_ways(sizes, work, gpus)]))


def _ways(sizes: "ModelSizes", work: "Load", gpus: int) -> list[str]:
    from ..memory import ways
    from ..sizing import GIB

    head = f"GiB of each GPU, for {work.tokens:,} tokens at once; training: {gpus} GPUs"
    columns = ("weights", "gradients", "optimizer", "cache", "gathered", "activations", "total")
    rows = [head, f"  {'':24}" + "".join(f"{column:>12}" for column in columns)]
    for way, takes in ways(work, gpus).items():
        memory = takes(sizes)
        rows.append(f"  {way:24}" + "".join(f"{getattr(memory, column) / GIB:12.2f}" for column in columns))
    return rows


def _lines(found: "Plan", machine: "Machine", talk: "PlannedTalk") -> list[str]:
    from ..sizing import GIB

    def gib(nbytes: int) -> str:
        return f"{nbytes / GIB:8.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes * 1024 / GIB:8.2f} MiB"

    width, height = talk.picture
    rows = [f"{'part':20}{'parameters':>16}   {found.dtype}"]
    rows += [f"{name:20}{part.parameters:16,}{gib(part.nbytes):>15}" for name, part in found.parts.items()]
    rows += [
        f"{'all':20}{found.parameters:16,}{gib(sum(part.nbytes for part in found.parts.values())):>15}",
        "",
        f"each of {machine.gpus} GPU{'s' * (machine.gpus > 1)} of {machine.gpu_memory:g} GiB, "
        f"of which vLLM takes {machine.utilization:.0%}",
        f"  weights           {gib(found.weight_bytes)}",
        f"  encoder cache     {gib(found.encoder_cache_bytes)}",
        f"  activations       {machine.reserve:8.2f} GiB   assumed (--reserve); vLLM measures its own at start",
        f"  keys and values   {gib(found.kv_cache_bytes)}   {found.kv_bytes_per_token:,} bytes a token",
        "",
        f"a conversation of {talk.pictures} image(s) of {width} x {height}, {talk.crops} crop(s) and "
        f"{talk.text_tokens} tokens of text",
        f"  an image          {found.picture_tokens:8,} tokens",
        f"  a crop, at most   {found.crop_tokens:8,} tokens",
        f"  all               {found.conversation_tokens:8,} tokens; the longest there can be: {found.context:,}",
        f"  computing         {found.vision_flops / 1e12:8.1f} TFLOP for its images, "
        f"{found.language_flops / 1e12:.1f} TFLOP to read it once",
        f"  at the same time  {found.conversations:8,} conversations; {found.full_conversations:,} of the longest",
    ]
    if not found.conversations:
        rows.append("not one fits: more or larger GPUs, fewer pixels (--max-pixels), or a smaller --max-context")
    return rows


def version() -> None:
    """Print the versions that decide a result."""
    from ..versions import DECIDING, version_of

    for package in DECIDING:
        typer.echo(f"{package} {version_of(package) or 'not installed'}")
