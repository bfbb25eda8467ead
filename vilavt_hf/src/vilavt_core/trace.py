"""A conversation drawn: as a self-contained HTML page, and as one image for a README or a paper.

Both show every image as the model saw it, the regions it asked for (numbered and coloured like their crops), its
queries, thoughts and answer. The page is the viewer's (`vilavt_core.viewer`); it refers to nothing outside itself, and
all text that came from a model or a user is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from PIL import Image, ImageDraw

from .drawing import INK, LINE, PAPER, SOFT, Font, colour, load_font, wrap, written
from .errors import ImageError
from .pages import render
from .protocol import ToolCall
from .regions import View
from .results import ChatResult
from .viewer import SCRIPT, Trace, shown_talk

Told = ChatResult | Trace | Sequence[ChatResult | Trace]
"""A question, or the questions of one conversation in order."""


def write_html(results: Told | Sequence[Told], path: str | Path, *, title: str | None = None) -> Path:
    """Write one page of conversations, and return its path. The page needs no network.

    Args:
        results: a question; or several, each a conversation of its own, or a list: a conversation with follow-ups.
            A `ChatResult` is shown as it is; a `Trace` can say more of it, as the right answer.
        path: of the page.
        title: of the page; default: the question if there is one only.
    """
    several: list[Told] = [results] if isinstance(results, ChatResult | Trace) else list(results)
    talks = [
        [one if isinstance(one, Trace) else Trace.of(one) for one in ([t] if isinstance(t, ChatResult | Trace) else t)]
        for t in several
    ]
    if title is None:
        first = " ".join(talks[0][0].question.split()) if len(talks) == 1 and talks[0] else ""
        title = (first if len(first) <= 80 else first[:79] + "…") or "ViLaVT, turn by turn"
    path = Path(path)
    page = render(
        "conversations.html",
        script=SCRIPT,
        title=title,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        talks=[shown_talk(talk, number) for number, talk in enumerate(talks)],
    )
    path.write_text(page, encoding="utf-8")
    return path


def annotate(views: Sequence[View], index: int) -> Image.Image:
    """Shown image `index` with the regions that later crops were cut from, enlarged if it is small; RGB."""
    image = views[index].image
    scale = max(1, round(320 / max(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST if scale > 1 else None)
    draw = ImageDraw.Draw(canvas)
    width = max(2, canvas.width // 160)
    font = load_font(max(12, canvas.width // 26))
    for child, view in enumerate(views):
        if view.parent != index or view.box is None:
            continue
        x1, y1, x2, y2 = (value * scale for value in view.box)
        # Boxes in one place go into each other; dark and light around the colour are seen on any ground.
        same = sum(earlier.parent == index and earlier.box == view.box for earlier in views[:child])
        inset = min(same * (width + 4), (x2 - x1) / 3, (y2 - y1) / 3)
        box = (x1 + inset, y1 + inset, max(x1 + inset, x2 - 1 - inset), max(y1 + inset, y2 - 1 - inset))
        for ink, grow in (("black", 2), ("white", 1)):
            around = (box[0] - grow, box[1] - grow, box[2] + grow, box[3] + grow)
            draw.rectangle(around, outline=ink, width=width + 2 * grow)
        draw.rectangle(box, outline=colour(child), width=width)
        label = str(child)
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        tag_width, tag_height = right - left + 8, bottom - top + 6
        at_x = min(x1 + same * tag_width, canvas.width - tag_width)
        at_y = y1 - tag_height if y1 >= tag_height else y1
        draw.rectangle((at_x, at_y, at_x + tag_width, at_y + tag_height), fill=colour(child))
        draw.text((at_x + 4 - left, at_y + 3 - top), label, fill="white", font=font)
    return canvas


# ---------------------------------------------------------------------- one image

_GAP = 28
_ROOM = 300
"""Pixels that the longest side of an image gets."""
_SHORT = 60
"""Characters of an answer that is written large."""


def draw_conversation(result: ChatResult, scale: float = 2.0) -> Image.Image:
    """One wide image: the question and its images, an arrow with the query to each round of crops, the answer; RGB.

    Args:
        result: a conversation that did not fail.
        scale: pixels per unit; 2 is sharp on dense screens.

    Raises:
        ImageError: a server told the result: its images are not here.
    """
    views = result.views
    if result.images and not views:
        raise ImageError(
            "a server told this conversation without its images; draw those of a local model, or write HTML"
        )
    shown = {index for turn in result.turns for index in turn.image_indices}
    steps: list[tuple[str, list[int]]] = [("", [i for i in range(len(views)) if i not in shown])]
    for turn in result.turns:
        if isinstance(turn.action, ToolCall) and turn.image_indices:
            steps.append((turn.action.query, list(turn.image_indices)))
    columns = [_column(views, indices, scale) for _, indices in steps]
    arrow, gap, margin = round(150 * scale), round(_GAP * scale), round(30 * scale)
    said = result.answer or f"({result.finish})"
    large = len(said) <= _SHORT
    answer_text, answer = written(said, round((34 if large else 19) * scale), bold=large)
    step = round((42 if large else 28) * scale)
    lines = wrap(answer_text, answer, round((240 if large else 480) * scale))
    answer_width = max(round(30 * scale), *(round(answer.getlength(line)) for line in lines))
    labels = [_label(query, arrow, scale) for query, _ in steps]
    width = 2 * margin + sum(c.width for c in columns) + (len(columns) - 1) * arrow + arrow + answer_width
    question_text, title = written(result.question, round(19 * scale))
    question = wrap(question_text, title, width - 2 * margin)
    head = margin + round(30 * scale) * len(question) + gap
    labelled = max(2 * (round(19 * scale) * len(lines_) + round(14 * scale)) for lines_, _ in labels)
    height = head + max(step * len(lines), labelled, *(c.height for c in columns)) + margin
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for n, line in enumerate(question):
        draw.text((margin, margin + n * round(30 * scale)), line, font=title, fill=INK)
    middle = head + (height - margin - head) // 2
    x = margin
    for n, column in enumerate(columns):
        if n:
            _arrow(draw, x, middle, arrow, labels[n], scale)
            x += arrow
        canvas.paste(column, (x, middle - column.height // 2))
        x += column.width
    _arrow(draw, x, middle, arrow, labels[0], scale)
    for n, line in enumerate(lines):
        at = middle - step * len(lines) // 2 + n * step + step // 2
        draw.text((x + arrow, at), line, font=answer, fill=INK, anchor="lm")
    return canvas


def _column(views: Sequence[View], indices: Sequence[int], scale: float) -> Image.Image:
    """Images above each other, with borders in their colours."""
    room = round(_ROOM * scale / max(1, len(indices)) ** 0.7)
    gap, border = round(12 * scale), max(2, round(3 * scale))
    pictures = []
    for index in indices:
        image = annotate(views, index)
        ratio = room / max(image.size)
        image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS)
        framed = Image.new("RGB", (image.width + 2 * border, image.height + 2 * border), LINE)
        if views[index].parent is not None:
            framed.paste(colour(index), (0, 0, *framed.size))
        framed.paste(image, (border, border))
        pictures.append(framed)
    if not pictures:
        return Image.new("RGB", (1, 1), PAPER)
    width = max(p.width for p in pictures)
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    column, y = Image.new("RGB", (width, height), PAPER), 0
    for picture in pictures:
        column.paste(picture, ((width - picture.width) // 2, y))
        y += picture.height + gap
    return column


def _label(query: str, length: int, scale: float) -> tuple[list[str], Font]:
    """Lines of a query above an arrow of this length; none if it is empty."""
    text, font = written(query, round(14 * scale))
    return wrap(text, font, length - 2 * round(14 * scale)) if query else [], font


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int, length: int, label: tuple[list[str], Font], scale: float) -> None:
    pad, head = round(14 * scale), round(7 * scale)
    start, end = x + pad, x + length - pad
    draw.line((start, y, end - head, y), fill=SOFT, width=max(1, round(2 * scale)))
    draw.polygon([(end, y), (end - 2 * head, y - head), (end - 2 * head, y + head)], fill=SOFT)
    lines, font = label
    step = round(19 * scale)
    for n, line in enumerate(lines):
        draw.text(((start + end) // 2, y - pad - (len(lines) - 1 - n) * step), line, font=font, fill=INK, anchor="ms")
