"""``vilavt ask`` and ``vilavt demo``: one question about your pictures, or three about the shipped ones."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vilavt_core.backends import is_url
from vilavt_core.cli.model_options import limits_of, open_model
from vilavt_core.cli.quiet import load_quietly
from vilavt_core.cli.showing import markup, plain, show
from vilavt_core.errors import ImageError

if TYPE_CHECKING:
    from rich.console import Console

    from vilavt_core.backends import Backend
    from vilavt_core.results import ChatResult

    from ..chat import VilavtChat

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
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, or the URL of a running vilavt-serve (…/v1).")],
    image: Annotated[list[str], typer.Option(help="Picture: a path, or a URL with --allow-urls. May be repeated.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write the conversation as an HTML page.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the conversation as one PNG.")] = None,
    preset: Annotated[str | None, typer.Option(help="How the episode runs; default: the checkpoint's own.")] = None,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Turns at most, the answer included.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per turn at most.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy; default: the preset's.")] = None,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Let pictures be http(s) URLs.")] = False,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    attention: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2.")] = None,
) -> None:
    """Ask a checkpoint or a server about pictures, and watch it zoom. Exit code 3: it ended without an answer."""
    from rich.console import Console

    from vilavt_core.dialogue import note_of

    _check_writable(trace, picture)
    if is_url(model) and picture is not None:
        raise typer.BadParameter(f"--picture {picture}: a server tells no pixels; pass --trace, or a checkpoint")
    if is_url(model) and not allow_urls and any(map(is_url, image)):  # a checkpoint's own loading refuses them
        raise ImageError("pictures are URLs; pass --allow-urls to let the server fetch them, or download the files")
    backend: Backend = open_model(
        model,
        preset=preset,
        limits=limits_of(max_turns, max_new_tokens, None),
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype.value,
        attention=attention,
        allow_urls=allow_urls,
    )
    console = Console(stderr=as_json, highlight=False)
    if note := note_of(model, backend):
        console.print(note, style="yellow", markup=False)
    result = show(console, backend.stream(image, question))
    if as_json:
        typer.echo(json.dumps(result.to_json(), ensure_ascii=False, indent=2))
    _write(console, [result], trace, picture)
    if result.answer is None:
        raise typer.Exit(NO_ANSWER)


def demo(
    model: Annotated[str | None, typer.Option(help="Checkpoint; default: the shipped tiny one.")] = None,
    data: Annotated[Path | None, typer.Option(help="questions.json with pictures beside it; default: shipped.")] = None,
    out: Annotated[Path, typer.Option(help="Where the HTML page goes.")] = Path("vilavt-trace.html"),
    picture: Annotated[Path | None, typer.Option(help="Also write the first conversation as one PNG.")] = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Watch a real, tiny ViLaVT answer three questions it was not trained on. Writes a web page of them."""
    from rich.console import Console

    from vilavt_core.shipped import shipped

    console = Console(highlight=False)
    questions = _questions(data or shipped("pictures/questions.json", "pass --data"))
    _check_writable(out, picture)
    name = model or str(shipped("vilavt-tiny", "pass --model"))
    chat = _load(name, device, dtype)
    parameters = sum(p.numel() for p in chat.model.parameters())
    console.print(f"[bold]{Path(name).name}[/], {parameters / 1e6:.1f} M parameters, on {chat.model.device}")
    results, right = [], 0
    for image, question, expected in questions:
        console.rule(style="dim")
        console.print(plain(question), style="bold", markup=False)
        result = show(console, chat.stream(image, question))
        results.append(result)
        correct = (result.answer or "").strip() == expected.strip()
        right += correct
        verdict = "[green]right[/]" if correct else "[red]wrong[/]"
        console.print(f"  {verdict}, the answer is {markup(expected)}")
    console.rule(style="dim")
    console.print(f"{right} of {len(questions)} right")
    _write(console, results, out, picture)


# ---------------------------------------------------------------------- parts


def _load(name: str, device: str, dtype: Dtype, attention: str | None = None, **settings: Any) -> VilavtChat:
    from ..chat import VilavtChat

    load_quietly()
    return VilavtChat.from_pretrained(name, dtype=dtype.value, device=device, attn_implementation=attention, **settings)


def _check_writable(*paths: Path | None) -> None:
    """Before the work, not after it."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"{path}: the folder {path.absolute().parent} does not exist; create it first")


def _write(console: Console, results: list[ChatResult], page: Path | None, picture: Path | None) -> None:
    from vilavt_core.trace import draw_conversation, write_html

    if page is not None:
        write_html(results, page)
        console.print(f"trace: {page}", soft_wrap=True, markup=False)
    if picture is not None:
        draw_conversation(results[0]).save(picture)
        console.print(f"picture: {picture}", soft_wrap=True, markup=False)


def _questions(path: Path) -> list[tuple[Path, str, str]]:
    """Picture, question and expected answer of every entry."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [(path.parent / str(e["image"]), str(e["question"]), str(e.get("answer", ""))) for e in entries]
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}; check --data") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise ImageError(f'{path}: not a list of {{"image", "question", "answer"}} ({detail}); check --data') from None


__all__ = ["ask", "demo"]
