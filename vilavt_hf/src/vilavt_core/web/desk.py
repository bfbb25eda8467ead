"""Each visitor's own dialogue: nobody sees another one's images."""

from __future__ import annotations

import json
import secrets
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..backends import Backend
from ..client import ServerClient
from ..conversation import Thoughts
from ..dialogue import Dialogue, Wishes
from ..errors import EngineError, VilavtError
from ..results import AnswerEvent, CropsEvent, Finished, RefusedEvent, TextDelta
from ..sources import ImageSource
from ..trace import write_html
from . import exhibits

PAUSE = 0.1
"""Seconds between two updates of the thoughts on their way."""


class Desk:
    """One visitor: a dialogue, and what the page shows of it.

    Args:
        backend: shared by all desks.
    """

    def __init__(self, backend: Backend) -> None:
        self.dialogue = Dialogue(backend)
        self.token = secrets.token_urlsafe(24)
        """Names the visitor's trace: who has it can read that."""
        self.shown: list[str] = []
        """HTML, in order."""
        self.now = ""
        """HTML of the thoughts on their way."""
        self._question: str | None = None
        self._zooms: dict[int, tuple[exhibits.Zoom, int]] = {}
        """By its place in `shown` every zoom of a question that was answered, and which of the dialogue's results it
        belongs to."""

    def refuse(self, why: str) -> None:
        """Say that a question cannot be put."""
        self._question = None
        self.shown.append(exhibits.problem(why))

    def put(self, question: str, sources: Sequence[ImageSource], wishes: Wishes) -> bool:
        """Take a question, to be answered by `answer`.

        Returns:
            Whether it can be asked; if not, the page says why.
        """
        dialogue = self.dialogue
        try:
            if not question.strip():
                raise EngineError("the question is blank; say what you want to know")
            given = dialogue.add(*sources)
            if not dialogue.given:
                raise EngineError("there is nothing to look at; drop an image or a video first")
        except VilavtError as error:
            self.refuse(str(error))
            return False
        if dialogue.results and not dialogue.continues and not given:
            again = "a new conversation about the same images begins here"
            self.shown.append(exhibits.remark(again))
        dialogue.wishes = wishes
        dialogue.ready()
        self.shown.append(exhibits.question(question, given))
        self._question = question
        return True

    def answer(self) -> Iterator[None]:
        """Answer the question that was put: `shown` and `now` have changed at every step."""
        question, self._question = self._question, None
        if question is None:
            return
        turn, thoughts, text, last = -1, Thoughts(), "", 0.0
        finished, zooms = False, dict[int, tuple[exhibits.Zoom, int]]()
        try:
            for event in () if self.dialogue.stopped else self.dialogue.ask(question):
                if isinstance(event, TextDelta):
                    if event.turn != turn:
                        self._keep(text, turn)
                        turn, thoughts, text = event.turn, Thoughts(), ""
                    text += self._readable(event.text, thoughts)
                    self.now = exhibits.thought(text, turn) if text else ""
                    if time.monotonic() - last < PAUSE:
                        continue
                    last = time.monotonic()
                elif isinstance(event, CropsEvent):
                    self._keep(text, turn)
                    text = ""
                    zoom = exhibits.zoom_of(event.query, self.dialogue.cuts(event), self.dialogue)
                    zooms[len(self.shown)] = zoom, len(self.dialogue.results)
                    self.shown.append(zoom.exhibit(number=len(self.shown)))
                elif isinstance(event, RefusedEvent):
                    self._keep(text, turn)
                    text = ""
                    self.shown.append(exhibits.problem(f"The zoom was refused: {event.problem}"))
                elif isinstance(event, AnswerEvent):
                    self._keep(text, turn)
                    text = ""
                    self.shown.append(exhibits.answer(event.answer))
                elif isinstance(event, Finished):
                    self._keep(text, turn)
                    finished, result = True, event.result
                    self._zooms |= zooms
                    if result.answer is None and result.episode is not None:
                        detail = result.episode.detail
                        self.shown.append(exhibits.problem(f"No answer ({result.finish}). {detail}".strip()))
                    self.shown.append(exhibits.facts(result))
                yield
        except VilavtError as error:
            self._keep(text, turn)
            self.shown.append(exhibits.problem(f"{type(error).__name__}: {error}"))
        else:
            if not finished:
                self._keep(text, turn)
                self.shown.append(
                    exhibits.remark("Stopped. The next question begins a new conversation about the same images.")
                )
        yield

    def watch(self) -> None:
        """Measure the attention of all zooms, and show it over their crops; the trace has it too."""
        try:
            self.dialogue.watch()
        except VilavtError as error:
            self.shown.append(exhibits.problem(str(error)))
            return
        results = self.dialogue.results
        for place, (zoom, question) in self._zooms.items():
            pictures = results[question].attention if question < len(results) else ()
            found = next((one for one in pictures if one.image_indices == zoom.indices), None)
            if found is not None:
                self.shown[place] = zoom.exhibit(found, place)

    @property
    def watchable(self) -> bool:
        """Whether there are zooms of which no attention is shown yet."""
        results = self.dialogue.results
        return any(question < len(results) and not results[question].attention for _, question in self._zooms.values())

    @property
    def thread(self) -> str:
        """HTML of everything but the thoughts on their way."""
        return exhibits.thread(self.shown)

    @property
    def links(self) -> str:
        """HTML of the links to the trace; empty: nothing was answered yet."""
        return exhibits.links(self.token) if self.dialogue.results else ""

    def trace(self, kind: str) -> str:
        """Everything that was answered, as a page (``html``) or data (``json``)."""
        results = self.dialogue.results
        if kind == "json":
            return json.dumps([one.to_json(include_images=True) for one in results], ensure_ascii=False, indent=2)
        with tempfile.TemporaryDirectory() as folder:
            return write_html(results, Path(folder) / "trace.html").read_text(encoding="utf-8")

    def _readable(self, text: str, thoughts: Thoughts) -> str:
        """Of a local engine's text the thoughts; a server sends nothing else, and no tags."""
        return text if isinstance(self.dialogue.backend, ServerClient) else thoughts.feed(text)

    def _keep(self, text: str, turn: int) -> None:
        if text.strip():
            self.shown.append(exhibits.thought(text.strip(), turn))
        self.now = ""


class Desks:
    """All visitors, by the name that Gradio gives the session of a browser's tab.

    Args:
        backend: answers them all.
        most: visitors kept; of more, the one that was idle longest is forgotten.
    """

    def __init__(self, backend: Backend, most: int = 64) -> None:
        self.backend, self.most = backend, most
        self._desks: OrderedDict[str, Desk] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, session: str) -> Desk:
        """A visitor's desk, a new one at first."""
        with self._lock:
            if session not in self._desks:
                self._desks[session] = Desk(self.backend)
            self._desks.move_to_end(session)
            gone = [self._desks.popitem(last=False)[1] for _ in range(len(self._desks) - self.most)]
            desk = self._desks[session]
        for one in gone:
            one.dialogue.close()
        return desk

    def leave(self, session: str) -> None:
        """Forget a visitor; a question that is being answered is stopped."""
        with self._lock:
            desk = self._desks.pop(session, None)
        if desk is not None:
            desk.dialogue.close()

    def by_token(self, token: str) -> Desk | None:
        """Whose trace is named so."""
        with self._lock:
            desks = list(self._desks.values())
        found = [desk for desk in desks if secrets.compare_digest(desk.token.encode(), token.encode())]
        return found[0] if found else None
