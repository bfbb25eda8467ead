"""Pictures of a conversation: a self-contained HTML page, and one image for a README or a paper.

Both show every image as the model saw it, the regions it asked for (numbered and coloured like their crops), its
queries, thoughts and answer. The page refers to nothing outside itself, and all text that came from a model or a user
is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from .drawing import INK, LINE, PAPER, SOFT, Font, colour, load_font, wrap
from .episode import Turn
from .errors import ImageError
from .pages import render
from .protocol import Action, Answer, Malformed, NoAction, ToolCall
from .regions import FACTOR, View
from .results import ChatResult


def write_html(
    results: ChatResult | Sequence[ChatResult], path: str | Path, *, sections: Sequence[str] | None = None
) -> Path:
    """Write one page with all given conversations, and return its path. The page needs no network and no script.

    `sections`, one per conversation, is what to put after it: HTML if `vilavt_core.pages.render` made it, else text.
    """
    several = [results] if isinstance(results, ChatResult) else list(results)
    path = Path(path)
    pairs = zip(several, sections or [""] * len(several), strict=True)
    conversations = [_conversation(result, section) for result, section in pairs]
    page = render("conversations.html", title="ViLaVT, turn by turn", conversations=conversations)
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
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour(child), width=width)
        label = str(child)
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        tag_width, tag_height = right - left + 8, bottom - top + 6
        at_x, at_y = min(x1, canvas.width - tag_width), y1 - tag_height if y1 >= tag_height else y1
        draw.rectangle((at_x, at_y, at_x + tag_width, at_y + tag_height), fill=colour(child))
        draw.text((at_x + 4 - left, at_y + 3 - top), label, fill="white", font=font)
    return canvas


# ---------------------------------------------------------------------- HTML


def shown_turn(number: int, text: str, action: Action, **more: Any) -> dict[str, Any]:
    """One turn as ``templates/turn.html`` shows it.

    Args:
        number: from 1.
        text: what the model wrote.
        action: what was read out of it.
        more: ``meta`` (beside the number), ``boxes`` (below the query), ``problem``, ``images`` (see `_images`).
    """
    return {
        "number": number,
        "text": text,
        "thought": "" if isinstance(action, Malformed) else action.thought,
        "query": action.query if isinstance(action, ToolCall) else None,
        "answer": action.text if isinstance(action, Answer) else None,
        "nothing": isinstance(action, NoAction) and not action.thought,
        "meta": "",
        "boxes": "",
        "problem": None,
        "images": [],
    } | more


def _conversation(result: ChatResult, section: str) -> dict[str, Any]:
    shown = {index for turn in result.turns for index in turn.image_indices}
    no_answer = None
    if result.answer is None and result.episode is not None:
        no_answer = f"No answer ({result.finish}): {result.episode.detail}"
    return {
        "question": result.question,
        "images": _images(result, [index for index in range(len(result.images)) if index not in shown]),
        "turns": [_turn(turn, result) for turn in result.turns],
        "error": None if result.error is None else f"{type(result.error).__name__}: {result.error}",
        "asked_again": result.fallback is not None,
        "answer": result.answer,
        "no_answer": no_answer,
        "facts": _facts(result),
        "section": section,
    }


def _turn(turn: Turn, result: ChatResult) -> dict[str, Any]:
    seconds = "" if turn.seconds is None else f" · {turn.seconds:.2f} s"
    return shown_turn(
        turn.index + 1,
        turn.text,
        turn.action,
        meta=f"{turn.token_count} tokens{seconds}",
        problem=turn.problem,
        images=_images(result, turn.image_indices),
    )


def _images(result: ChatResult, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Images as ``templates/turn.html`` shows them; without their pixels if a server told them."""
    images = []
    for index in indices:
        image = result.images[index]
        box = (
            "" if image.box is None else f", region [{', '.join(f'{v:g}' for v in image.box)}] of image {image.parent}"
        )
        tokens = image.width * image.height // FACTOR**2
        images.append(
            {
                "index": index,
                "url": _data_url(annotate(result.views, index)) if result.views else None,
                "colour": None if image.parent is None else colour(index),
                "caption": f"{image.width} x {image.height} px, {tokens} tokens{box}",
            }
        )
    return images


def _facts(result: ChatResult) -> dict[str, str]:
    provenance, work = result.provenance, result.work
    computed = work.tokens_prefilled + work.tokens_decoded
    return {
        "checkpoint": f"{provenance.checkpoint or 'in memory'} {(provenance.fingerprint or '')[:12]}",
        "preset, prompts": f"{provenance.preset}, {provenance.prompts} {provenance.prompts_sha256[:12]}",
        "sampling": f"temperature {provenance.sampling.temperature:g}, seed {provenance.seed}",
        "computed": (
            f"{work.patches_encoded} patches ({work.patches_ratio:.2f} per distinct one), "
            f"{computed} tokens ({work.tokens_ratio:.2f} per distinct one), {result.seconds:.2f} s"
        ),
        "run on": f"{provenance.device}, {provenance.dtype}, {provenance.attention}",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
    }


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    # Photographs would be huge as PNG.
    kind = "PNG" if image.width * image.height <= 512 * 512 else "JPEG"
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 88}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------- one picture

_GAP = 28
_ROOM = 300
"""Pixels that the longest side of a picture gets."""


def draw_conversation(result: ChatResult, scale: float = 2.0) -> Image.Image:
    """One wide picture: the question and its images, an arrow with the query to each round of crops, the answer; RGB.

    Args:
        result: a conversation that did not fail.
        scale: pixels per unit; 2 is sharp on dense screens.

    Raises:
        ImageError: a server told the result: its pictures are not here.
    """
    views = result.views
    if result.images and not views:
        raise ImageError(
            "a server told this conversation without its pictures; draw those of a local model, or write HTML"
        )
    shown = {index for turn in result.turns for index in turn.image_indices}
    steps: list[tuple[str, list[int]]] = [("", [i for i in range(len(views)) if i not in shown])]
    for turn in result.turns:
        if isinstance(turn.action, ToolCall) and turn.image_indices:
            steps.append((turn.action.query, list(turn.image_indices)))
    columns = [_column(views, indices, scale) for _, indices in steps]
    arrow, gap, margin = round(150 * scale), round(_GAP * scale), round(30 * scale)
    title, text = load_font(round(19 * scale)), load_font(round(14 * scale))
    answer = load_font(round(34 * scale), bold=True)
    lines = wrap(result.answer or f"({result.finish})", answer, round(240 * scale))
    answer_width = max(round(30 * scale), *(round(answer.getlength(line)) for line in lines))
    width = 2 * margin + sum(c.width for c in columns) + (len(columns) - 1) * arrow + arrow + answer_width
    question = wrap(result.question, title, width - 2 * margin)
    head = margin + round(30 * scale) * len(question) + gap
    height = head + max(c.height for c in columns) + margin
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for n, line in enumerate(question):
        draw.text((margin, margin + n * round(30 * scale)), line, font=title, fill=INK)
    middle = head + (height - margin - head) // 2
    x = margin
    for n, column in enumerate(columns):
        if n:
            _arrow(draw, x, middle, arrow, steps[n][0], text, scale)
            x += arrow
        canvas.paste(column, (x, middle - column.height // 2))
        x += column.width
    _arrow(draw, x, middle, arrow, "", text, scale)
    step = round(42 * scale)
    for n, line in enumerate(lines):
        at = middle - step * len(lines) // 2 + n * step + step // 2
        draw.text((x + arrow, at), line, font=answer, fill=INK, anchor="lm")
    return canvas


def _column(views: Sequence[View], indices: Sequence[int], scale: float) -> Image.Image:
    """Images above each other, with borders in their colours."""
    room = round(_ROOM * scale if len(indices) == 1 else _ROOM * scale / len(indices) ** 0.7)
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


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int, length: int, label: str, font: Font, scale: float) -> None:
    pad, head = round(14 * scale), round(7 * scale)
    start, end = x + pad, x + length - pad
    draw.line((start, y, end - head, y), fill=SOFT, width=max(1, round(2 * scale)))
    draw.polygon([(end, y), (end - 2 * head, y - head), (end - 2 * head, y + head)], fill=SOFT)
    lines = wrap(label, font, end - start) if label else []
    step = round(19 * scale)
    for n, line in enumerate(lines):
        draw.text(((start + end) // 2, y - pad - (len(lines) - 1 - n) * step), line, font=font, fill=INK, anchor="ms")
