"""``vilavt convert``, ``inspect`` and ``init``: checkpoints in and out."""

import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..architecture import INTEGRATION_POINTS
from ..errors import CheckpointError
from ..failures import printable
from .running import choice

if TYPE_CHECKING:
    from ..checkpoint import Inspection, Missing


class Architecture(StrEnum):
    """Which class name config.json gets."""

    VILAVT = "vilavt"
    PUBLISHED = "published"


QueryEncoder = Annotated[
    Path | None,
    typer.Option("--query-encoder", help="Folder or hub id of the query encoder (Qwen3-Embedding): config, tokenizer."),
]
Processor = Annotated[
    Path | None, typer.Option("--processor", help="Folder whose processor and tokenizer files fill in what is missing.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing destination, as a whole.")]
ClassName = Annotated[Architecture, typer.Option(help="Class name in config.json: ours, or the published one.")]


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder or hub id, either published flavour.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    query_encoder: QueryEncoder = None,
    processor: Processor = None,
    architecture: ClassName = Architecture.VILAVT,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weights instead of hard-linking them.")] = False,
    force: Force = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare names, shapes, types and SHA-256 afterwards.")
    ] = False,
) -> None:
    """Turn an SFT-format checkpoint into the RL/vLLM format."""
    from ..checkpoint import convert_checkpoint
    from ..checkpoint.hub import checkpoint_folder

    report = convert_checkpoint(
        checkpoint_folder(source),
        destination,
        query_encoder=query_encoder and checkpoint_folder(query_encoder),
        processor=processor and checkpoint_folder(processor),
        architecture=class_name(architecture),
        link=not copy,
        force=force,
        verify=verify,
        progress=True,
    )
    typer.echo(f"{destination}: {report.tensors} tensors, {readable_size(report.nbytes)}, {report.weights.value}")
    typer.echo(printable(f"query encoder settings from {report.text_encoder_config}"))
    typer.echo(printable(f"brought along: {', '.join(report.companions.brought) or 'nothing'}"))
    if report.verified:
        typer.echo("verified: names, shapes, types and bytes of all tensors match")
    show_remarks(report.notes, report.missing)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is, how it conditions vision on queries, and what it lacks."""
    from ..checkpoint import inspect_checkpoint
    from ..checkpoint.hub import checkpoint_folder

    found = inspect_checkpoint(checkpoint_folder(checkpoint))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    _print_inspection(found)


def init(
    base: Annotated[Path, typer.Argument(help="Folder or hub id of a Qwen2.5-VL checkpoint.")],
    query_encoder: Annotated[
        Path, typer.Option("--query-encoder", help="Folder or hub id of a Qwen3-Embedding checkpoint.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    integration_point: Annotated[
        str, typer.Option(help=f"Query-aware vision blocks, one of: {', '.join(INTEGRATION_POINTS)}.")
    ] = "late",
    fullatt: Annotated[
        str | None, typer.Option(help="Blocks with full attention inside an image, as 7,15; default: the base's.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt set to put in: a name or a folder.")] = "default",
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weights instead of hard-linking them.")] = False,
    force: Force = False,
) -> None:
    """Make a new ViLaVT from a Qwen2.5-VL and a Qwen3-Embedding checkpoint."""
    from ..checkpoint import initialise_checkpoint
    from ..checkpoint.hub import checkpoint_folder
    from ..checkpoint.writing import check_destination

    choice(integration_point, INTEGRATION_POINTS, "--integration-point")
    check_destination(out, force)
    report = initialise_checkpoint(
        checkpoint_folder(base),
        checkpoint_folder(query_encoder),
        out,
        integration_point=integration_point,
        fullatt_block_indexes=_block_list(fullatt),
        prompts=prompts,
        seed=seed,
        link=not copy,
        force=force,
        progress=True,
    )
    typer.echo(
        f"{out}: {report.base_tensors} tensors of the base, {report.query_encoder_tensors} of the query encoder, "
        f"{len(report.new_tensors)} new ({report.new_parameters:,} parameters, N(0, 0.02), biases 0, "
        f"seed {report.seed})"
    )
    typer.echo(f"query-aware blocks: {_list(report.query_aware_blocks)}")
    typer.echo(printable("new: " + ", ".join(report.new_tensors)))
    if report.ignored:
        typer.echo(printable(f"left out of the query encoder: {', '.join(report.ignored)}"))
    show_remarks(report.notes, report.missing)


def class_name(architecture: Architecture) -> str:
    """The class name that goes into config.json."""
    from ..checkpoint.config import ARCHITECTURE, PUBLISHED_ARCHITECTURE

    return PUBLISHED_ARCHITECTURE if architecture is Architecture.PUBLISHED else ARCHITECTURE


def _block_list(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise CheckpointError(f"--fullatt {text!r}: expected block numbers separated by commas, as 7,15") from None


def _print_inspection(found: "Inspection") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    names = _inert(", ".join(found.architectures) or "none")
    name, model_type = _inert(found.folder.name), _inert(found.model_type)
    console.print(f"[bold]{name}[/bold]: {found.flavour.value} (model_type {model_type}, class {names})")
    depth = f" of {found.depth}" if found.depth else ""
    point = _inert(found.integration_point)
    console.print(f"integration point: {point}; query-aware blocks: {_list(found.query_aware_blocks)}{depth}")
    console.print(f"full attention blocks: {_list(found.fullatt_block_indexes)}")
    table = Table("part", "parameters", "size")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, part in found.parts.items():
        table.add_row(_inert(name), f"{part.parameters:,}", readable_size(part.nbytes))
    table.add_row(
        "[bold]all[/bold]", f"{found.parameters:,}", readable_size(sum(p.nbytes for p in found.parts.values()))
    )
    console.print(table)
    console.print(f"types: {', '.join(f'{_inert(dtype)} {count:,}' for dtype, count in found.dtypes.items())}")
    if found.quantisation is not None:
        console.print(_inert(str(found.quantisation)))
    console.print(f"files: {', '.join(f'{_inert(name)} {readable_size(size)}' for name, size in found.files.items())}")
    console.print(f"fingerprint: {found.fingerprint}")
    console.print(f"prompt set: {'its own' if found.prompts else 'none, the built-in default applies'}")
    for problem in found.problems:
        console.print("[red]problem:[/red]", _inert(problem), markup=True)
    show_remarks(found.notes, found.missing)
    if found.complete:
        console.print("complete")


def show_remarks(notes: Iterable[str], missing: "Iterable[Missing]") -> None:
    """Print notes, and what is missing with its remedy."""
    for note in notes:
        typer.echo(printable(f"note: {note}"))
    for item in missing:
        typer.secho(printable(f"missing: {item.name}: {item.remedy}"), fg="yellow")


def _inert(text: str | None) -> str:
    """Text of a file as a terminal shows it, and as `rich` does not read it."""
    from rich.markup import escape

    return escape(printable(str(text)))


def _list(numbers: Iterable[Any]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def readable_size(nbytes: int) -> str:
    """Bytes as MB or GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
