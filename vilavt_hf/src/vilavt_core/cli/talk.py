"""``vilavt chat``: a conversation in the terminal, with follow-up questions and images in between."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..failures import printable_text
from . import model_options as options
from .showing import markup, show

if TYPE_CHECKING:
    from rich.console import Console

    from ..dialogue import Dialogue
    from ..results import CropsEvent
    from ..terminal_pictures import Way

HISTORY_LINES = 1000
KEYBOARD, SCREEN = 0, 1
"""File descriptors of a process's own terminal."""
COLUMNS = 40
"""Most cells that a crop may be wide."""


def chat(
    model: options.Model,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Image to begin with: a path, or a URL with --allow-urls. May be repeated."),
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option(help="Video to begin with; shown after the images. May be repeated.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video, uniform in time. Default: 32.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of a video, instead of --frames.")] = None,
    preset: options.Preset = None,
    max_turns: options.MaxTurns = None,
    max_new_tokens: options.MaxNewTokens = None,
    max_pixels: options.MaxPixels = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Let images be http(s) URLs.")] = False,
    pictures: Annotated[bool, typer.Option(help="Show crops inside the terminal.")] = True,
    history: Annotated[bool, typer.Option(help="Remember what was typed for the arrow keys of the next chat.")] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = None,
    attention_maps: options.AttentionMaps = False,
    device_map: options.DeviceMap = None,
    quantize: options.Quantize = None,
    base: options.Base = None,
) -> None:
    """Talk with a checkpoint or a server about images, in the terminal. Ctrl-C stops an answer, Ctrl-D ends the chat.

    /help lists what can be typed besides questions.
    """
    from rich.console import Console

    from ..dialogue import Dialogue, note_of
    from ..terminal_pictures import way_here
    from ..watching import require_watched

    if attention_maps:
        options.require_attention_maps(model)
    console = Console(highlight=False)
    # Before the model is loaded: meanwhile people type.
    way = way_here(os.environ, KEYBOARD, SCREEN) if pictures and console.is_terminal else None
    opened = options.open_model(
        model,
        preset=preset,
        limits=options.limits_of(max_turns, max_new_tokens, max_pixels),
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        attention=attention,
        device_map=device_map,
        quantize=quantize,
        base=base,
        allow_urls=allow_urls,
    )
    if attention_maps:
        require_watched(opened)
    prompt = Prompt(console, Dialogue(opened, allow_urls=allow_urls), way, frames, fps, attention_maps)
    for path in image or ():
        prompt.image(path)
    for path in video or ():
        prompt.video(path)
    if note := note_of(model, opened):
        console.print(printable_text(note), style="yellow", markup=False)
    with _history(_history_file() if history and sys.stdin.isatty() else None):
        prompt.run()


@dataclass(frozen=True)
class Command:
    """Something that can be typed besides a question."""

    does: Callable[[str], None]
    argument: str
    """Its name in capitals; empty: it takes none."""
    help: str


class Prompt:
    """Reads questions and commands, one a line.

    Args:
        console: where everything is printed.
        dialogue: what was said so far.
        way: how crops are shown; None: not at all.
        frames: of a video.
        fps: instead.
        attention_maps: whether a trace has the attention of the zooms.
    """

    def __init__(
        self,
        console: Console,
        dialogue: Dialogue,
        way: Way | None,
        frames: int | None,
        fps: float | None,
        attention_maps: bool = False,
    ) -> None:
        self.console, self.dialogue, self.way, self.frames, self.fps = console, dialogue, way, frames, fps
        self.attention_maps = attention_maps
        self.commands = {
            "/image": Command(self.image, "PATH", "show an image with the next question"),
            "/video": Command(self.video, "PATH", "show the frames of a video with the next question"),
            "/trace": Command(
                self.trace, "FILE", "write everything so far as a page, or as JSON if FILE ends in .json"
            ),
            "/reset": Command(self.reset, "", "forget images, questions and answers"),
            "/help": Command(self.help, "", "this list"),
        }

    def run(self) -> None:
        """Until Ctrl-D."""
        from ..errors import VilavtError

        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                self.console.print()
                self.dialogue.close()
                return
            except KeyboardInterrupt:  # gives the line up
                self.console.print()
                continue
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.ask(line)
            except VilavtError as error:
                self.console.print(f"[red]{type(error).__name__}[/]: {markup(str(error))}", soft_wrap=True)
            except KeyboardInterrupt:
                self.console.print("\n[yellow]stopped[/]; the next question begins a new conversation about the same "
                                   "images")  # fmt: skip

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, _, argument = line.partition(" ")
        command, argument = self.commands.get(name), argument.strip()
        if command is None:
            self.console.print(f"[red]unknown command {markup(name)}[/]; there are {', '.join(self.commands)}")
        elif bool(command.argument) != bool(argument):
            takes = f"{name} {command.argument}" if command.argument else f"{name} alone"
            self.console.print(f"[red]{markup(line)}[/]: it is {takes}")
        else:
            command.does(argument)

    def ask(self, question: str) -> None:
        """Ask, and print what happens."""
        self.dialogue.ready()
        events = self.dialogue.ask(question)
        try:
            show(self.console, events, self._crops)
        finally:
            events.close()  # type: ignore[attr-defined]  # an interrupt may have come between two events

    def image(self, path: str) -> None:
        """Show an image with the next question."""
        self._added(self.dialogue.add(_path(path)))

    def video(self, path: str) -> None:
        """Show the frames of a video with the next question."""
        from ..sources import Video

        self._added(self.dialogue.add(Video(_path(path), self.frames, self.fps)))

    def trace(self, file: str) -> None:
        """Write everything so far."""
        from ..errors import EngineError
        from ..sources import file_paths
        from ..trace import write_html

        path = Path(_path(file))
        if not self.dialogue.results:
            raise EngineError("nothing was answered yet; ask first")
        if self.attention_maps:
            self.dialogue.watch()
        results = self.dialogue.results
        try:
            if path.suffix.lower() == ".json":
                files = {"image_files": file_paths(self.dialogue.sources)}
                path.write_text(
                    json.dumps([one.to_json() | files for one in results], ensure_ascii=False, indent=2) + "\n"
                )
            else:
                write_html(results, path)
        except OSError as error:
            raise EngineError(f"{path}: cannot be written: {error.strerror}; name another file") from None
        self.console.print(f"trace: {path}", soft_wrap=True, markup=False)

    def reset(self, _: str = "") -> None:
        """Forget images, questions and answers."""
        self.dialogue.reset()
        self.console.print("forgotten; /image shows another image", style="dim")

    def help(self, _: str = "") -> None:
        """What can be typed."""
        for name, command in self.commands.items():
            self.console.print(f"  [cyan]{name} {command.argument}[/]".ljust(26) + f"{command.help}")
        self.console.print("  anything else is a question; Ctrl-C stops its answer, Ctrl-D ends the chat")

    def _added(self, given: list) -> None:
        for one in given[:: max(1, len(given) - 1)]:  # of a video, the first and the last frame
            width, height = one.size
            self.console.print(f"  [cyan]{markup(one.label)}[/], {width} x {height} px")
        if len(given) > 2:
            self.console.print(f"  [dim]{len(given)} frames in all[/]")

    def _crops(self, event: CropsEvent) -> None:
        from ..terminal_pictures import print_picture

        for cut in self.dialogue.cuts(event):
            if self.way is not None:
                print_picture(self.console, cut.image, self.way, min(COLUMNS, self.console.width))
        self.console.print(f"  [dim]looked for[/] {markup(event.query)}")


# ---------------------------------------------------------------------- parts


def _path(text: str) -> str:
    """A path as it is typed, quoted, or dropped on the terminal, which escapes blanks."""
    if "://" in text or Path(text).expanduser().exists():
        return text if "://" in text else str(Path(text).expanduser())
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    return str(Path(words[0] if len(words) == 1 else text).expanduser())


def _history_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "vilavt" / "chat_history"


@contextmanager
def _history(file: Path | None) -> Iterator[None]:
    """Line editing and a history that outlasts the chat, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    if file is not None and file.is_file():
        try:
            readline.read_history_file(file)
        except OSError:
            file = None  # one that cannot be read is left as it is
    try:
        yield
    finally:
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                readline.write_history_file(file)
                file.chmod(0o600)
            except OSError as error:
                typer.echo(f"vilavt chat: {file}: the history was not kept: {error.strerror}", err=True)
