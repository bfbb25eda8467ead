"""``vilavt ask`` and ``vilavt demo``: one question about your images, or three about the shipped ones."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..backends import names_server
from ..checkpoint import adapter_base, require_vilavt
from ..errors import ImageError
from ..failures import printable_text
from ..json_text import parse_json
from ..sources import ImageSource, Video, file_paths
from .model_options import AttentionMaps, Base, DeviceMap, Quantize, limits_of, open_model, require_attention_maps
from .quiet import open_quietly
from .running import check_output_files, check_picture_file
from .showing import markup, printable_json, show

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from ..backends import Backend
    from ..results import ChatResult

NO_ANSWER = 3
"""Exit code when the conversation ended without an answer."""


class Dtype(StrEnum):
    """Type the weights are loaded as."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes CUDA if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type the weights are loaded as; auto is the checkpoint's.")]


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, or the URL of a running vilavt-serve (…/v1).")],
    image: Annotated[
        list[str] | None, typer.Option(help="Image: a path, or a URL with --allow-urls. May be repeated.")
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(help="Video: a path, or a URL with --allow-urls; its frames are images. May be repeated."),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each video, uniform in time. Default: 32.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of each video, instead of --frames.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write the conversation as an HTML page.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the conversation as one PNG.")] = None,
    preset: Annotated[str | None, typer.Option(help="How the episode runs; default: the checkpoint's own.")] = None,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Turns at most, the answer included.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per turn at most.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy; default: the preset's.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of sampling; default: a new one for each question, recorded in the result.")
    ] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Let images be http(s) URLs.")] = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    attention: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2.")] = None,
    attention_maps: AttentionMaps = False,
    device_map: DeviceMap = None,
    quantize: Quantize = None,
    base: Base = None,
) -> None:
    """Ask a checkpoint or a server about images and videos, and watch it zoom. Exit code 3: it gave no answer.

    Images come before videos if --image comes before --video, else after them.
    """
    from rich.console import Console

    from ..dialogue import note_of
    from ..watching import require_watched, with_attention

    given = {"image": list[ImageSource](image or []), "video": _videos(video or [], frames, fps)}
    shown = [one for name in context.params if name in given for one in given[name]]  # as on the command line
    if not shown:
        raise typer.BadParameter("there is nothing to look at; pass --image or --video")
    if attention_maps:
        if trace is None and not as_json:
            raise typer.BadParameter("--attention-maps: nothing would show them; pass --trace or --json")
        require_attention_maps(model)
    check_output_files(trace=trace)
    check_picture_file(picture=picture)
    if names_server(model) and picture is not None:
        raise typer.BadParameter(f"--picture {picture}: a server tells no pixels; pass --trace, or a checkpoint")
    if not names_server(model):
        require_vilavt(adapter_base(model, base) or model)
    _check_pictures(shown, allow_urls)
    backend: Backend = open_model(
        model,
        preset=preset,
        limits=limits_of(max_turns, max_new_tokens, None),
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype.value,
        attention=attention,
        device_map=device_map,
        quantize=quantize,
        base=base,
        allow_urls=allow_urls,
    )
    console = Console(stderr=as_json, highlight=False)
    if note := note_of(model, backend):
        console.print(printable_text(note), style="yellow", markup=False)
    if attention_maps:
        require_watched(backend)
    result = show(console, backend.stream(shown, question))
    if attention_maps:
        result = with_attention(backend, result)
    if as_json:
        typer.echo(printable_json(result.to_json() | {"image_files": file_paths(shown)}, 2))
    _write(console, [result], trace, picture, backend, [None])
    if result.answer is None:
        raise typer.Exit(NO_ANSWER)


def demo(
    model: Annotated[str | None, typer.Option(help="Checkpoint; default: the shipped tiny one.")] = None,
    data: Annotated[Path | None, typer.Option(help="questions.json with images beside it; default: shipped.")] = None,
    out: Annotated[Path, typer.Option(help="Where the HTML page goes.")] = Path("vilavt-trace.html"),
    picture: Annotated[Path | None, typer.Option(help="Also write the first conversation as one PNG.")] = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    attention_maps: AttentionMaps = False,
) -> None:
    """Watch a real, tiny ViLaVT answer three questions it was not trained on. Writes a web page of them."""
    from rich.console import Console

    from ..shipped import shipped
    from ..watching import require_watched, with_attention

    console = Console(highlight=False)
    check_output_files(out=out)
    check_picture_file(picture=picture)
    questions = _questions(data or shipped("pictures/questions.json", "pass --data"))
    name = model or str(shipped("vilavt-tiny", "pass --model"))
    require_vilavt(name)
    _check_pictures([str(image) for image, _, _ in questions])
    chat = _load(name, device, dtype)
    if attention_maps:
        require_watched(chat)
    parameters = sum(p.numel() for p in chat.model.parameters())
    console.print(f"[bold]{markup(Path(name).name)}[/], {parameters / 1e6:.1f} M parameters, on {chat.model.device}")
    results, targets, right = [], list[str | None](), 0
    for image, question, expected in questions:
        console.rule(style="dim")
        console.print(printable_text(question), style="bold", markup=False)
        result = show(console, chat.stream(image, question))
        results.append(with_attention(chat, result) if attention_maps else result)
        correct = (result.answer or "").strip() == expected.strip()
        right += correct
        targets.append(expected)
        verdict = "[green]right[/]" if correct else "[red]wrong[/]"
        console.print(f"  {verdict}, the answer is {markup(expected)}")
    console.rule(style="dim")
    console.print(f"{right} of {len(questions)} right")
    _write(console, results, out, picture, chat, targets)


# ---------------------------------------------------------------------- parts


def _videos(paths: list[str], frames: int | None, fps: float | None) -> list[ImageSource]:
    for name, value in (("--frames", frames), ("--fps", fps)):
        if value is not None and not paths:
            raise typer.BadParameter(f"{name} {value:g} says which frames of a video are taken; pass --video")
    return [Video(path, frames, fps) for path in paths]


def _load(name: str, device: str, dtype: Dtype, attention: str | None = None, **settings: Any) -> Any:
    """The `VilavtChat`; this is where torch is imported."""
    return open_quietly(
        name,
        lambda: import_module("vilavt_hf.chat").VilavtChat.from_pretrained(
            name, dtype=dtype.value, device=device, attn_implementation=attention, **settings
        ),
    )


def _check_pictures(sources: Iterable[ImageSource], allow_urls: bool = False) -> None:
    """Before the model is loaded, not after it."""
    from ..images import is_url, load_image
    from ..video import frame_times

    for source in sources:
        path = source.source if isinstance(source, Video) else source
        if not (isinstance(path, str) and is_url(path)):
            if isinstance(source, Video):
                frame_times(source)
            else:
                load_image(source)
        elif not allow_urls:
            raise ImageError(
                f"{path}: URLs are not allowed here; pass --allow-urls, or download the file and pass its path"
            )


def _write(
    console: Console,
    results: list[ChatResult],
    page: Path | None,
    picture: Path | None,
    backend: Any,
    targets: list[str | None],
) -> None:
    from ..trace import draw_conversation, write_html
    from ..viewer import Trace

    if page is not None:
        traces = []
        tokenizer = getattr(getattr(backend, "settings", None), "tokenizer", None)  # a server has none here
        for result, target in zip(results, targets, strict=True):
            score = None if target is None else float((result.answer or "").strip() == target.strip())
            traces.append(Trace.of(result, target=target, score=score, tokenizer=tokenizer))
        write_html(traces, page)
        console.print(f"trace: {page}", soft_wrap=True, markup=False)
    if picture is not None:
        draw_conversation(results[0]).save(picture)
        console.print(f"image: {picture}", soft_wrap=True, markup=False)


def _questions(path: Path) -> list[tuple[Path, str, str]]:
    """Image, question and expected answer of every entry."""
    try:
        entries = parse_json(path.read_text(encoding="utf-8-sig"))
        return [(path.parent / str(e["image"]), str(e["question"]), str(e.get("answer", ""))) for e in entries]
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}; check --data") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise ImageError(f'{path}: not a list of {{"image", "question", "answer"}} ({detail}); check --data') from None


__all__ = ["ask", "demo"]
