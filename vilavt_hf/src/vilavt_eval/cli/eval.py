"""``vilavt eval`` and ``vilavt eval-latency``: benchmarks through any backend."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vilavt_core.cli.model_options import Base, DeviceMap, Quantize, engine_of
from vilavt_core.cli.quiet import load_quietly, open_quietly
from vilavt_core.cli.running import check_output_files, check_output_folders
from vilavt_core.ending import resumable
from vilavt_core.failures import printable_text
from vilavt_core.progress import waiting

from .score import Functions, show_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vilavt_core.backends import Backend
    from vilavt_core.results import Provenance

    from ..questions import Questions
    from ..runner import Ask, Outcome, Setting

    Run = tuple[Questions, str, Outcome]

FAILED = 3
"""Exit code when some questions ended in an error; the same command asks them again."""

Benchmarks = Annotated[list[str], typer.Argument(help="Names, or paths of YAML files.", metavar="BENCH...")]
Model = Annotated[str, typer.Option(help="Checkpoint folder, hub id, or URL of a running vilavt-serve.")]
BackendName = Annotated[
    str | None, typer.Option(help="hf, vllm or server; default: server for a URL, else hf.", show_default=False)
]
PresetName = Annotated[str, typer.Option(help="How questions are asked: a name, or the path of a YAML file.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE: change a field of the preset; repeatable.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder of the question files, or one such file; default: the folder of BENCH's YAML, else ."),
]
ImageRoot = Annotated[
    Path | None, typer.Option("--image-root", help="Folder that image paths start from; default: what BENCH says.")
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option("--engine", help="KEY=VALUE for from_pretrained, vllm.LLM or openai.OpenAI; repeatable."),
]
Device = Annotated[str, typer.Option(help="With hf: cpu, cuda, cuda:1, …; auto takes CUDA if there is one.")]


def evaluate(
    benchmarks: Benchmarks,
    model: Model,
    backend: BackendName = None,
    preset: PresetName = "default",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    data: Data = None,
    image_root: ImageRoot = None,
    changes: Changes = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs, with SEED, SEED + 1, …")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only that many of the first questions.")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: this process's share; default: torchrun's, else all.")] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            help="no-zoom, no-query, no-joint, random-box, no-reencode, or several joined with +; repeatable. The "
            "method as it is runs too, and a table compares them."
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Conversations side by side; default: the backend's choice.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Ask on a Ray cluster: its address, auto (the one of the environment), local (start one)."),
    ] = None,
    actors: Annotated[int | None, typer.Option(min=1, help="With --ray: backends; default: as the GPUs allow.")] = None,
    engine: EngineOptions = None,
    device: Device = "auto",
    functions: Functions = False,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    base: Base = None,
) -> None:
    """Ask a checkpoint or a server the questions of benchmarks, and score the answers.

    Answers are written as they come; after an interruption the same command goes on. Exit code 3: some questions ended
    in an error; of torchrun's ranks the last one says so, for all.
    """
    from ..ablation import Ablation
    from ..runner import asking, run
    from ..sharding import Presence, Shard, take_own_gpu

    share = Shard.parse(shard) if shard else Shard.of_launcher()
    check_output_folders(out=out)
    if ray is None or Path(model).is_dir():  # the folder may be one of the cluster's machines
        _check_model(model, base)
    runs: list[Run] = []
    with resumable(), Presence(out, [benchmarks, preset, changes, seed, seeds, limit, ablate], share) as presence:
        take_own_gpu()
        setting = _setting(
            model, backend, preset, changes, concurrency, engine, device, engine_of(device_map, quantize, base)
        )
        ablations = [Ablation(), *(Ablation.parse(text) for text in ablate or ())]
        for ablation in ablations:
            ablation.check(setting.backend)
        decoded_here = setting.backend != "server"
        sets = [_questions(name, data, image_root, limit is None, decoded_here, functions) for name in benchmarks]
        if ray is None:
            here = _open(setting)
            provenance: Callable[[int], Provenance] = here.provenance
            ask: Callable[[Setting, int], Ask] = partial(asking, here)
        else:
            load_quietly()
            from ..ray_data import Cluster

            cluster = Cluster(ray, actors)
            provenance, ask = cluster.provenance(setting), cluster.asking
        for questions, number, ablation in product(sets, range(seed, seed + seeds), ablations):
            this = replace(setting, ablation=ablation)
            outcome = run(
                this,
                questions,
                out,
                provenance=provenance(number),
                ask=ask(this, number),
                seed=number,
                shard=share,
                limit=limit,
                progress=share.index == 0,
            )
            runs.append((questions, str(ablation), outcome))
            done = f"wrote {outcome.path}" if outcome.complete else f"{outcome.path.stem}: shard {share} is done"
            typer.echo(done, err=True)
        whole = _finish(runs, limit) if presence.leave() else None
    rank = share.count > 1 and not shard
    failed, asked = sum(outcome.failed for *_, outcome in runs), sum(outcome.asked for *_, outcome in runs)
    if rank and whole is not None:
        failed, asked = whole
    if failed:
        typer.secho(
            f"{failed} of {asked} questions ended in an error, see `error` in their rows; the same command asks them "
            "again",
            fg="red",
            err=True,
        )
        if not rank or whole is not None:  # torchrun ends all ranks when one fails, also those that still ask
            raise typer.Exit(FAILED)


def latency(
    benchmark: Annotated[str, typer.Argument(help="Name, or path of a YAML file.", metavar="BENCH")],
    model: Model,
    backend: BackendName = None,
    preset: PresetName = "default",
    data: Data = None,
    image_root: ImageRoot = None,
    changes: Changes = None,
    concurrency: Annotated[str, typer.Option(help="Conversations side by side, one level each.")] = "1,8,32",
    questions: Annotated[
        int | None, typer.Option(min=1, help="Questions of each level; default: all, divided among the levels.")
    ] = None,
    engine: EngineOptions = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    base: Base = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table here.")] = None,
    functions: Functions = False,
) -> None:
    """Measure seconds per turn and answer, what they go into, and how much work is reused."""
    from ..latency import measure_latency

    try:
        levels = [int(level) for level in concurrency.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise typer.BadParameter(f"{concurrency!r} is no list of numbers such as 1,8,32", param_hint="--concurrency")
    check_output_files(json=json_file, markdown=markdown)
    _check_model(model, base)
    setting = _setting(
        model, backend, preset, changes, max(levels), engine, device, engine_of(device_map, quantize, base)
    )
    report = measure_latency(
        _open(setting),
        setting.backend,
        setting.preset,
        _questions(benchmark, data, image_root, True, setting.backend != "server", functions),
        levels=levels,
        count=questions,
        progress=lambda line: typer.echo(printable_text(line), err=True),
    )
    typer.echo(printable_text(report.to_markdown()))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text(report.to_markdown(), encoding="utf-8")


# ---------------------------------------------------------------------- parts


def _finish(runs: Sequence[Run], limit: int | None) -> tuple[int, int] | None:
    """What the last of the processes that share runs does: merge what others left, show the scores of whole runs.

    Returns:
        Questions of all runs without an answer, and all questions; None if a share was never asked.
    """
    unanswered = total = 0
    whole = True
    for questions, group in groupby(runs, key=itemgetter(0)):
        ids, finished = questions.ids(limit), dict[str, list[Path]]()
        merged = True
        for _, ablation, outcome in group:
            merged &= outcome.files.merge(ids)
            finished.setdefault(ablation, []).append(outcome.path)
            unanswered += len(set(ids) - outcome.files.answered())
            total += len(ids)
        if merged:
            _show_scores(questions, finished)
        whole &= merged
    return (unanswered, total) if whole else None


def _show_scores(questions: Questions, finished: Mapping[str, list[Path]]) -> None:
    """Print the scores of whole runs and draw them, with intervals, beside the results; with ablations also their
    table.
    """
    from ..ablation_table import ablation_table
    from ..report import plot
    from ..scores import score_file
    from ..summary import summarise

    with waiting("scoring"):
        scored = {name: [score_file(path, questions.benchmark) for path in paths] for name, paths in finished.items()}
        full = scored.pop("full")
        summary = summarise(full)
        name = finished["full"][0].stem.partition("-seed")[0]
        chart = finished["full"][0].with_name(f"{name}-scores.png")
        plot([summary, *map(summarise, scored.values())], chart)
    show_summary(summary)
    typer.echo(f"wrote {chart}", err=True)
    if scored:
        table = ablation_table(full, scored)
        typer.echo(printable_text(table.to_markdown()))
        stem = finished["full"][0].with_name(f"{name}-ablations")
        stem.with_suffix(".md").write_text(table.to_markdown(), encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")


def _setting(
    model: str,
    backend: str | None,
    preset: str,
    changes: list[str] | None,
    concurrency: int | None,
    engine: list[str] | None,
    device: str,
    placed: Mapping[str, str],
) -> Setting:
    """What answers; `placed` are engine options with an option of their own, for a local model alone."""
    from vilavt_core.backends import names_server

    from ..evaluation_preset import EvaluationPreset
    from ..runner import Setting

    backend = backend or ("server" if names_server(model) else "hf")
    options = _values(engine, "--engine")
    for name, value in placed.items():
        option = f"--{name.replace('_', '-')}"
        if backend != "hf":
            raise typer.BadParameter(
                f"{value}: the backend {backend!r} has options of its own, see --engine", param_hint=option
            )
        if name in options:
            raise typer.BadParameter(f"{value}: --engine says {name}={options[name]}; pass one", param_hint=option)
    return Setting(
        model=model,
        backend=backend,
        preset=EvaluationPreset.load(preset, _values(changes, "--set")),
        concurrency=concurrency,
        device=device,
        engine=tuple((options | dict(placed)).items()),
    )


def _open(setting: Setting) -> Backend:
    """The backend; vLLM says itself how far it is."""
    if setting.backend == "hf":
        return open_quietly(setting.model, setting.open)
    load_quietly()
    return setting.open()


def _check_model(model: str, base: str | None) -> None:
    from vilavt_core.backends import names_server
    from vilavt_core.checkpoint import adapter_base, require_vilavt

    if not names_server(model):
        require_vilavt(adapter_base(model, base) or model)


def _values(pairs: list[str] | None, option: str) -> dict[str, Any]:
    from vilavt_core.yaml_config import parse_change

    return dict(parse_change(pair, partial(typer.BadParameter, param_hint=option)) for pair in pairs or ())


def _questions(
    name: str, data: Path | None, image_root: Path | None, check_images: bool, decoded_here: bool, functions: bool
) -> Questions:
    from vilavt_core.video import require_reader

    from ..definition import load_benchmark
    from ..questions import Questions

    benchmark = load_benchmark(name, functions=functions)
    if benchmark.videos is not None and decoded_here:
        require_reader()
    beside = Path(name).parent if name.endswith((".yaml", ".yml")) else Path()
    with waiting(f"reading {benchmark.name}"):
        questions = Questions(benchmark, data or beside, image_root)
        if check_images:
            questions.require_images()
    return questions


__all__ = ["evaluate", "latency"]
