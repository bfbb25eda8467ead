"""`vilavt tiny`: build, evaluate and draw scenes for the tiny example model."""

import contextlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vilavt_core.checkpoint import require_vilavt
from vilavt_core.checkpoint.writing import check_destination
from vilavt_core.cli.allocator import keep_freed_memory
from vilavt_core.cli.running import check_output_files, check_output_folders, choice, group
from vilavt_core.ending import resumable
from vilavt_core.progress import waiting

tiny_app = group("The tiny example model: build it, evaluate it, draw its scenes.")


@tiny_app.command("build")
def build_command(
    out: Annotated[Path, typer.Option(help="Folder of the finished checkpoint.")],
    work: Annotated[Path | None, typer.Option(help="Folder of the stages; default: beside OUT.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    resume: Annotated[bool, typer.Option(help="Keep stages that WORK already holds.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUT and WORK already.")] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Encode every region alone while training: a control of joint encoding.")
    ] = False,
) -> None:
    """Train the tiny model from nothing (up to three hours on two cores) and save it."""
    check_destination(out, force)
    work = work or out.with_name(f"{out.name}-work")
    check_output_folders(work=work)
    if not (resume or force) and any(work.glob("*/stage.json")):
        raise typer.BadParameter(
            f"{work} holds stages of an earlier build; pass --resume to keep them, or --force to begin anew",
            param_hint="--work",
        )
    keep_freed_memory()
    from ..tiny.build import build

    with resumable(f"with --resume the same command keeps the stages that are done, in {work}"):
        record = build(out, work=work, seed=seed, resume=resume, force=force, alone=alone)
    if record:
        typer.echo(json.dumps(record, indent=1))


@tiny_app.command("eval")
def eval_command(
    checkpoint: Annotated[Path | None, typer.Argument(help="Checkpoint folder; default: the shipped one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only that many questions.")] = None,
    split: Annotated[str, typer.Option(help="heldout, or dev while developing.")] = "heldout",
    batch: Annotated[int, typer.Option(min=1, help="Conversations side by side.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Keep questions, images and results in this folder, where the same command goes on after an "
            "interruption; default: nowhere."
        ),
    ] = None,
) -> None:
    """Held-out accuracy per question kind: whole conversations and every ablation, with 95% intervals."""
    choice(split, ("heldout", "dev", "train"), "--split")
    check_output_files(json=json_file)
    from vilavt_core.shipped import shipped

    from ..tiny.evaluate import evaluate_tiny

    require_vilavt(checkpoint or shipped("vilavt-tiny"))
    with tempfile.TemporaryDirectory() if out is None else contextlib.nullcontext(out) as folder:
        report = evaluate_tiny(
            str(checkpoint or shipped("vilavt-tiny")),
            Path(folder),
            split=split,  # type: ignore[arg-type]
            limit=limit,
            concurrency=batch,
            progress=True,
        )
    report = replace(report, checkpoint=str(checkpoint or "examples/vilavt-tiny"))
    typer.echo(report.table.to_markdown())
    typer.echo(
        f"percent right (95% interval), difference to full in points; plain pixel classifier, told where the card is: "
        f"{100 * report.pixel_first_look:.1f} from the first look, {100 * report.pixel_zoomed:.1f} from the crop"
    )
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")


@tiny_app.command("benchmark")
def benchmark_command(
    out: Annotated[Path, typer.Option(help="Folder for definition, questions and images.")],
    limit: Annotated[int | None, typer.Option(help="Questions; default: all 980.")] = None,
) -> None:
    """Write the held-out scenes as a benchmark; `vilavt eval` takes the path that is printed."""
    check_output_folders(out=out)
    from ..tiny.benchmark import tasks, write_benchmark

    with waiting("drawing scenes"):
        definition = write_benchmark(out, tasks("heldout", limit))
    typer.echo(definition)


@tiny_app.command("scenes")
def scenes_command(
    out: Annotated[Path, typer.Option(help="Folder for the images and questions.json.")],
    count: Annotated[int, typer.Option(help="Number of scenes.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 7,
) -> None:
    """Draw held-out scenes, images and clips, with questions and answers."""
    check_output_folders(out=out)
    from ..tiny.build import write_examples

    for name in write_examples(out, count, seed):
        typer.echo(name)


@tiny_app.command("data")
def data_command(
    out: Annotated[Path, typer.Option(help="Folder for records and images.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint whose tokenizer and prompts to use; default: the shipped one.")
    ] = None,
    count: Annotated[int, typer.Option(help="Records of each training set.")] = 1000,
    held_out: Annotated[int, typer.Option(help="Records to validate on.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
) -> None:
    """Write ideal conversations about training scenes, in the published schema and in ours, for `vilavt sft`.

    Beside them a question that the shipped model cannot answer yet, with held-out scenes to validate on.
    """
    check_output_folders(out=out)
    from vilavt_core.prompts import PromptSet
    from vilavt_core.shipped import shipped

    from ..processing_vilavt import VilavtProcessor
    from ..tiny.records import write_new_lesson, write_training_set

    folder = checkpoint or shipped("vilavt-tiny")
    require_vilavt(folder)
    processor = VilavtProcessor.from_pretrained(folder)
    prompts = processor.prompts or PromptSet.load("tiny")
    with waiting("drawing scenes"):
        written = write_training_set(out, processor.tokenizer, prompts, count=count, seed=seed)
        written += write_new_lesson(out, count=count, held_out=held_out, seed=seed)
    for name in dict.fromkeys(written):
        typer.echo(out / name)
