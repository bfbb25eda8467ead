"""``vilavt data``: check a training set, count it, unpack its archives."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..ending import resumable
from ..errors import DataError
from ..failures import printable
from ..spelling import did_you_mean
from .running import check_output_files, choice, group
from .showing import markup

if TYPE_CHECKING:
    from ..data.dataset import SftDataset

data_app = group("Training data: check it, count it, unpack its archives.")

What = Annotated[list[str] | None, typer.Argument(help="Data sets by name, or annotation files (.jsonl, .json).")]
Model = Annotated[str | None, typer.Option("--model", help="Checkpoint whose tokenizer and prompts are used.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="Configuration of a run: check or count what it would read.")
]
RegistryFile = Annotated[Path | None, typer.Option("--registry", help="YAML file of data sets.")]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the published data sets.")]
Images = Annotated[Path | None, typer.Option("--images", help="Image root of annotation files; default: their folder.")]
Crops = Annotated[str, typer.Option("--crops", help="Of annotation files: take crops from files, or cut them.")]
MaxLength = Annotated[int, typer.Option("--max-length", help="Tokens of a sample.")]
MaxPixels = Annotated[float, typer.Option("--max-pixels", help="Pixels of an image.")]
Workers = Annotated[int, typer.Option("--workers", help="Number of processes.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report here.")]


@data_app.command("check")
def check_command(
    context: typer.Context,
    what: What = None,
    model: Model = None,
    config: Config = None,
    registry: RegistryFile = None,
    root: Root = None,
    images: Images = None,
    crops: Crops = "files",
    max_length: MaxLength = 24576,
    max_pixels: MaxPixels = 200704,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too, not only its header.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail as well.")] = False,
    workers: Workers = 2,
    json_file: JsonFile = None,
) -> None:
    """Check every record: files, image marks, query mapping, boxes and queries, length. Exit code 1 if any fails.

    With --config also the records that the run validates on.
    """
    from ..data.check import check

    check_output_files(json=json_file)
    datasets = _datasets(context, what, model, config, registry, root, images, crops, max_length, max_pixels)
    records = sum(map(len, datasets))
    findings = [
        finding for dataset in datasets for finding in check(dataset, decode=decode, workers=workers, progress=True)
    ]
    counts = Counter((finding.severity, finding.kind) for finding in findings)
    shown: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        shown[finding.severity, finding.kind] += 1
        if shown[finding.severity, finding.kind] <= 3:
            colour = "red" if finding.severity == "error" else "yellow"
            typer.secho(printable(f"{finding.severity}: {finding.kind}: {finding.text}"), fg=colour)
    for (severity, kind), count in sorted(counts.items()):
        if count > 3:
            typer.echo(f"… {count - 3} more {severity}s of kind {kind!r}")
    errors = sum(n for (severity, _), n in counts.items() if severity == "error")
    warnings = len(findings) - errors
    validated = f" ({len(datasets[1])} of them to validate on)" if datasets[1:] else ""
    typer.echo(f"{records} records{validated}, {errors} errors, {warnings} warnings")
    if json_file is not None:
        report = {
            "records": records,
            "errors": errors,
            "warnings": warnings,
            "kinds": {f"{severity}: {kind}": count for (severity, kind), count in sorted(counts.items())},
            "findings": [asdict(finding) for finding in findings],
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if errors or (strict and warnings):
        raise typer.Exit(1)


@data_app.command("stats")
def stats_command(
    context: typer.Context,
    what: What = None,
    model: Model = None,
    config: Config = None,
    registry: RegistryFile = None,
    root: Root = None,
    images: Images = None,
    crops: Crops = "files",
    max_length: MaxLength = 24576,
    max_pixels: MaxPixels = 200704,
    pack: Annotated[int | None, typer.Option("--pack", help="Tokens of a pack; default: --max-length.")] = None,
    workers: Workers = 2,
    json_file: JsonFile = None,
) -> None:
    """Samples, turns, images and tokens of every data set, and what packing saves.

    With --config also of those that the run validates on, which count for no pack.
    """
    from rich.console import Console
    from rich.table import Table

    from ..data.check import padding_share, statistics
    from ..data.dataset import Lengths, measure
    from ..data.order import Packed

    check_output_files(json=json_file)
    dataset, *validation = _datasets(
        context, what, model, config, registry, root, images, crops, max_length, max_pixels
    )
    lengths = Lengths.of(list(measure(dataset, workers=workers, progress=True).values()))
    rows = statistics(dataset, lengths)
    for held_out in validation:
        measured = Lengths.of(list(measure(held_out, workers=workers, progress=True).values()))
        rows += [replace(row, name=f"validation: {row.name}") for row in statistics(held_out, measured)]
    columns = ("samples", "left out", "turns", "images", "tokens", "of images", "trained", "50%", "90%", "99%", "max")
    table = Table("data set", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        share = [100 * part / max(1, row.tokens) for part in (row.image_tokens, row.trained_tokens)]
        figures: list[Any] = [row.samples, sum(row.dropped.values()), row.turns, row.images, row.tokens]
        cells = [*(f"{n:,}" for n in figures), *(f"{s:.0f} %" for s in share)]
        table.add_row(markup(row.name), *cells, *(f"{n:,}" for n in row.length_quantiles.values()))
    Console().print(table)
    for row in rows:
        for kind, count in sorted(row.dropped.items()):
            typer.secho(printable(f"{row.name}: {count} left out ({kind})"), fg="yellow")
    tokens = lengths.tokens[lengths.kept]
    budget = pack or dataset.max_length
    packs = len(Packed(lengths.kept, lengths.tokens, budget, 0)) if len(tokens) else 0
    empty = 1 - tokens.sum() / (packs * budget) if packs else 0.0
    padded = {size: padding_share(tokens, size) for size in (2, 4, 8)}
    typer.echo(f"packs of {budget} tokens: {packs}, {100 * empty:.1f} % empty")
    shares = ", ".join(f"{100 * share:.1f} % in batches of {size}" for size, share in padded.items())
    typer.echo(f"padding otherwise: {shares}")
    if json_file is not None:
        report = {"data_sets": [asdict(row) for row in rows], "packs": packs, "empty": empty, "padding": padded}
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@data_app.command("unpack")
def unpack_command(
    folder: Annotated[Path, typer.Argument(help="Folder with zip archives, searched with its subfolders.")],
    remove: Annotated[bool, typer.Option("--remove", help="Delete each archive once it is unpacked.")] = False,
) -> None:
    """Unpack every archive into its own folder; run it again to go on after an interruption."""
    from ..data.unpack import unpack

    with resumable():
        report = unpack(folder, remove=remove, progress=True)
    typer.echo(
        f"{report.archives} archives: {report.written} files written ({report.nbytes / 1e9:.2f} GB), "
        f"{report.kept} were there"
    )
    for failure in report.failures:
        typer.secho(printable(f"failed: {failure}"), fg="red", err=True)
    if report.failures:
        raise typer.Exit(1)


def _data_set(name: str) -> str:
    """The name, if it cannot be a file's: a data set is not called so."""
    if Path(name).suffix in (".jsonl", ".json", ".parquet") or "/" in name:
        kind = "it is a folder; name the annotation file in it" if Path(name).is_dir() else "there is no such file"
        raise DataError(f"{name}: {kind}{did_you_mean(name, _beside(name))}", "registry")
    return name


def _beside(name: str) -> list[str]:
    """Files in the folder of one that is not there, written as it was."""
    folder = Path(name).parent
    return [str(Path(name).with_name(path.name)) for path in folder.iterdir()] if folder.is_dir() else []


def _datasets(
    context: typer.Context,
    what: list[str] | None,
    model: str | None,
    config: Path | None,
    registry: Path | None,
    root: Path | None,
    images: Path | None,
    crops: str,
    max_length: int,
    max_pixels: float,
) -> "list[SftDataset]":
    """What is named; of a configuration what it trains on, and then what it validates on, if it does."""
    from ..data.dataset import SftDataset
    from ..data.registry import DataSource, Registry
    from ..data.rendering import RenderSettings
    from ..sft_config import SftConfig
    from ..training_set import make_dataset, make_renderer

    if config is not None:
        _refuse_given(context, _OF_FILES, "--config names the data and how it is read; change its file")
        run = SftConfig.load(config)
        training = make_dataset(run)
        validation = [make_dataset(run, names=run.data.validation)] if run.data.validation else []
        return [training, *validation]
    if not what or model is None:
        raise typer.BadParameter("name data sets or annotation files and a --model, or a --config")
    choice(crops, ("files", "cut"), "--crops")
    known = Registry() if registry is None else Registry.load(registry)
    known = known if root is None else known.model_copy(update={"data_root": root})
    sources = [
        DataSource(name=Path(name).stem, annotations=Path(name), images=images, crops=crops)  # type: ignore[arg-type]
        if Path(name).is_file()
        else known.find(_data_set(name))
        for name in what
    ]
    files = sum(Path(name).is_file() for name in what)
    if not files:
        _refuse_given(context, ("images", "crops"), "no annotation file is named, and data sets say this themselves")
    if files == len(what):
        _refuse_given(context, ("registry", "root"), "only annotation files are named, no data set")
    return [SftDataset(sources, make_renderer(model, RenderSettings(max_pixels)), max_length=max_length)]


_OF_FILES = ("what", "model", "registry", "root", "images", "crops", "max_length", "max_pixels")
"""Parameters that a configuration decides."""


def _refuse_given(context: typer.Context, names: Sequence[str], because: str) -> None:
    """Stop if one of these parameters was given on the command line: it would have no effect."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            option = next((name for name in parameter.opts if name.startswith("--")), "WHAT")
            raise typer.BadParameter(f"{option} has no effect: {because}")
