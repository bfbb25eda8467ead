"""Pictures of a conversation: a self-contained HTML page, and one image for a README or a paper.

Both show every image as the model saw it, the regions it asked for (numbered and coloured like their crops), its
queries, thoughts and answer. The page refers to nothing outside itself, and all text that came from a model or a user
is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .episode import Turn
from .protocol import Answer, Malformed, NoAction, ToolCall
from .regions import View
from .results import ChatResult

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

COLOURS = ("#e4572e", "#2e86ab", "#3a9d5d", "#b5539c", "#d99a00", "#5b5fc7", "#008b8b", "#a0522d")
"""Of regions and crops, in order of appearance; readable on light and dark."""


def colour(index: int) -> str:
    """Colour of shown image number `index`."""
    return COLOURS[(index - 1) % len(COLOURS)]


def write_html(
    results: ChatResult | Sequence[ChatResult], path: str | Path, *, sections: Sequence[str] | None = None
) -> Path:
    """Write one page with all given conversations, and return its path. The page needs no network and no script.

    `sections`, one per conversation, is HTML to put after it; the caller has escaped what came from elsewhere.
    """
    several = [results] if isinstance(results, ChatResult) else list(results)
    path = Path(path)
    pairs = zip(several, sections or [""] * len(several), strict=True)
    body = "\n".join(_conversation(result, section) for result, section in pairs)
    path.write_text(page("ViLaVT, turn by turn", body), encoding="utf-8")
    return path


def annotate(views: Sequence[View], index: int) -> Image.Image:
    """Shown image `index` with the regions that later crops were cut from, enlarged if it is small; RGB."""
    image = views[index].image
    scale = max(1, round(320 / max(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST if scale > 1 else None)
    draw = ImageDraw.Draw(canvas)
    width = max(2, canvas.width // 160)
    font = _font(max(12, canvas.width // 26))
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

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5d6b7e; --line: #d9dfe7; --paper: #f6f7f9; --card: #ffffff;
  --accent: #2e86ab; --bad: #b3361b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a4b5; --line: #333c49; --paper: #14181e;
  --card: #1c222b; --accent: #6db8d8; --bad: #f0866d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.35rem; margin: 0 0 1.5rem; font-weight: 650; }
article { margin-bottom: 3.5rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.2rem;
  margin: 0 0 .9rem; }
h2 { font-size: 1.1rem; margin: 0 0 1rem; }
.meta { color: var(--soft); font-size: .8rem; font-variant-numeric: tabular-nums; float: right; }
.who { color: var(--soft); font-size: .75rem; letter-spacing: .06em; text-transform: uppercase; margin: 0 0 .5rem; }
.thought { color: var(--soft); font-style: italic; white-space: pre-wrap; margin: .2rem 0 .8rem; }
.query { border-left: 3px solid var(--accent); padding: .1rem 0 .1rem .7rem; margin: .5rem 0 .9rem; }
.answer { font-size: 1.5rem; font-weight: 650; margin: 0; white-space: pre-wrap; }
.bad { color: var(--bad); white-space: pre-wrap; }
.images { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
figure img { display: block; max-width: min(24rem, 100%); border-radius: 6px; border: 3px solid var(--line); }
figcaption { color: var(--soft); font-size: .8rem; margin-top: .3rem; }
.tag { display: inline-block; min-width: 1.4em; text-align: center; color: #fff; border-radius: 4px; padding: 0 .3em;
  font-weight: 650; }
details { margin-top: .7rem; } summary { cursor: pointer; color: var(--soft); font-size: .8rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; margin: .5rem 0 0; }
table { border-collapse: collapse; font-size: .85rem; } td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
td:first-child { color: var(--soft); white-space: nowrap; } td { overflow-wrap: anywhere; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page around a body of HTML; `title` is escaped here, the body by its author. `style` is further CSS."""
    # The policy makes "self-contained" a promise that the browser keeps.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )


def _conversation(result: ChatResult, section: str) -> str:
    views = result.views
    shown = {index for turn in result.turns for index in turn.image_indices}
    first = [index for index in range(len(views)) if index not in shown]
    parts = [
        f'<section><p class="who">Question</p><h2>{escape(result.question)}</h2>{_images(views, first)}</section>',
        *(_turn(turn, views) for turn in result.turns),
    ]
    if result.error is not None:
        problem = escape(f"{type(result.error).__name__}: {result.error}")
        parts.append(f'<section><p class="who">Failed</p><p class="bad">{problem}</p></section>')
    elif result.fallback is not None:
        parts.append(f'<section><p class="who">Asked again without zoom</p>{_answer(result.answer)}</section>')
    elif result.answer is None and result.episode is not None:
        problem = escape(f"No answer ({result.finish}): {result.episode.detail}")
        parts.append(f'<section><p class="bad">{problem}</p></section>')
    parts += [_facts(result), section]
    return "<article>\n" + "\n".join(parts) + "\n</article>"


def _turn(turn: Turn, views: Sequence[View]) -> str:
    seconds = "" if turn.seconds is None else f" · {turn.seconds:.2f} s"
    body = [f'<span class="meta">{turn.token_count} tokens{seconds}</span><p class="who">Turn {turn.index + 1}</p>']
    action = turn.action
    thought = "" if isinstance(action, Malformed) else action.thought
    if thought:
        body.append(f'<p class="thought">{escape(thought)}</p>')
    if isinstance(action, ToolCall):
        body.append(f'<p class="query">{escape(action.query)}</p>')
    elif isinstance(action, Answer):
        body.append(_answer(action.text))
    elif isinstance(action, NoAction) and not thought:
        body.append('<p class="thought">(nothing)</p>')
    if turn.problem is not None:
        body.append(f'<p class="bad">{escape(turn.problem)}</p>')
    body.append(_images(views, turn.image_indices))
    body.append(f"<details><summary>what the model wrote</summary><pre>{escape(turn.text)}</pre></details>")
    return f"<section>{''.join(body)}</section>"


def _answer(text: str | None) -> str:
    return f'<p class="answer">{escape(text or "(no answer)")}</p>'


def _images(views: Sequence[View], indices: Sequence[int]) -> str:
    figures = []
    for index in indices:
        view = views[index]
        crop = view.parent is not None
        border = f' style="border-color:{colour(index)}"' if crop else ""
        tag = f'<span class="tag" style="background:{colour(index) if crop else "#5d6b7e"}">{index}</span>'
        box = "" if view.box is None else f", region [{', '.join(f'{v:g}' for v in view.box)}] of image {view.parent}"
        caption = f"{tag} {view.image.width} x {view.image.height} px, {view.tokens} tokens{box}"
        figures.append(
            f'<figure><img{border} alt="image {index}" src="{_data_url(annotate(views, index))}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="images">{"".join(figures)}</div>' if figures else ""


def _facts(result: ChatResult) -> str:
    provenance, work = result.provenance, result.work
    computed = work.tokens_prefilled + work.tokens_decoded
    rows = {
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
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<section><table>{cells}</table></section>"


def escape(text: str) -> str:
    """Text for HTML, in an attribute too."""
    # Lone surrogates cannot be written as UTF-8.
    return html.escape(text.encode("utf-8", "replace").decode(), quote=True)


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    # Photographs would be huge as PNG.
    kind = "PNG" if image.width * image.height <= 512 * 512 else "JPEG"
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 88}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------- one picture

_INK, _SOFT, _PAPER, _LINE = "#1d2430", "#5d6b7e", "#fbfbfc", "#d9dfe7"
_GAP = 28
_ROOM = 300
"""Pixels that the longest side of a picture gets."""


def draw_conversation(result: ChatResult, scale: float = 2.0) -> Image.Image:
    """One wide picture: the question and its images, an arrow with the query to each round of crops, the answer; RGB.

    Args:
        result: a conversation that did not fail.
        scale: pixels per unit; 2 is sharp on dense screens.
    """
    views = result.views
    shown = {index for turn in result.turns for index in turn.image_indices}
    steps: list[tuple[str, list[int]]] = [("", [i for i in range(len(views)) if i not in shown])]
    for turn in result.turns:
        if isinstance(turn.action, ToolCall) and turn.image_indices:
            steps.append((turn.action.query, list(turn.image_indices)))
    columns = [_column(views, indices, scale) for _, indices in steps]
    arrow, gap, margin = round(150 * scale), round(_GAP * scale), round(30 * scale)
    title, text = _font(round(19 * scale)), _font(round(14 * scale))
    answer = _font(round(34 * scale), bold=True)
    lines = _wrap(result.answer or f"({result.finish})", answer, round(240 * scale))
    answer_width = max(round(30 * scale), *(round(answer.getlength(line)) for line in lines))
    width = 2 * margin + sum(c.width for c in columns) + (len(columns) - 1) * arrow + arrow + answer_width
    question = _wrap(result.question, title, width - 2 * margin)
    head = margin + round(30 * scale) * len(question) + gap
    height = head + max(c.height for c in columns) + margin
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for n, line in enumerate(question):
        draw.text((margin, margin + n * round(30 * scale)), line, font=title, fill=_INK)
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
        draw.text((x + arrow, at), line, font=answer, fill=_INK, anchor="lm")
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
        framed = Image.new("RGB", (image.width + 2 * border, image.height + 2 * border), _LINE)
        if views[index].parent is not None:
            framed.paste(colour(index), (0, 0, *framed.size))
        framed.paste(image, (border, border))
        pictures.append(framed)
    if not pictures:
        return Image.new("RGB", (1, 1), _PAPER)
    width = max(p.width for p in pictures)
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    column, y = Image.new("RGB", (width, height), _PAPER), 0
    for picture in pictures:
        column.paste(picture, ((width - picture.width) // 2, y))
        y += picture.height + gap
    return column


def _arrow(draw: ImageDraw.ImageDraw, x: int, y: int, length: int, label: str, font: Font, scale: float) -> None:
    pad, head = round(14 * scale), round(7 * scale)
    start, end = x + pad, x + length - pad
    draw.line((start, y, end - head, y), fill=_SOFT, width=max(1, round(2 * scale)))
    draw.polygon([(end, y), (end - 2 * head, y - head), (end - 2 * head, y + head)], fill=_SOFT)
    lines = _wrap(label, font, end - start) if label else []
    step = round(19 * scale)
    for n, line in enumerate(lines):
        draw.text(((start + end) // 2, y - pad - (len(lines) - 1 - n) * step), line, font=font, fill=_INK, anchor="ms")


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines no wider than `width`; at most six, a longer text ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    for n, line in enumerate(lines):
        while len(line) > 1 and font.getlength(line) > width:
            line = line[:-2] + "…"
        lines[n] = line
    return [*lines[:5], lines[5] + " …"] if len(lines) > 6 else lines or [""]


def _font(size: int, *, bold: bool = False) -> Font:
    """DejaVu Sans where the system or matplotlib has it, else the font that PIL carries."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    candidates = [name]
    try:
        from matplotlib import get_data_path

        candidates.append(str(Path(get_data_path()) / "fonts" / "ttf" / name))
    except ImportError:
        pass
    for candidate in candidates:
        try:
            return ImageFont.truetype(candidate, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
