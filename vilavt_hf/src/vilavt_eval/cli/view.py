"""``vilavt view``: recorded conversations as a folder of pages."""

from pathlib import Path
from typing import Annotated

import typer

from vilavt_core.errors import BenchmarkError, EvaluationError
from vilavt_core.failures import printable, quoted

from .score import Functions

Runs = Annotated[
    list[Path],
    typer.Argument(
        help="A result file of vilavt eval, of ask --json, traces of VLMEvalKit, or a folder of them; two to compare.",
        metavar="RESULTS [OTHER]",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the pages.")]
BenchmarkName = Annotated[
    str | None, typer.Option("--benchmark", "-b", help="Name or YAML file; default: what the files name.")
]
DataRoot = Annotated[Path | None, typer.Option("--data", help="The benchmark's file, or the folder that holds it.")]
ImageRoots = Annotated[
    list[Path] | None, typer.Option("--image-root", help="Folder that image paths start from. May be repeated.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Conversations at most, of each file.")]


def view(
    results: Runs,
    out: Out = Path("vilavt-view"),
    benchmark: BenchmarkName = None,
    data: DataRoot = None,
    image_root: ImageRoots = None,
    limit: Limit = None,
    functions: Functions = False,
) -> None:
    """Show recorded conversations as a folder of pages with an index. Two runs are shown side by side.

    The pages need no server and no network. Images are looked for below --image-root and --data, beside the results
    and in the current folder.
    """
    from dataclasses import replace
    from datetime import datetime

    from vilavt_core.progress import counted

    from ..browser import BrowsedRun, write_browser
    from ..definition import load_benchmark
    from ..pictures import picture_roots
    from ..recordings import read_recordings

    if len(results) > 2:
        raise typer.BadParameter(
            f"{len(results)} runs; it shows one or compares two, each a file or a folder", param_hint="RESULTS"
        )
    definition = None if benchmark is None else load_benchmark(benchmark, functions=functions)
    runs = []
    for path in results:
        files = []
        for file in _files(path):
            try:
                recordings = read_recordings(file, definition)
            except (BenchmarkError, EvaluationError) as error:
                if file == path:
                    raise
                typer.secho(printable(f"left out: {error}"), fg="yellow", err=True)
                continue
            if limit is not None:
                recordings = replace(recordings, entries=recordings.entries[:limit])
            files.append((recordings, picture_roots(file, recordings.benchmark, image_root or (), data)))
        if not files:
            raise EvaluationError(f"{path}: no file in this folder holds conversations")
        runs.append(BrowsedRun(files[0][0].name if len(files) == 1 else path.name, files))
    if len(runs) == 2 and runs[0].name == runs[1].name:
        runs = [replace(run, name=str(path)) for run, path in zip(runs, results, strict=True)]
    newest = max(recordings.path.stat().st_mtime for run in runs for recordings, _ in run.files)
    written = write_browser(
        out,
        runs,
        title=" against ".join(run.name for run in runs),
        date=f"results of {datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}",
        progress=lambda entries: counted(entries, "writing", "page"),
    )
    if written.problems:
        first = quoted(written.problems[0])
        typer.secho(f"{len(written.problems)} lines hold no conversation, first {first}", err=True)
    if written.missing:
        name, why = next(iter(written.missing.items()))
        typer.secho(
            f"{len(written.missing)} images cannot be shown, first {quoted(name)}: {quoted(why)}; say where they are "
            "with --image-root or --data",
            fg="yellow",
            err=True,
        )
    typer.echo(f"wrote {written.pages} pages: {written.index}")


def _files(path: Path) -> list[Path]:
    """The file, or those of a folder that are whole."""
    if not path.is_dir():
        return [path]
    inside = sorted(p for end in ("*.jsonl", "*.json") for p in path.rglob(end) if ".shard-" not in p.name)
    if not inside:
        raise typer.BadParameter(f"{path}: there is no .jsonl and no .json in this folder", param_hint="RESULTS")
    return inside


__all__ = ["view"]
