"""``vilavt convert``, ``merge``, ``inspect`` and ``init``: checkpoints in and out."""

import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..checkpoint import Inspection, Missing


class Architecture(StrEnum):
    """Which class name config.json gets."""

    VILAVT = "vilavt"
    PUBLISHED = "published"


class MergeDtype(StrEnum):
    """Type of merged floating-point tensors."""

    BF16 = "bf16"
    FP32 = "fp32"
    KEEP = "keep"


QueryEncoder = Annotated[
    Path | None,
    typer.Option("--query-encoder", help="Folder of the query encoder (Qwen3-Embedding): config, tokenizer."),
]
Processor = Annotated[
    Path | None, typer.Option("--processor", help="Folder whose processor and tokenizer files fill in what is missing.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing destination, as a whole.")]
ClassName = Annotated[Architecture, typer.Option(help="Class name in config.json: ours, or the published one.")]


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder, either published flavour.")],
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

    report = convert_checkpoint(
        source,
        destination,
        query_encoder=query_encoder,
        processor=processor,
        architecture=_class_name(architecture),
        link=not copy,
        force=force,
        verify=verify,
    )
    typer.echo(f"{destination}: {report.tensors} tensors, {_size(report.nbytes)}, {report.weights.value}")
    typer.echo(f"query encoder settings from {report.text_encoder_config}")
    typer.echo(f"brought along: {', '.join(report.companions.brought) or 'nothing'}")
    if report.verified:
        typer.echo("verified: names, shapes, types and bytes of all tensors match")
    _remarks(report.notes, report.missing)


def merge(
    shards: Annotated[Path, typer.Argument(help="Folder with model_world_size_W_rank_R.pt files.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    dtype: Annotated[MergeDtype, typer.Option(help="Type of floating-point tensors.")] = MergeDtype.BF16,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of an output file in GB.")] = 5.0,
    config: Annotated[Path | None, typer.Option(help="Folder with config.json; default: huggingface/ beside.")] = None,
    query_encoder: QueryEncoder = None,
    processor: Processor = None,
    architecture: ClassName = Architecture.VILAVT,
    force: Force = False,
) -> None:
    """Merge FSDP shards of EasyR1 or verl into one checkpoint."""
    from ..checkpoint.merge import merge_shards

    report = merge_shards(
        shards,
        destination,
        dtype=dtype.value,
        max_shard_bytes=int(max_shard_gb * 1e9),
        config=config,
        query_encoder=query_encoder,
        processor=processor,
        architecture=_class_name(architecture),
        force=force,
    )
    typer.echo(
        f"{destination}: {report.tensors} tensors, {_size(report.nbytes)}, {report.dtype}, "
        f"from {report.world_size} ranks (mesh {report.mesh})"
    )
    _remarks(report.notes, report.missing)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is, how it conditions vision on queries, and what it lacks."""
    from ..checkpoint import inspect_checkpoint

    found = inspect_checkpoint(checkpoint)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    _print_inspection(found)


def init(
    base: Annotated[Path, typer.Argument(help="Folder of a Qwen2.5-VL checkpoint.")],
    query_encoder: Annotated[Path, typer.Option("--query-encoder", help="Folder of a Qwen3-Embedding checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    integration_point: Annotated[
        str, typer.Option(help="Query-aware vision blocks: all, early, late, late2, late3, sparse or none.")
    ] = "late",
    fullatt: Annotated[
        str | None, typer.Option(help="Blocks with full attention inside an image, as 7,15; default: the base's.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt set to put in: a name or a folder.")] = "default",
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weights instead of hard-linking them.")] = False,
    force: Force = False,
) -> None:
    """Make a new ViLaVT from a Qwen2.5-VL and a Qwen3-Embedding checkpoint."""
    from ..checkpoint import initialise_checkpoint

    report = initialise_checkpoint(
        base,
        query_encoder,
        out,
        integration_point=integration_point,
        fullatt_block_indexes=_block_list(fullatt),
        prompts=prompts,
        seed=seed,
        link=not copy,
        force=force,
    )
    typer.echo(
        f"{out}: {report.base_tensors} tensors of the base, {report.query_encoder_tensors} of the query encoder, "
        f"{len(report.new_tensors)} new ({report.new_parameters:,} parameters, N(0, 0.02), biases 0, "
        f"seed {report.seed})"
    )
    typer.echo(f"query-aware blocks: {_list(report.query_aware_blocks)}")
    typer.echo("new: " + ", ".join(report.new_tensors))
    if report.ignored:
        typer.echo(f"left out of the query encoder: {', '.join(report.ignored)}")
    _remarks(report.notes, report.missing)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("convert")(convert)
    app.command("merge")(merge)
    app.command("inspect")(inspect)
    app.command("init")(init)


def _class_name(architecture: Architecture) -> str:
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
    names = ", ".join(found.architectures) or "none"
    console.print(
        f"[bold]{found.folder.name}[/bold]: {found.flavour.value} (model_type {found.model_type}, class {names})"
    )
    depth = f" of {found.depth}" if found.depth else ""
    console.print(
        f"integration point: {found.integration_point}; query-aware blocks: {_list(found.query_aware_blocks)}{depth}"
    )
    console.print(f"full attention blocks: {_list(found.fullatt_block_indexes)}")
    table = Table("part", "parameters", "size")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, part in found.parts.items():
        table.add_row(name, f"{part.parameters:,}", _size(part.nbytes))
    table.add_row("[bold]all[/bold]", f"{found.parameters:,}", _size(sum(p.nbytes for p in found.parts.values())))
    console.print(table)
    console.print(f"types: {', '.join(f'{dtype} {count:,}' for dtype, count in found.dtypes.items())}")
    console.print(f"files: {', '.join(f'{name} {_size(size)}' for name, size in found.files.items())}")
    console.print(f"fingerprint: {found.fingerprint}")
    console.print(f"prompt set: {'its own' if found.prompts else 'none, the built-in default applies'}")
    for problem in found.problems:
        console.print("[red]problem:[/red]", problem, markup=True)
    _remarks(found.notes, found.missing)
    if found.complete:
        console.print("complete")


def _remarks(notes: Iterable[str], missing: "Iterable[Missing]") -> None:
    for note in notes:
        typer.echo(f"note: {note}")
    for item in missing:
        typer.secho(f"missing: {item.name}: {item.remedy}", fg="yellow")


def _list(numbers: Iterable[Any]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
