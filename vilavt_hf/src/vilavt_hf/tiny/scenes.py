"""Scenes of digit cards for the tiny model: pictures, questions and the ideal conversation about each.

A canvas of 672 x 672 source pixels is shown at 168 x 168 (1/4), so one merged vision token (28 shown pixels) is one
*cell* of 112 source pixels. Cards carry a real scanned digit (scikit-learn's 8 x 8 scans) in fine print: every scan
pixel is a 2 x 2 checkerboard whose contrast is the ink. One zoom magnifies twice:

- a *big* card's checkers average out to plain paper in the first look and appear after one zoom (of its cell);
- a *small* card is half that size in every respect and needs a second zoom (of its quadrant of the first crop).

The canvas is tinted, red rising with x and green with y, blue one of four levels by quadrant of the cell: the vision
tower knows relative positions only, and the tint is what tells it where a cell or a quadrant is. All boxes of the ideal
conversations are cells of the grid.

Two *plates*, cards that fill their cells, share a digit: every bit of either print alone is a fair coin, where they
agree there is ink, where they differ there is paper. One plate says nothing about the digit, however well it is read.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from PIL import Image

from vilavt_core.protocol import Region, ToolCall

CELLS = 6
"""Cells per side of the canvas; one cell is one merged vision token of the first look."""
CELL = 28
"""Shown pixels per cell side."""
SHOWN = CELLS * CELL
"""Side of the first look, pixels."""
SCALE = 4
"""Source pixels per shown pixel."""
CANVAS = SHOWN * SCALE
"""Side of the source picture, pixels."""
CROP = 2 * CELL
"""Side of every crop, pixels: a cell or a quadrant, magnified twice."""
MAX_PIXELS = SHOWN * SHOWN
"""Pixel budget that makes the crop rule show the canvas at 1/4."""

SHIFTED_ROWS, SHIFTED_COLUMNS = frozenset({3}), frozenset({2, 3, 4})
"""Where a nested crop is not pixel for pixel a quadrant of the source: the crop rule truncates to whole pixels, and in
floating point 3 / 6 + 1 / 12 is a little less than 7 / 12 and 2 * 28 / (3 / 6 - 2 / 6) a little less than 336. That
would blur the print of small cards; they are put elsewhere."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (30, 170, 60),
    "blue": (40, 80, 230),
    "yellow": (235, 210, 30),
    "purple": (170, 50, 200),
    "cyan": (40, 200, 220),
}
"""Frame colours; each occurs at most once in a scene."""

BIG_CONTRAST, SMALL_CONTRAST = 120.0, 52.0
"""Grey levels of full ink at source scale; the zoom's filter weakens the big cards' checkers to the small ones'."""

PLATE_CONTRAST, PLATE_STAINS = 60.0, 26.0
"""The same for plates, and the stains that cover what the first look leaves of their larger bits."""
INK = 0.4
"""From which darkness on a pixel of the scan is ink on plates, whose prints have no shades."""

STAINS = 10.0
"""Standard deviation in grey levels of the paper's stains."""

Split = Literal["train", "dev", "heldout"]


class QuestionKind(StrEnum):
    """What a question needs."""

    ONE = "one"
    """One zoom on a cell with one card."""
    PAIR = "pair"
    """One zoom on a cell with two cards: only the query says which one matters."""
    NESTED = "nested"
    """A zoom on a cell, then a zoom on a quadrant of the crop."""
    SUM = "sum"
    """Two regions in one call, encoded jointly; add."""
    LARGER = "larger"
    """Two regions in one call, encoded jointly; compare."""
    SHARED = "shared"
    """Two plates in one call: neither holds the digit, only both do. The shipped model was not taught it."""


TAUGHT_KINDS = (QuestionKind.ONE, QuestionKind.PAIR, QuestionKind.NESTED, QuestionKind.SUM, QuestionKind.LARGER)
"""Kinds of the shipped model: what its tokenizer was trained on, and what its table is about."""


@dataclass(frozen=True)
class Card:
    """One card: its colour and digit, and where it is on the grid."""

    colour: str
    digit: int
    row: int
    column: int
    quadrant: tuple[int, int]
    """Row and column (0 or 1) of its quadrant of the cell."""
    part: tuple[int, int] | None
    """Row and column of its quarter of the quadrant: small cards only."""
    box: tuple[int, int, int, int]
    """Frame included, source pixels."""
    plate: bool = False
    """Whether it fills its cell and holds one half of a shared digit; `digit` is that of both halves together."""

    @property
    def small(self) -> bool:
        """Whether it takes two zooms to read."""
        return self.part is not None

    @property
    def cell_box(self) -> tuple[int, int, int, int]:
        """Its cell in shown pixels of the first look: the box of the ideal first call."""
        return (self.column * CELL, self.row * CELL, (self.column + 1) * CELL, (self.row + 1) * CELL)

    @property
    def quadrant_box(self) -> tuple[int, int, int, int]:
        """Its quadrant in pixels of the crop of its cell: the box of the ideal second call."""
        y, x = self.quadrant
        return (x * CELL, y * CELL, (x + 1) * CELL, (y + 1) * CELL)

    @property
    def token(self) -> int:
        """Index (0-3) of the merged token it fills in the crop in which it can be read."""
        y, x = self.part or self.quadrant
        return 2 * y + x


@dataclass(frozen=True)
class Scene:
    """A picture (RGB, `CANVAS` x `CANVAS`) and its cards."""

    image: Image.Image
    cards: tuple[Card, ...]
    ink: np.ndarray | None = None
    """(8, 8) of bool, where the prints of the two plates agree; None: no plates."""

    def in_cell(self, card: Card) -> tuple[Card, ...]:
        """Cards of the same cell, the card itself included."""
        return tuple(c for c in self.cards if (c.row, c.column) == (card.row, card.column))

    def shown(self) -> Image.Image:
        """The first look, `SHOWN` x `SHOWN`: what `regions` makes of the picture under `MAX_PIXELS`."""
        return self.image.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)

    def cell(self, card: Card) -> Image.Image:
        """The crop after the ideal first call, `CROP` x `CROP`."""
        x1, y1, x2, y2 = (v * SCALE for v in card.cell_box)
        return self.image.crop((x1, y1, x2, y2)).resize((CROP, CROP), Image.Resampling.LANCZOS)

    def quadrant(self, card: Card) -> Image.Image:
        """The crop after the ideal second call, `CROP` x `CROP`, at source scale."""
        x, y = card.column * CELL * SCALE + card.quadrant[1] * CROP, card.row * CELL * SCALE + card.quadrant[0] * CROP
        return self.image.crop((x, y, x + CROP, y + CROP))


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene, its answer and the ideal way there."""

    kind: QuestionKind
    text: str
    query: str
    """The query of every ideal call."""
    targets: tuple[Card, ...]
    answer: str

    @property
    def digits(self) -> tuple[int, ...]:
        """What is to be read: a digit per card, one of both plates."""
        cards = self.targets[:1] if self.kind is QuestionKind.SHARED else self.targets
        return tuple(card.digit for card in cards)

    def calls(self) -> tuple[ToolCall, ...]:
        """The ideal tool calls, thoughts included."""
        places = ", ".join(f"{c.colour} row {c.row} column {c.column}" for c in self.targets)
        first = ToolCall(tuple(Region(0, c.cell_box) for c in self.targets), self.query, places)
        if self.kind is not QuestionKind.NESTED:
            return (first,)
        (card,) = self.targets
        y, x = card.quadrant
        return first, ToolCall((Region(1, card.quadrant_box),), self.query, f"small row {y} column {x}")

    def final_thought(self) -> str:
        """What the ideal last turn thinks: the digits it reads."""
        joiner = "+" if self.kind is QuestionKind.SUM else ","
        return joiner.join(map(str, self.digits))


# ---------------------------------------------------------------------------------------------------- scans


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


@functools.cache
def scan_ids(split: Split) -> np.ndarray:
    """Indices into scikit-learn's 1,797 digit scans: 1,237 train, 200 dev, 360 held out, disjoint."""
    order = np.random.default_rng(0).permutation(1797)
    return {"train": order[:1237], "dev": order[1237:1437], "heldout": order[1437:]}[split]


def _scan(rng: np.random.Generator, split: Split) -> tuple[np.ndarray, int]:
    """One scan, (8, 8) in 0..1, and its digit; training scans are turned, sheared and scaled a little."""
    images, digits = _scans()
    i = int(rng.choice(scan_ids(split)))
    scan = images[i]
    if split == "train":
        turn, shear, scale = rng.normal(0, 0.1), rng.normal(0, 0.1), 1 + rng.normal(0, 0.06)
        a, b, c, d = scale * math.cos(turn), shear - math.sin(turn), math.sin(turn), scale * math.cos(turn)
        dx, dy = rng.normal(0, 0.3, 2)
        centre = 16
        matrix = (a, b, centre - (a + b) * centre + 4 * dx, c, d, centre - (c + d) * centre + 4 * dy)
        big = Image.fromarray(np.round(scan * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        big = big.transform((32, 32), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        scan = np.asarray(big.reduce(4), np.float32) / 255
    return scan, int(digits[i])


# ---------------------------------------------------------------------------------------------------- drawing


@functools.cache
def _canvases() -> tuple[np.ndarray, ...]:
    """Eight tinted canvases that differ in their grain."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:CANVAS, :CANVAS] / CANVAS
    unit = CANVAS // (2 * CELLS)
    corner = 2 * (np.arange(CANVAS) // unit % 2)[:, None] + (np.arange(CANVAS) // unit % 2)
    tint = np.stack((50 + 160 * x, 50 + 160 * y, 98 + 20.0 * corner), -1)
    grain = [rng.normal(0, 4, (CANVAS, CANVAS, 1)) for _ in range(8)]
    return tuple((tint + g).clip(0, 255).astype(np.uint8) for g in grain)


_CHECKER = np.array([[1, -1], [-1, 1]], np.float32)
_BIT = 2.0 * (np.indices((CROP // 8, CROP // 8)).sum(0) % 2) - 1
_BIT -= _BIT.mean()
"""One bit of a plate in the crop: checks of one pixel, whose phase is the bit. A patch of 14 pixels holds 2 x 2."""


def _draw(canvas: np.ndarray, rng: np.random.Generator, card: Card, scan: np.ndarray) -> None:
    unit = 1 if card.small else 2  # source pixels per checker
    x1, y1, x2, y2 = card.box
    colour = np.array(COLOURS[card.colour]) + rng.normal(0, 8, 3)
    canvas[y1:y2, x1:x2] = colour.clip(0, 255)
    ink = np.kron(scan, np.kron(_CHECKER, np.ones((unit, unit), np.float32)))
    contrast = (SMALL_CONTRAST if card.small else BIG_CONTRAST) * rng.uniform(0.85, 1.0)
    # one square per pixel of the look in which the print averages out: covers what the resampling filter leaves of it
    stains = np.kron(rng.normal(0, STAINS, (8, 8)), np.ones((2 * unit, 2 * unit)))
    paper = rng.uniform(125, 135) + contrast * ink + rng.normal(0, 3, ink.shape) + stains
    frame = 4 * unit
    canvas[y1 + frame : y2 - frame, x1 + frame : x2 - frame] = paper.clip(0, 255)[..., None]


def _draw_plate(canvas: np.ndarray, rng: np.random.Generator, card: Card, bits: np.ndarray) -> None:
    x1, y1, x2, y2 = card.box
    colour = (np.array(COLOURS[card.colour]) + rng.normal(0, 8, 3)).clip(0, 255)
    ink = np.kron(bits, np.kron(_BIT, np.ones((2, 2))))
    stains = np.kron(rng.normal(0, PLATE_STAINS, (CELL, CELL)), np.ones((SCALE, SCALE)))
    paper = rng.uniform(125, 135) + PLATE_CONTRAST * rng.uniform(0.85, 1.0) * ink + rng.normal(0, 3, ink.shape) + stains
    canvas[y1:y2, x1:x2] = paper.clip(0, 255)[..., None]
    frame = SCALE  # laid over the print, so that the bits keep to the patches
    for edge in (slice(y1, y1 + frame), slice(y2 - frame, y2)):
        canvas[edge, x1:x2] = colour
    for edge in (slice(x1, x1 + frame), slice(x2 - frame, x2)):
        canvas[y1:y2, edge] = colour


def _plates(
    rng: np.random.Generator, split: Split, canvas: np.ndarray, cells: Sequence[int], colours: Sequence[str]
) -> tuple[list[Card], np.ndarray]:
    """Draw two plates that share a digit; returns them and where their prints agree."""
    scan, digit = _scan(rng, split)
    ink = scan > INK
    first = rng.choice([-1.0, 1.0], ink.shape)
    cards = []
    for cell, colour, bits in zip(cells, colours, (first, np.where(ink, first, -first)), strict=True):
        row, column = divmod(cell, CELLS)
        x, y = column * SCALE * CELL, row * SCALE * CELL
        box = (x, y, x + SCALE * CELL, y + SCALE * CELL)
        card = Card(colour, digit, row, column, (0, 0), None, box, plate=True)
        _draw_plate(canvas, rng, card, bits)
        cards.append(card)
    return cards, ink


def _place(rng: np.random.Generator, colour: str, digit: int, cell: int, quadrant: int, small: bool) -> Card:
    row, column = divmod(cell, CELLS)
    qy, qx = divmod(quadrant, 2)
    x, y = column * 4 * CELL + qx * 2 * CELL, row * 4 * CELL + qy * 2 * CELL
    side, step, part = 48, 4, None
    if small:
        part = (int(rng.integers(2)), int(rng.integers(2)))
        x, y = x + part[1] * CELL, y + part[0] * CELL
        side, step = 24, 2
    # a whole number of checkers, so that the print keeps its phase on the pixel grid of the zoom
    x, y = x + step * int(rng.integers(2)), y + step * int(rng.integers(2))
    return Card(colour, digit, row, column, (qy, qx), part, (x, y, x + side, y + side))


def make_scene(
    rng: np.random.Generator,
    split: Split = "train",
    *,
    singles: int = 2,
    pairs: int = 1,
    nests: Sequence[int] = (2,),
    plates: bool = False,
) -> Scene:
    """Draw a scene.

    Args:
        rng: the only source of chance.
        split: which digit scans may appear.
        singles: cells with one big card.
        pairs: cells with two big cards.
        nests: small cards of each cell that holds small cards (at most 4 each).
        plates: add two plates that share a digit, drawn after everything else.

    Returns:
        A scene whose cards differ in colour; at most six of them.
    """
    order = rng.permutation(CELLS * CELLS).tolist()
    exact = [c for c in order if c // CELLS not in SHIFTED_ROWS and c % CELLS not in SHIFTED_COLUMNS]
    nested = exact[: len(nests)]
    chosen = [c for c in order if c not in nested][: singles + pairs] + nested
    cells = iter(chosen)
    colours = iter(rng.permutation(list(COLOURS)).tolist())
    canvas = _canvases()[rng.integers(8)].copy()
    cards = []
    layout = [(1, False)] * singles + [(2, False)] * pairs + [(n, True) for n in nests]
    for count, small in layout:
        cell = next(cells)
        for quadrant in rng.choice(4, count, replace=False).tolist():
            scan, digit = _scan(rng, split)
            card = _place(rng, next(colours), digit, cell, quadrant, small)
            _draw(canvas, rng, card, scan)
            cards.append(card)
    ink = None
    if plates:
        free = [c for c in order if c not in chosen][:2]
        more, ink = _plates(rng, split, canvas, free, [next(colours), next(colours)])
        cards += more
    return Scene(Image.fromarray(canvas), tuple(cards), ink)


def scene_about(rng: np.random.Generator, split: Split, kind: QuestionKind) -> Scene:
    """A scene of the usual size that has what questions of this kind need."""
    if kind is QuestionKind.SHARED:
        return make_scene(rng, split, singles=2, pairs=0, nests=(2,), plates=True)
    return make_scene(rng, split)


def query_for(cards: Sequence[Card]) -> str:
    """The query that asks for the digits of these cards."""
    colours = " and ".join(c.colour for c in cards)
    if all(card.plate for card in cards):
        return f"digit on the {colours} cards together"
    return f"digit on the {colours} card" if len(cards) == 1 else f"digits on the {colours} cards"


def ask_about(rng: np.random.Generator, scene: Scene, kind: QuestionKind) -> SceneQuestion:
    """A question of this kind about the scene.

    Raises:
        ValueError: the scene has no cards for it.
    """
    alone = [c for c in scene.cards if not c.small and not c.plate and len(scene.in_cell(c)) == 1]
    groups = {
        QuestionKind.ONE: alone,
        QuestionKind.PAIR: [c for c in scene.cards if not c.small and len(scene.in_cell(c)) == 2],
        QuestionKind.NESTED: [c for c in scene.cards if c.small],
    }
    fit = [c for c in scene.cards if c.plate] if kind is QuestionKind.SHARED else groups.get(kind, alone)
    wanted = 1 if kind in groups else 2
    if len(fit) < wanted:
        raise ValueError(f"a {kind} question needs {wanted} fitting cards, the scene has {len(fit)}")
    targets = tuple(fit[i] for i in rng.permutation(len(fit))[:wanted])
    query, colours = query_for(targets), " and ".join(c.colour for c in targets)
    digits = [c.digit for c in targets]
    text, answer = {
        QuestionKind.SUM: (f"What is the sum of the digits on the {colours} cards?", sum(digits)),
        QuestionKind.LARGER: (f"What is the larger digit on the {colours} cards?", max(digits)),
        QuestionKind.SHARED: (f"Which digit is on the {colours} cards together?", digits[0]),
    }.get(kind, (f"Which digit is on the {colours} card?", digits[0]))
    return SceneQuestion(kind, text, query, targets, str(answer))


def examples(seed: int, split: Split, counts: dict[QuestionKind, int]) -> list[tuple[Scene, SceneQuestion]]:
    """A fixed set of questions, each about its own scene: `counts` says how many of each kind."""
    out = []
    for kind, i in itertools.chain.from_iterable(((k, i) for i in range(n)) for k, n in counts.items()):
        rng = np.random.default_rng([seed, list(QuestionKind).index(kind), i])
        scene = scene_about(rng, split, kind)
        out.append((scene, ask_about(rng, scene, kind)))
    return out
