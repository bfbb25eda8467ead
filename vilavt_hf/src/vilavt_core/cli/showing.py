"""A conversation in the terminal, printed as it happens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ..errors import EngineError
from ..failures import printable_text
from ..progress import waiting
from ..results import AnswerEvent, ChatResult, CropsEvent, Event, Finished, RefusedEvent, TextDelta

if TYPE_CHECKING:
    from rich.console import Console


def show(
    console: Console, events: Iterable[Event], crops: Callable[[CropsEvent], None] = lambda event: None
) -> ChatResult:
    """Print a question's events.

    Args:
        console: where to.
        events: up to `Finished`.
        crops: called after the lines of a zoom, to show its images.

    Returns:
        The result.

    Raises:
        EngineError: there was none.
    """
    open_turn = -1
    coming = iter(events)
    with waiting("reading the images and the question"):
        begin = list(islice(coming, 1))
    for event in chain(begin, coming):
        if isinstance(event, TextDelta):
            if event.turn != open_turn:
                console.print(f"\n[dim]turn {event.turn + 1}[/]  ", end="")
                open_turn = event.turn
            console.print(printable_text(event.text), end="", markup=False, style="dim", soft_wrap=True)
        elif isinstance(event, CropsEvent):
            console.print()
            for image in event.images:
                box = ", ".join(f"{value:g}" for value in image.box or ())
                console.print(
                    f"  [cyan]image {image.index}[/]: region \\[{box}] of image {image.parent}, "
                    f"shown at {image.width} x {image.height} px"
                )
            crops(event)
        elif isinstance(event, RefusedEvent):
            console.print(f"\n  [yellow]refused[/]: {markup(event.problem)}")
        elif isinstance(event, AnswerEvent):
            console.print(f"\n  [bold]answer: {markup(event.answer)}[/]")
        elif isinstance(event, Finished):
            result = event.result
            if result.answer is None and result.episode is not None:
                console.print(f"\n  [red]no answer[/] ({result.finish}): {markup(result.episode.detail)}")
            work = result.work
            console.print(
                f"  [dim]{len(result.turns)} turns, {work.tokens_decoded} tokens sampled one by one, "
                f"{work.patches_encoded} patches encoded, {result.seconds:.1f} s[/]"
            )
            return result
    raise EngineError("the conversation ended without a result")


def printable_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that a terminal shows and does not act upon: what it would act upon is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def markup(text: str) -> str:
    """Text inside of rich's markup, as it is."""
    from rich.markup import escape

    return escape(printable_text(text))
