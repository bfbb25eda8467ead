"""``vilavt curve``: what runs of `vilavt sft` have logged, as one image."""

from pathlib import Path
from typing import Annotated

import typer

from .running import check_output_files


def curve(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders of runs (output.folder), finished or not; several.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png, .svg or .pdf file.")] = Path("curve.png"),
) -> None:
    """Draw loss, right answers, learning rate and gradient norm of one run of `vilavt sft` or several."""
    from ..curves import check_chart_file, draw, run_names
    from ..training_curves import TrainingLog, training_panels

    check_output_files(out=out)
    check_chart_file(out)
    names = run_names(runs)
    logs = [TrainingLog.read(run) for run in runs]
    typer.echo(str(draw(training_panels(list(zip(names, logs, strict=True))), out)))
