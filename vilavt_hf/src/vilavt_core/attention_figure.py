"""Draws attention as one image: a row for each block, the crops side by side under their heat, the words of the query
with their shares; for two queries the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .attention import AttentionPicture, Heat, Layer, QueryDifference
from .drawing import INK, LINE, PAPER, SOFT, colour, load_font, wrap
from .errors import AttentionError

_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Black, violet, red, orange, yellow: darker is less, in grey too."""
_COVER, _COVER_MORE = 0.45, 0.4
"""Of an image, how much a heat of 0 covers, and how much more one of full brightness."""
TINTS = 16
"""Steps of brightness of a heat that lies over an image of a page."""
_LESS, _MORE = (33, 102, 172), (215, 48, 31)
_TILE, _LABEL, _WORDS, _GAP, _LINE_STEP = 132, 216, 190, 22, 17
"""Units: the longest side of a crop (shorter where there are many), the columns of text, the room between columns."""
_ROOM = 560
"""Units that the crops of one column share."""


def draw_attention(
    drawn: AttentionPicture | QueryDifference | Sequence[AttentionPicture | QueryDifference],
    *,
    show: str = "received",
    footer: str = "",
    scale: float = 1.5,
) -> Image.Image:
    """One image, RGB; several inquiries below each other.

    Args:
        drawn: with the pixels of the images.
        show: which heat is drawn beside ``query``: ``received``, ``region N`` or ``patch N``; see `Heat`. A difference
            shows ``received``.
        footer: where the maps come from.
        scale: pixels per unit; 2 is sharp on dense screens.

    Raises:
        AttentionError: no such heat, or the images were left out.
    """
    several = [drawn] if isinstance(drawn, AttentionPicture | QueryDifference) else list(drawn)
    pen = _Pen(scale)
    parts = []
    for one in several:
        first = one if isinstance(one, AttentionPicture) else one.before
        if not first.images:
            raise AttentionError("the images were left out of these maps; write them with include_images=True")
        parts.append(pen.picture(one, show) if isinstance(one, AttentionPicture) else pen.difference(one))
    parts.append(pen.legend(footer, max(part.width for part in parts)))
    return _stack(parts, pen.px(_GAP), margin=pen.px(20))


def overlay(
    image: Image.Image, heat: Heat, index: int, size: tuple[int, int] | None = None, full: float | None = None
) -> Image.Image:
    """An image under the heat of its patches, RGB.

    Args:
        image: as the encoder gets it.
        heat: of the inquiry.
        index: of the image in it.
        size: of the result, width and height in pixels; None: the image's.
        full: value that full brightness stands for; None: the heat's own scale.
    """
    size = size or image.size
    dim = 1.0 if full is None else heat.scale / full if full else 0.0
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)[..., None]
    pixels = np.asarray(Image.fromarray(heat.maps[index]).resize(size, Image.Resampling.NEAREST), dtype=np.float64)
    if heat.signed:
        value = np.clip((pixels - 128) / 127 * dim, -1, 1)[..., None]
        paint, cover = np.where(value < 0, np.array(_LESS), np.array(_MORE)), 0.85 * np.abs(value)
        grey = 90 + 0.6 * grey
    else:
        value = np.clip(pixels / 255 * dim, 0, 1)
        points = np.linspace(0, 1, len(_HEAT))
        paint = np.stack([np.interp(value, points, [tint[c] for tint in _HEAT]) for c in range(3)], -1)
        cover = _COVER + _COVER_MORE * value[..., None]
    mixed = (1 - cover) * grey + cover * paint
    return Image.fromarray(np.clip(np.round(mixed), 0, 255).astype(np.uint8))


def tint(heat: Heat, index: int) -> Image.Image:
    """The colours of an unsigned heat, to lie over an image in grey as `overlay` draws it: a pixel per patch, mode P of
    `TINTS` colours with their opacity. As PNG it takes half a byte per patch at most, and some 200 bytes.

    Args:
        heat: of the inquiry.
        index: of the image in it.
    """
    steps = np.linspace(0, 1, TINTS)
    paint = np.stack([np.interp(steps, np.linspace(0, 1, len(_HEAT)), [one[c] for one in _HEAT]) for c in range(3)], -1)
    levels = np.round(heat.maps[index].astype(np.float64) / 255 * (TINTS - 1)).astype(np.uint8)
    image = Image.frombytes("P", levels.shape[::-1], levels.tobytes())
    image.putpalette(np.round(paint).astype(np.uint8).tobytes())
    image.info["transparency"] = bytes(round(255 * (_COVER + _COVER_MORE * step)) for step in steps)
    return image


class _Pen:
    """Draws parts at one scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.title, self.text, self.small = (load_font(self.px(size)) for size in (17, 13, 11))

    def px(self, units: float) -> int:
        return max(1, round(units * self.scale))

    # ------------------------------------------------------------------ whole parts

    def picture(self, picture: AttentionPicture, show: str) -> Image.Image:
        """One query."""
        headers = ["", heading(show, picture), "looks at the query", "words of the query"]
        rows = [[self.label(["as encoded"]), self.crops(picture, captions=True)]]
        top = max((share for layer in picture.layers for share in layer.words), default=0)
        for layer in picture.layers:
            heat = layer.heat(show)
            lines = [layer.title, f"seen: {most_of(heat)}"]
            row = [self.crops(picture, heat)]
            if picture.words:
                asked = layer.heat("query")
                lines.append(f"query: {most_of(asked)}")
                row += [self.crops(picture, asked), self.words(picture.words, layer.words, top)]
            rows.append([self.label([*lines, *mass_lines(layer, picture)]), *row])
        if not picture.words:
            headers = headers[:2]
        query = picture.query if picture.words else "(no query)"
        return self.table(f"query: {query}", headers, rows)

    def difference(self, change: QueryDifference) -> Image.Image:
        """Two queries on the same images."""
        before, after = change.before, change.after
        names = [one.query if one.words else "(no query)" for one in (before, after)]
        rows: list[list[Image.Image]] = [
            [
                self.label(
                    [
                        "as encoded",
                        "",
                        f"features: up to {change.features.scale:.2g}",
                        *(
                            f"{_short(caption)}: length {100 * value:.1f} %"
                            for caption, value in zip(before.captions, change.feature_change, strict=True)
                        ),
                    ]
                ),
                self.crops(before, captions=True),
                self.crops(before, change.features),
            ]
        ]
        headers = ["", "the images; below: seen with A", "how far features moved; below: seen with B", "B - A: seen"]
        headers += [f"words of {name}" for name, one in (("A", before), ("B", after)) if one.words]
        top = max((share for one in (before, after) for layer in one.layers for share in layer.words), default=0)
        # One scale for all rows: what a query hardly changes stays pale.
        most = max(layer.heat("received").scale for layer in change.layers)
        for a, b, changed, moved in zip(before.layers, after.layers, change.layers, change.moved, strict=True):
            seen = [layer.heat("received") for layer in (a, b, changed)]
            full = max(heat.scale for heat in seen[:2])
            lines = [a.title, f"A, B: up to {full:.2g} × even", f"B - A: {most_of(seen[2])}; full colour: {most:.2g}"]
            row = [self.label([*lines, f"attention moved: {100 * moved:.1f} %"])]
            row += [self.crops(before, heat, limit) for heat, limit in zip(seen, (full, full, most), strict=True)]
            row += [self.words(one.words, layer.words, top) for one, layer in ((before, a), (after, b)) if one.words]
            rows.append(row)
        return self.table(f"A: {names[0]}\nB: {names[1]}", headers, rows)

    def legend(self, footer: str, width: int) -> Image.Image:
        """What the colours mean, and where the maps come from."""
        lines = [
            "Bright is much, dark little; the scale of each row is beside it (its 99th percentile; more is cut off). "
            "× even: how often more than if all patches and words were looked at alike. Red is more, blue less.",
            *filter(None, [footer]),
        ]
        wrapped = [part for line in lines for part in wrap(line, self.small, width)]
        canvas = Image.new("RGB", (width, self.px(_LINE_STEP) * len(wrapped)), PAPER)
        draw = ImageDraw.Draw(canvas)
        for n, line in enumerate(wrapped):
            draw.text((0, n * self.px(_LINE_STEP)), line, font=self.small, fill=SOFT)
        return canvas

    # ------------------------------------------------------------------ cells

    def crops(
        self, picture: AttentionPicture, heat: Heat | None = None, full: float | None = None, *, captions: bool = False
    ) -> Image.Image:
        """The images side by side, as they are with the chosen patches outlined, or under a heat (see `overlay`)."""
        room = self.px(min(_TILE, _ROOM / len(picture.images)))
        cells = []
        for i, image in enumerate(picture.images):
            ratio = room / max(image.size)
            size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            tile = image.resize(size, Image.Resampling.LANCZOS) if heat is None else overlay(image, heat, i, size, full)
            if heat is None:
                self._mark(tile, picture, i)
            border = self.px(2)
            framed = Image.new("RGB", (tile.width + 2 * border, tile.height + 2 * border), colour(i + 1))
            framed.paste(tile, (border, border))
            if captions:
                framed = _stack([framed, self.label([picture.captions[i]], room)], self.px(3))
            cells.append(framed)
        canvas = Image.new(
            "RGB", (sum(c.width for c in cells) + self.px(6) * (len(cells) - 1), max(c.height for c in cells)), PAPER
        )
        x = 0
        for cell in cells:
            canvas.paste(cell, (x, 0))
            x += cell.width + self.px(6)
        return canvas

    def _mark(self, tile: Image.Image, picture: AttentionPicture, index: int) -> None:
        draw = ImageDraw.Draw(tile)
        rows, columns = picture.layers[0].heats[0].maps[index].shape
        for image, row, column in picture.patches:
            if image == index:
                left, top = column / columns * tile.width, row / rows * tile.height
                box = (left, top, left + tile.width / columns, top + tile.height / rows)
                draw.rectangle(box, outline="white", width=self.px(3))
                draw.rectangle(box, outline=INK, width=self.px(1))

    def label(self, lines: Sequence[str], width: int | None = None) -> Image.Image:
        """Lines of text, the first one darker."""
        width = width or self.px(_LABEL)
        wrapped = [(n, part) for n, line in enumerate(lines) for part in wrap(line, self.small, width)]
        step = self.px(_LINE_STEP)
        canvas = Image.new("RGB", (width, step * len(wrapped)), PAPER)
        draw = ImageDraw.Draw(canvas)
        for n, (line, part) in enumerate(wrapped):
            draw.text((0, n * step), part, font=self.small, fill=SOFT if line else INK)
        return canvas

    def words(self, words: Sequence[str], shares: Sequence[float], top: float) -> Image.Image:
        """Every word with a bar as long as its share; `top` fills the line."""
        step, width, text = self.px(_LINE_STEP), self.px(_WORDS), self.px(90)
        canvas = Image.new("RGB", (width, step * len(words)), PAPER)
        draw = ImageDraw.Draw(canvas)
        room = width - text - self.px(46)
        for n, (word, share) in enumerate(zip(words, shares, strict=True)):
            y = n * step
            draw.text((0, y), wrap(word, self.small, text)[0], font=self.small, fill=INK)
            length = round(room * share / top) if top else 0
            draw.rectangle((text, y + self.px(3), text + length, y + step - self.px(4)), fill=colour(2))
            draw.text((text + length + self.px(5), y), f"{100 * share:.1f} %", font=self.small, fill=SOFT)
        return canvas

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
        """Rows of cells under headers, columns aligned."""
        gap = self.px(_GAP)
        widths = [max((row[c].width for row in rows if c < len(row)), default=0) for c in range(len(headers))]
        heads = [self.label([header], max(width, 1)) for header, width in zip(headers, widths, strict=True)]
        body = [heads, *rows]
        heights = [max(cell.height for cell in row) for row in body]
        width = sum(widths) + gap * (len(widths) - 1)
        lines = [part for line in title.split("\n") for part in wrap(line, self.title, width)]
        head = self.px(24) * len(lines) + self.px(8)
        canvas = Image.new("RGB", (width, head + sum(heights) + self.px(10) * len(heights)), PAPER)
        draw = ImageDraw.Draw(canvas)
        for n, line in enumerate(lines):
            draw.text((0, n * self.px(24)), line, font=self.title, fill=INK)
        y = head
        for n, (row, height) in enumerate(zip(body, heights, strict=True)):
            x = 0
            for cell, column in zip(row, widths, strict=False):
                canvas.paste(cell, (x, y))
                x += column + gap
            y += height + self.px(10)
            if n:
                draw.line((0, y - self.px(5), width, y - self.px(5)), fill=LINE)
        return canvas


def heading(show: str, picture: AttentionPicture) -> str:
    """What a heat shows, in words.

    Args:
        show: its name; see `Heat`.
        picture: that it belongs to.
    """
    kind, _, number = show.partition(" ")
    if kind == "query":
        return "looks at the query"
    if kind == "word" and number.isdigit() and int(number) < len(picture.words):
        return f"looks at “{picture.words[int(number)]}”"
    if kind == "region" and number.isdigit() and int(number) < len(picture.captions):
        return f"where {_short(picture.captions[int(number)])} looks"
    if kind == "patch" and number.isdigit() and int(number) < len(picture.patches):
        image, row, column = picture.patches[int(number)]
        return f"where the patch in row {row}, column {column} of {_short(picture.captions[image])} looks"
    return "how much a patch is looked at"


def _short(caption: str) -> str:
    """A caption's name, without what follows its colon."""
    return caption.partition(":")[0]


def most_of(heat: Heat) -> str:
    """What full brightness of a heat stands for, in words."""
    if not heat.highest:
        return "nothing"
    return f"up to {100 * heat.scale:.1f} %" if heat.unit == "share" else f"up to {heat.scale:.2g} × even"


def mass_lines(layer: Layer, picture: AttentionPicture) -> list[str]:
    """For each image how much it looks at itself, the others, the query; no lines where they would be too many."""
    if len(picture.captions) > 4:
        return []
    lines = []
    for r, (caption, row) in enumerate(zip(picture.captions, layer.mass, strict=True)):
        parts = [("itself", row[r]), ("others", sum(row[:-1]) - row[r]), ("query", row[-1])]
        kept = [(name, share) for name, share in parts if name != "others" or len(picture.captions) > 1]
        lines.append(f"{_short(caption)}: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in kept))
    return lines


def _stack(parts: Sequence[Image.Image], gap: int, margin: int = 0) -> Image.Image:
    """Images below each other."""
    width, height = max(part.width for part in parts), sum(part.height for part in parts) + gap * (len(parts) - 1)
    canvas, y = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PAPER), margin
    for part in parts:
        canvas.paste(part, (margin, y))
        y += part.height + gap
    return canvas
