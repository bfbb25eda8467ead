"""``vilavt push``: a checkpoint with its model card onto the hub."""

from pathlib import Path
from typing import Annotated

import typer

from ..failures import printable, printable_text
from .checkpoint import readable_size


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint or an adapter.")],
    repository: Annotated[str, typer.Argument(help="Hub id, OWNER/NAME; made if there is none.")],
    scores: Annotated[
        list[Path] | None,
        typer.Option("--scores", help="scores.json of `vilavt score --out`, for the card. May be repeated."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch; default: the main one.")] = None,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "Upload a ViLaVT checkpoint",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files, sizes and the model card; ask and send nothing.")
    ] = False,
) -> None:
    """Upload a checkpoint with its model card to the hub, as one commit.

    provenance.json goes along: it has the command that made the checkpoint, with its paths.
    """
    from ..checkpoint.card import scores_of_report
    from ..checkpoint.push import check_repository, plan_upload, push_to_hub

    check_repository(repository)
    upload = plan_upload(checkpoint, [score for path in scores or () for score in scores_of_report(path)])
    for name, size in upload.files:
        typer.echo(f"{readable_size(size):>12}  {printable(name)}")
    for name in upload.left_out:
        typer.echo(f"{'left out':>12}  {printable(name)}")
    typer.echo(f"{readable_size(upload.nbytes):>12}  in {len(upload.files)} files")
    if dry_run:
        typer.echo(f"\n{printable_text(upload.card)}")
        typer.echo(f"dry run: nothing was sent to {repository}")
        return
    typer.echo(push_to_hub(upload, repository, private=private, revision=revision, message=message))
