"""Scenes of digit cards for the tiny model: images, questions and the ideal conversation about each.

A canvas of 672 x 672 source pixels is shown at 168 x 168 (1/4), so one merged vision token (28 shown pixels) is one
*cell* of 112 source pixels. Cards carry a real scanned digit (scikit-learn's 8 x 8 scans) in fine print: every scan
pixel is a 2 x 2 checkerboard whose contrast is the ink. One zoom magnifies twice:

- a *big* card's checkers average out to plain paper in the first look and appear after one zoom (of its cell);
- a *small* card is half that size in every respect and needs a second zoom (of its quadrant of the first crop).

The ground is the light of a photograph, tinted: red rises with x, green with y, blue is one of four levels by quadrant
of the cell. The vision tower knows relative positions only; the tint, which is the difference of the channels and not
their light, tells it where a cell or a quadrant is. All boxes of the ideal conversations are cells of the grid.

Two *plates*, cards that fill their cells, share a digit: every bit of either print alone is a fair coin, where they
agree there is ink, where they differ there is paper. One plate says nothing about the digit, however well it is read.

A scene has one image, or several, or the frames of a clip: one ground, and every card in one frame only. No two cards
of a scene have the same colour, whatever image they are in.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
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
"""Side of the source image, pixels."""
CROP = 2 * CELL
"""Side of every crop, pixels: a cell or a quadrant, magnified twice."""
MAX_PIXELS = SHOWN * SHOWN
"""Pixel budget that makes the crop rule show the canvas at 1/4."""

SHIFTED_ROWS, SHIFTED_COLUMNS = frozenset({3}), frozenset({2, 3, 4})
"""Where a nested crop is not pixel for pixel a quadrant of the source: the crop rule truncates to whole pixels, and in
floating point 3 / 6 + 1 / 12 is a little less than 7 / 12 and 2 * 28 / (3 / 6 - 2 / 6) a little less than 336. That
would blur the print of small cards; they are put elsewhere."""

MOST_PICTURES = 4
"""Images or frames that a scene has at most."""

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

GROUND_CONTRAST, GROUND_LIMIT = 22.0, 45.0
"""Standard deviation of a photograph's light in the ground, and its bound, grey levels."""

PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": (
        "sklearn.datasets.images/china.jpg",
        "skimage.data/astronaut.png",
        "skimage.data/camera.png",
        "skimage.data/motorcycle_left.png",
        "skimage.data/brick.png",
        "skimage.data/grass.png",
        "skimage.data/coins.png",
        "skimage.data/hubble_deep_field.jpg",
    ),
    "dev": ("sklearn.datasets.images/flower.jpg", "skimage.data/gravel.png", "skimage.data/moon.png"),
    "heldout": ("skimage.data/chelsea.png", "skimage.data/rocket.jpg", "skimage.data/coffee.png"),
}
"""Photographs that scikit-learn and scikit-image ship, package and file, by the split that may show them."""

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
    """Two regions in one call; add."""
    LARGER = "larger"
    """Two regions in one call; compare."""
    SHARED = "shared"
    """Two plates in one call, encoded jointly: neither holds the digit, only both do."""
    WHICH = "which"
    """Several images: which one holds a card. The first look says it."""
    SUM_ACROSS = "sum-across"
    """Two regions of different images in one call; add."""
    LARGER_ACROSS = "larger-across"
    """Two regions of different images in one call; compare."""
    SHARED_ACROSS = "shared-across"
    """Two plates in different images, in one call, encoded jointly."""
    FRAME = "frame"
    """A clip: in which frame a card is shown. The first look says it."""
    FIRST = "first"
    """A clip: which of two cards is shown first, and a zoom into that frame to read it."""


ACROSS_KINDS = (
    QuestionKind.WHICH,
    QuestionKind.SUM_ACROSS,
    QuestionKind.LARGER_ACROSS,
    QuestionKind.SHARED_ACROSS,
)
"""Questions about several images."""

CLIP_KINDS = (QuestionKind.FRAME, QuestionKind.FIRST)
"""Questions about a clip."""

SHARED_KINDS = (QuestionKind.SHARED, QuestionKind.SHARED_ACROSS)
"""Questions about plates."""


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
    picture: int = 0
    """Index of the image or frame that shows it."""

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
    """Images (RGB, `CANVAS` x `CANVAS`) and their cards."""

    images: tuple[Image.Image, ...]
    cards: tuple[Card, ...]
    ink: np.ndarray | None = None
    """(8, 8) of bool, where the prints of the two plates agree; None: no plates."""
    clip: bool = False
    """Whether the images are the frames of a clip, in order of time."""

    @property
    def image(self) -> Image.Image:
        """The image of a scene that has one.

        Raises:
            ValueError: it has several.
        """
        if len(self.images) != 1:
            raise ValueError(f"the scene has {len(self.images)} images; take Scene.images")
        return self.images[0]

    def in_cell(self, card: Card) -> tuple[Card, ...]:
        """Cards of the same cell, the card itself included."""
        place = (card.picture, card.row, card.column)
        return tuple(c for c in self.cards if (c.picture, c.row, c.column) == place)

    def shown(self) -> tuple[Image.Image, ...]:
        """The first look, `SHOWN` x `SHOWN` each: what `regions` makes of the images under `MAX_PIXELS`."""
        return tuple(image.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC) for image in self.images)

    def cell(self, card: Card) -> Image.Image:
        """The crop after the ideal first call, `CROP` x `CROP`."""
        x1, y1, x2, y2 = (v * SCALE for v in card.cell_box)
        return self.images[card.picture].crop((x1, y1, x2, y2)).resize((CROP, CROP), Image.Resampling.LANCZOS)

    def quadrant(self, card: Card) -> Image.Image:
        """The crop after the ideal second call, `CROP` x `CROP`, at source scale."""
        x, y = card.column * CELL * SCALE + card.quadrant[1] * CROP, card.row * CELL * SCALE + card.quadrant[0] * CROP
        return self.images[card.picture].crop((x, y, x + CROP, y + CROP))


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene, its answer and the ideal way there."""

    kind: QuestionKind
    text: str
    query: str
    """The query of every ideal call; empty if there is none."""
    named: tuple[Card, ...]
    """Cards that the question names, in its order."""
    targets: tuple[Card, ...]
    """Those among them that must be zoomed into."""
    answer: str
    pictures: int = 1
    """Of the scene."""

    @property
    def digits(self) -> tuple[int, ...]:
        """What is to be read from crops: a digit per card, one of both plates."""
        cards = self.targets[:1] if self.kind in SHARED_KINDS else self.targets
        return tuple(card.digit for card in cards)

    def calls(self) -> tuple[ToolCall, ...]:
        """The ideal tool calls, thoughts included; none if the first look is enough."""
        if not self.targets:
            return ()
        places = [words_for_place(c, self.pictures) for c in self.targets]
        if self.kind is QuestionKind.FIRST:  # find both, name the smaller number, then the card that has it
            (card,) = self.targets
            places = [f"{c.colour} index {c.picture}" for c in self.named] + [f"first {card.picture} {places[0]}"]
        regions = tuple(Region(c.picture, c.cell_box) for c in self.targets)
        first = ToolCall(regions, self.query, ", ".join(places))
        if self.kind is not QuestionKind.NESTED:
            return (first,)
        (card,) = self.targets
        y, x = card.quadrant
        second = Region(self.pictures, card.quadrant_box)
        return first, ToolCall((second,), self.query, f"small row {y} column {x}")

    def final_thought(self) -> str:
        """What the ideal last turn thinks: the digits it reads, or where the first look shows the card."""
        if not self.targets:
            (card,) = self.named
            return f"{card.colour} index {card.picture}"
        joiner = "+" if self.kind in (QuestionKind.SUM, QuestionKind.SUM_ACROSS) else ","
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
def grounds(split: Split) -> tuple[np.ndarray, ...]:
    """Tinted canvases: four cuts out of every photograph of the split."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:CANVAS, :CANVAS] / CANVAS
    unit = CANVAS // (2 * CELLS)
    corner = 2 * (np.arange(CANVAS) // unit % 2)[:, None] + (np.arange(CANVAS) // unit % 2)
    tint = np.stack((50 + 160 * x, 50 + 160 * y, 98 + 20.0 * corner), -1)
    out = []
    for name in PHOTOGRAPHS[split]:
        light = _light(name)
        for _ in range(4):
            top, left = (int(rng.integers(0, n - CANVAS + 1)) for n in light.shape)
            cut = light[top : top + CANVAS, left : left + CANVAS]
            cut = (cut - cut.mean()) * (GROUND_CONTRAST / max(cut.std(), 1.0))
            grain = rng.normal(0, 4, (CANVAS, CANVAS, 1))
            ground = tint + cut.clip(-GROUND_LIMIT, GROUND_LIMIT)[..., None] + grain
            out.append(ground.clip(0, 255).astype(np.uint8))
    return tuple(out)


def _light(name: str) -> np.ndarray:
    """A photograph in grey levels, its shorter side a fourth longer than a canvas: float32 (H, W)."""
    package, _, file = name.partition("/")
    with resources.files(package).joinpath(file).open("rb") as stream, Image.open(stream) as image:
        grey = image.convert("L")
    factor = 1.25 * CANVAS / min(grey.size)
    size = (math.ceil(grey.width * factor), math.ceil(grey.height * factor))
    return np.asarray(grey.resize(size, Image.Resampling.BICUBIC), np.float32)


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
    rng: np.random.Generator,
    split: Split,
    canvases: Sequence[np.ndarray],
    places: Sequence[tuple[int, int]],
    colours: Sequence[str],
    twins: bool,
) -> tuple[list[Card], np.ndarray]:
    """Draw two plates at these places (image and cell) that share a digit; returns them and where they agree."""
    scan, digit = _scan(rng, split)
    ink = np.full(scan.shape, rng.random() < 0.5) if twins else scan > INK
    first = rng.choice([-1.0, 1.0], ink.shape)
    cards = []
    for (picture, cell), colour, bits in zip(places, colours, (first, np.where(ink, first, -first)), strict=True):
        row, column = divmod(cell, CELLS)
        x, y = column * SCALE * CELL, row * SCALE * CELL
        box = (x, y, x + SCALE * CELL, y + SCALE * CELL)
        card = Card(colour, digit, row, column, (0, 0), None, box, plate=True, picture=picture)
        _draw_plate(canvases[picture], rng, card, bits)
        cards.append(card)
    return cards, ink


def _place(
    rng: np.random.Generator,
    colour: str,
    digit: int,
    cell: int,
    quadrant: int,
    *,
    small: bool = False,
    picture: int = 0,
) -> Card:
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
    return Card(colour, digit, row, column, (qy, qx), part, (x, y, x + side, y + side), picture=picture)


def make_scene(
    rng: np.random.Generator,
    split: Split = "train",
    *,
    singles: int = 2,
    pairs: int = 1,
    nests: Sequence[int] = (2,),
    plates: bool = False,
    twins: bool = False,
) -> Scene:
    """Draw a scene of one image.

    Args:
        rng: the only source of chance.
        split: which digit scans and photographs may appear.
        singles: cells with one big card.
        pairs: cells with two big cards.
        nests: small cards of each cell that holds small cards (at most 4 each).
        plates: add two plates that share a digit, drawn after everything else.
        twins: the prints of the plates agree everywhere or nowhere, and hold no digit: what training begins with.

    Returns:
        A scene whose cards differ in colour; at most six of them.
    """
    order = rng.permutation(CELLS * CELLS).tolist()
    exact = [c for c in order if c // CELLS not in SHIFTED_ROWS and c % CELLS not in SHIFTED_COLUMNS]
    nested = exact[: len(nests)]
    chosen = [c for c in order if c not in nested][: singles + pairs] + nested
    cells = iter(chosen)
    colours = iter(rng.permutation(list(COLOURS)).tolist())
    canvas = _ground(rng, split).copy()
    cards = []
    layout = [(1, False)] * singles + [(2, False)] * pairs + [(n, True) for n in nests]
    for count, small in layout:
        cell = next(cells)
        for quadrant in rng.choice(4, count, replace=False).tolist():
            scan, digit = _scan(rng, split)
            card = _place(rng, next(colours), digit, cell, quadrant, small=small)
            _draw(canvas, rng, card, scan)
            cards.append(card)
    ink = None
    if plates:
        free = [(0, c) for c in order if c not in chosen][:2]
        more, ink = _plates(rng, split, [canvas], free, [next(colours), next(colours)], twins)
        cards += more
    return Scene((Image.fromarray(canvas),), tuple(cards), ink)


def make_series(
    rng: np.random.Generator,
    split: Split = "train",
    *,
    pictures: int = 3,
    singles: int = 4,
    plates: bool = False,
    clip: bool = False,
) -> Scene:
    """Draw a scene of several images, or a clip.

    Args:
        rng: the only source of chance.
        split: which digit scans and photographs may appear.
        pictures: how many.
        singles: big cards, each alone in its cell, in any of the images: at least two of these show one.
        plates: add two plates that share a digit, in two images.
        clip: one ground for all: the frames of a clip in which each card is shown once.

    Returns:
        A scene whose cards differ in colour; at most six of them.
    """
    colours = iter(rng.permutation(list(COLOURS)).tolist())
    if clip:
        canvases = [_ground(rng, split)] * pictures
    else:
        canvases = [_ground(rng, split) for _ in range(pictures)]
    canvases = [canvas.copy() for canvas in canvases]
    # two cards are in different pictures, the others anywhere
    shows = [*rng.permutation(pictures)[:2].tolist(), *rng.integers(0, pictures, max(0, singles - 2)).tolist()]
    cells = rng.permutation(CELLS * CELLS).tolist()
    cards = []
    for picture, cell in zip(shows[:singles], cells, strict=False):
        scan, digit = _scan(rng, split)
        card = _place(rng, next(colours), digit, cell, int(rng.integers(4)), picture=picture)
        _draw(canvases[picture], rng, card, scan)
        cards.append(card)
    ink = None
    if plates:
        where = rng.permutation(pictures)[:2].tolist()
        free = list(zip(where, cells[singles : singles + 2], strict=True))
        more, ink = _plates(rng, split, canvases, free, [next(colours), next(colours)], False)
        cards += more
    return Scene(tuple(Image.fromarray(canvas) for canvas in canvases), tuple(cards), ink, clip)


def _ground(rng: np.random.Generator, split: Split) -> np.ndarray:
    canvases = grounds(split)
    return canvases[rng.integers(len(canvases))]


def scene_about(rng: np.random.Generator, split: Split, kind: QuestionKind, *, pictures: int | None = None) -> Scene:
    """A scene of the usual size that has what questions of this kind need.

    Args:
        rng: the only source of chance.
        split: which digit scans and photographs may appear.
        kind: of the questions.
        pictures: of a kind about several, or frames of a clip; None: two to four, chosen by `rng`.
    """
    if kind in ACROSS_KINDS or kind in CLIP_KINDS:
        plates = kind is QuestionKind.SHARED_ACROSS
        count = int(rng.integers(2, MOST_PICTURES + 1)) if pictures is None else pictures
        return make_series(
            rng, split, pictures=count, singles=2 if plates else 4, plates=plates, clip=kind in CLIP_KINDS
        )
    if kind is QuestionKind.SHARED:
        return make_scene(rng, split, singles=2, pairs=0, nests=(2,), plates=True)
    return make_scene(rng, split)


def words_for_place(card: Card, pictures: int) -> str:
    """Where a card is, in the words of the ideal conversations; the index of its image if there are several."""
    index = f" index {card.picture}" if pictures > 1 else ""
    return f"{card.colour}{index} row {card.row} column {card.column}"


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
    single = {
        QuestionKind.ONE: alone,
        QuestionKind.PAIR: [c for c in scene.cards if not c.small and len(scene.in_cell(c)) == 2],
        QuestionKind.NESTED: [c for c in scene.cards if c.small],
        QuestionKind.WHICH: alone,
        QuestionKind.FRAME: alone,
    }
    fit = [c for c in scene.cards if c.plate] if kind in SHARED_KINDS else single.get(kind, alone)
    wanted = 1 if kind in single else 2
    fit = [fit[i] for i in rng.permutation(len(fit))]
    if kind in (QuestionKind.SUM_ACROSS, QuestionKind.LARGER_ACROSS, QuestionKind.FIRST):
        fit = fit[:1] + [c for c in fit if c.picture != fit[0].picture]
    if len(fit) < wanted or (kind in CLIP_KINDS) != scene.clip:
        raise ValueError(
            f"a {kind} question needs {wanted} fitting cards, the scene has {len(fit)}, clip: {scene.clip}"
        )
    named = tuple(fit[:wanted])
    targets = named
    if kind in (QuestionKind.WHICH, QuestionKind.FRAME):
        targets = ()
    elif kind is QuestionKind.FIRST:
        targets = (min(named, key=lambda card: card.picture),)
    text, answer = _wording(kind, named, targets)
    query = query_for(targets) if targets else ""
    return SceneQuestion(kind, text, query, named, targets, str(answer), len(scene.images))


def _wording(kind: QuestionKind, named: Sequence[Card], targets: Sequence[Card]) -> tuple[str, int]:
    """Text and answer of a question."""
    colours = " and ".join(c.colour for c in named)
    digits = [c.digit for c in targets]
    match kind:
        case QuestionKind.SUM | QuestionKind.SUM_ACROSS:
            return f"What is the sum of the digits on the {colours} cards?", sum(digits)
        case QuestionKind.LARGER | QuestionKind.LARGER_ACROSS:
            return f"What is the larger digit on the {colours} cards?", max(digits)
        case QuestionKind.SHARED | QuestionKind.SHARED_ACROSS:
            return f"Which digit is on the {colours} cards together?", digits[0]
        case QuestionKind.WHICH:
            return f"Which picture holds the {colours} card?", named[0].picture
        case QuestionKind.FRAME:
            return f"Which frame shows the {colours} card?", named[0].picture
        case QuestionKind.FIRST:
            either = " or on the ".join(c.colour for c in named)
            return f"Which digit is shown first, on the {either} card?", digits[0]
    return f"Which digit is on the {colours} card?", digits[0]
