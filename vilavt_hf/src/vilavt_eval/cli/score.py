"""``vilavt score``: scores of result files, and one run against another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vilavt_core.cli.running import check_output_folders, choice
from vilavt_core.errors import BenchmarkError
from vilavt_core.failures import printable
from vilavt_core.progress import waiting

if TYPE_CHECKING:
    from ..comparison import Comparison
    from ..definition import Benchmark
    from ..scores import ScoredFile, Scorer
    from ..summary import Summary

Results = Annotated[list[Path], typer.Argument(help="Result files (.jsonl), or folders of them.")]
BenchmarkName = Annotated[
    str | None, typer.Option("--benchmark", "-b", help="Name or YAML file; default: what the files name.")
]
Functions = Annotated[
    bool, typer.Option("--allow-functions", help="Import and run functions that BENCH's YAML names as metrics.")
]
ScorerName = Annotated[
    str, typer.Option("--scorer", help="strict, or published: the rules of the published evaluation.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for JSON, Markdown, plot, CSV and traces.")]
Against = Annotated[list[Path] | None, typer.Option("--against", help="Result files of a run to compare with.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of bootstrap and permutations.")]
Resamples = Annotated[int, typer.Option("--resamples", min=1, help="Resamples of the bootstrap.")]
ImageRoots = Annotated[
    list[Path] | None,
    typer.Option("--image-root", help="Folder of the images on the page of traces. May be repeated."),
]
Shown = Annotated[int, typer.Option("--limit", min=0, help="Questions on the page of traces.")]


def score_command(
    results: Results,
    benchmark: BenchmarkName = None,
    scorer: ScorerName = "strict",
    out: Out = None,
    against: Against = None,
    seed: Seed = 0,
    resamples: Resamples = 2000,
    limit: Shown = 100,
    image_root: ImageRoots = None,
    functions: Functions = False,
) -> None:
    """Score result files; files that differ in their seed only are averaged. No row stops it: flawed ones are listed.

    With --against the results are compared with another run, question by question.
    """
    from ..comparison import compare, write_side_by_side
    from ..definition import load_benchmark
    from ..report import write_report
    from ..summary import settings_of, summarise

    choice(scorer, ("strict", "published"), "--scorer")
    check_output_folders(out=out)
    rules: Scorer = "strict" if scorer == "strict" else "published"
    definition = None if benchmark is None else load_benchmark(benchmark, functions=functions)
    settings = settings_of(_scored(results, definition))
    others = settings_of(_scored(against or [], definition))
    if others and (len(settings), len(others)) != (1, 1):
        raise typer.BadParameter(
            f"{len(others)} runs against {len(settings)}: it takes one against one, each of one or several seeds",
            param_hint="--against",
        )
    both = [*settings, *others]
    with waiting("scoring"):
        summaries = [summarise(files, rules, seed=seed, resamples=resamples) for files in both]
    for summary in summaries:
        show_summary(summary)
    comparison = None
    if others:
        with waiting("comparing"):
            comparison = compare(others[0], settings[0], rules, seed=seed, resamples=resamples)
        _show_comparison(comparison)
    if out is not None:
        with waiting("writing the report"):
            written = write_report(out, list(zip(summaries, both, strict=True)), comparison)
        if comparison is not None:
            page = out / "flips.html"
            ours = settings[0][0].benchmark
            write_side_by_side(comparison, page, limit=limit, benchmark=ours, image_roots=image_root or ())
            written.append(page)
        typer.echo("wrote " + ", ".join(map(str, written)))


def _scored(paths: list[Path], definition: "Benchmark | None") -> list["ScoredFile"]:
    """The files that are named, and of folders the result files below them that are whole runs.

    What cannot be scored in a folder is left out with a warning; a file that is named must be right.
    """
    from ..scores import score_file

    found: dict[Path, ScoredFile] = {}
    for path in paths:
        if not path.is_dir():
            found[path] = score_file(path, definition)
            continue
        inside = sorted(p for p in path.rglob("*.jsonl") if ".shard-" not in p.name)
        if not inside:
            raise typer.BadParameter(f"{path}: there is no finished result file (*.jsonl) in this folder")
        for file in inside:
            try:
                found[file] = found.get(file) or score_file(file, definition)
            except BenchmarkError as error:
                typer.secho(printable(f"left out: {error}"), fg="yellow", err=True)
        if not found.keys() & set(inside):
            raise BenchmarkError(f"{path}: none of the {len(inside)} result files in this folder can be scored")
    return list(found.values())


def show_summary(summary: "Summary") -> None:
    """Print the figures of a setting as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..report import cells, label, shown
    from ..summary import other_scorer

    title = escape(shown(f"{summary.benchmark or 'no benchmark named'}: {summary.name}"))
    table = Table("", "questions", f"{summary.scorer}, %", "95 % interval", other_scorer(summary.scorer), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for figure in summary.figures:
        table.add_row(escape(shown(label(figure))), *cells(figure))
    Console().print(table)
    for flaw, count in summary.flaws.items():
        typer.secho(f"{flaw}: {count:,} rows", fg="yellow")
    if summary.upstream_aborts:
        typer.secho(f"the published program would have ended at {summary.upstream_aborts:,} rows", fg="yellow")
    typer.echo(f"strict and published disagree about {summary.disagreements:,} of {summary.rows:,} rows")


def _show_comparison(comparison: "Comparison") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..report import contrast_cells, shown

    first, second = shown(comparison.first), shown(comparison.second)
    names = ("", "n", escape(first), escape(second), "change", "95 % interval", "+ / -", "p")
    table = Table(*names, title=f"paired, {comparison.overall.test}")
    for column in table.columns[1:]:
        column.justify = "right"
    for contrast in comparison.contrasts:
        table.add_row(escape(shown(contrast.name)), *contrast_cells(contrast))
    Console().print(table)
    for ids, why in (
        (comparison.only_first, f"were answered by {first} only"),
        (comparison.only_second, f"were answered by {second} only"),
        (comparison.other_targets, "have another right answer in the other file"),
    ):
        if ids:
            typer.secho(f"{len(ids):,} questions {why} and are left out", fg="yellow")
