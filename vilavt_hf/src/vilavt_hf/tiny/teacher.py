"""The ideal conversations of the tiny model as training examples, with what the auxiliary losses need to know.

The token stream is the one `vilavt_core.episode` makes when it is fed the ideal turns (a test compares the two); it is
built here a second time because training needs thousands of them a minute, together with the positions of single words.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from vilavt_core.data.example import ImageGroup
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import Answer, format_turn

from .lesson import AttentionTarget, Lesson, TokenTarget
from .scenes import (
    CELLS,
    COLOURS,
    TAUGHT_KINDS,
    Card,
    QuestionKind,
    Scene,
    SceneQuestion,
    ask_about,
    make_scene,
    query_for,
)

COLOUR_NAMES = list(COLOURS)

NUMBER_WEIGHT = 3.0
"""Loss weight of digits, places and coordinates; words and punctuation weigh 1."""

LISTING_REQUEST = "Where is each card?"
"""A training-only task: name the place of every card."""

BIND_TEXT, BIND_IMAGE = 1, 2
"""Language model layers whose attention is supervised: to the colour word, then to the image token it names."""
_TEXT_HEADS, _LOOK_HEADS, _READ_HEADS = (0, 1), (0, 1), (2, 3)


@dataclass
class _Stream:
    """Token ids, labels and weights of one conversation while it grows, in the layout of the episode."""

    encoder: "Encoder"
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    pending: str = ""

    def text(self, text: str) -> None:
        """Text that the model reads; neighbouring text is encoded as one string."""
        self.pending += text

    def flush(self) -> int:
        """Encode the pending text; returns the position after it."""
        if self.pending:
            self._append(self.encoder.encode(self.pending), supervised=False)
            self.pending = ""
        return len(self.ids)

    def special(self, token: int, *, supervised: bool = False) -> None:
        """One special token."""
        self.flush()
        self._append((token,), supervised=supervised)

    def image(self, tokens: int) -> None:
        """An image's placeholders between their delimiters."""
        start, pad, end = self.encoder.vision_ids
        self.special(start)
        self.image_starts.append(len(self.ids))
        self._append((pad,) * tokens, supervised=False)
        self._append((end,), supervised=False)

    def _append(self, ids: Sequence[int], *, supervised: bool) -> None:
        self.ids.extend(ids)
        self.labels.extend(ids if supervised else (-100,) * len(ids))
        self.weights.extend((1.0,) * len(ids))

    def turn(self, text: str) -> "_Turn":
        """An assistant turn, supervised, end token included."""
        begin = self.flush()
        encoding = self.encoder.tokenizer._tokenizer.encode(text, add_special_tokens=False)
        self._append(encoding.ids, supervised=True)
        for i, token in enumerate(encoding.ids):
            if token in self.encoder.number_ids:
                self.weights[begin + i] = NUMBER_WEIGHT
        self.special(self.encoder.end_of_turn, supervised=True)
        return _Turn(text, begin, [start for start, _ in encoding.offsets])


@dataclass(frozen=True)
class _Turn:
    text: str
    begin: int
    starts: list[int]

    def at(self, character: int) -> int:
        """Position in the stream of the token that holds this character."""
        return self.begin + int(np.searchsorted(self.starts, character, side="right")) - 1

    def words(self, words: Iterable[str], start: int = 0) -> list[int]:
        """Positions of these words, searched one after the other from character `start`."""
        found = []
        for word in words:
            start = self.text.index(word, start)
            found.append(self.at(start))
            start += len(word)
        return found


class Encoder:
    """Text to ids for the streams of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet):
        self.tokenizer, self.prompts = tokenizer, prompts
        vocabulary = tokenizer.get_vocab()
        self.start_of_turn, self.end_of_turn = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
        self.vision_ids = tuple(vocabulary[t] for t in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))
        decoded = {token: tokenizer.decode([i]) for token, i in vocabulary.items() if i > 6}
        self.number_ids = {vocabulary[token] for token, text in decoded.items() if text.strip().isdigit()}
        self.encode = functools.lru_cache(maxsize=4096)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


# ---------------------------------------------------------------------------------------------------- one example


def _opening(stream: _Stream, question: str, *, zoom: bool = True) -> list[int]:
    """System and user turn up to the assistant's first token; returns the positions of the question's tokens."""
    encoder, prompts = stream.encoder, stream.encoder.prompts
    stream.special(encoder.start_of_turn)
    stream.text("system\n" + prompts.text("system"))
    stream.special(encoder.end_of_turn)
    stream.text("\n")
    stream.special(encoder.start_of_turn)
    stream.text("user\n")
    for part in prompts.render("original", image=0, index=0):
        stream.image(CELLS * CELLS) if isinstance(part, int) else stream.text(part)
    begin = len(stream.ids)
    stream.text(prompts.text("user" if zoom else "user_no_zoom", question=question, images=""))
    end = stream.flush()
    _close(stream)
    return list(range(begin, end))


def _close(stream: _Stream) -> None:
    stream.special(stream.encoder.end_of_turn)
    stream.text("\n")
    stream.special(stream.encoder.start_of_turn)
    stream.text("assistant\n")


def _response(stream: _Stream, first_index: int, count: int, *, final: bool, opening: bool = False) -> None:
    """A tool response with crops of four tokens each."""
    prompts = stream.encoder.prompts
    if not opening:
        stream.text("\n")
    stream.special(stream.encoder.start_of_turn)
    stream.text("user\n<tool_response>")
    for index in range(first_index, first_index + count):
        for part in prompts.render("crop", image=index, index=index):
            stream.image(4) if isinstance(part, int) else stream.text(part)
    stream.text(prompts.text("final" if final else "continue") + "</tool_response>")
    _close(stream)


def _look(positions: Iterable[int], token: int, heads: tuple[int, ...] = _LOOK_HEADS) -> list[AttentionTarget]:
    """Where layer `BIND_IMAGE` should look when it predicts the tokens at `positions`."""
    return [AttentionTarget(BIND_IMAGE, heads, p - 1, token) for p in positions]


def _recall(positions: Iterable[int], token: int) -> list[AttentionTarget]:
    """Which earlier word layer `BIND_TEXT` should look at."""
    return [AttentionTarget(BIND_TEXT, _TEXT_HEADS, p - 1, token) for p in positions]


def _place_words(turn: _Turn, card: Card, colour_at: int) -> list[int]:
    """Positions of row and column number after the card's colour word at character `colour_at`."""
    text = turn.text
    row = text.index(" row ", colour_at) + 5
    column = text.index(" column ", row) + 8
    return [turn.at(row), turn.at(column)]


def _first_call(
    stream: _Stream, question: SceneQuestion, question_span: list[int]
) -> tuple[_Turn, list[AttentionTarget]]:
    call = question.calls()[0]
    turn = stream.turn(format_turn(call))
    targets: list[AttentionTarget] = []
    character, box_character = 0, turn.text.index("<tool>")
    query_character = turn.text.rindex('"query"')
    for card in question.targets:
        asked = _find(stream, question_span, card.colour)
        character = turn.text.index(card.colour, character)
        named = turn.at(character)
        place = stream.image_starts[0] + card.row * CELLS + card.column
        written = _place_words(turn, card, character)
        box_character = turn.text.index("bbox_2d", box_character) + len("bbox_2d")
        numbers = turn.words(map(str, card.cell_box), box_character)
        targets += _recall([named], asked) + _look([*written, *numbers], place)
        targets += _recall([*written, *numbers, *turn.words([card.colour], query_character)], named)
        character += 1
    return turn, targets


def _find(stream: _Stream, span: list[int], colour: str) -> int:
    (wanted,) = stream.encoder.encode(" " + colour)
    return next(p for p in span if stream.ids[p] == wanted)


def _colour_rows(cards: Iterable[tuple[int, Card]], tokens: int) -> np.ndarray:
    rows = np.zeros((tokens, len(COLOUR_NAMES)), np.float32)
    for token, card in cards:
        rows[token, COLOUR_NAMES.index(card.colour)] = 1
    return rows


def _first_look(scene: Scene, image: int) -> list[TokenTarget]:
    """What every token of the first look should know: where it is and which colours it holds."""
    tokens = np.arange(CELLS * CELLS)
    cards = [(c.row * CELLS + c.column, c) for c in scene.cards]
    return [
        TokenTarget("row", image, tokens // CELLS),
        TokenTarget("column", image, tokens % CELLS),
        TokenTarget("colour", image, _colour_rows(cards, CELLS * CELLS)),
    ]


def _crop_targets(scene: Scene, card: Card, image: int, *, quadrant: bool) -> list[TokenTarget]:
    """What the tokens of a crop should know: colours, digits, and the card that the query asks for."""
    if card.plate:
        return [
            TokenTarget("colour", image, _colour_rows([(token, card) for token in range(4)], 4)),
            TokenTarget("corner", image, np.arange(4)),
        ]
    inside = scene.in_cell(card)
    if quadrant:
        inside = tuple(c for c in inside if c.quadrant == card.quadrant)
    token_of = {c.colour: c.token if quadrant else 2 * c.quadrant[0] + c.quadrant[1] for c in inside}
    readable = quadrant or not card.small
    out = [
        TokenTarget("colour", image, _colour_rows([(token_of[c.colour], c) for c in inside], 4)),
        TokenTarget("asked", image, np.array([token_of[card.colour]])),
    ]
    if not quadrant:
        out.append(TokenTarget("corner", image, np.arange(4)))
    if readable:
        digits = np.full(4, -100)
        for c in inside:
            digits[token_of[c.colour]] = c.digit
        out += [TokenTarget("digit_seen", image, digits), TokenTarget("digit", image, np.array([card.digit]))]
    return out


def _shared_targets(scene: Scene, cards: Sequence[Card], first_image: int) -> tuple[list[TokenTarget], list]:
    """What plates encoded together should know beside their own: the ink and the digit; and that they belong together.

    Returns:
        The targets, and the pair of images; nothing if the cards are no plates.
    """
    if scene.ink is None or not all(card.plate for card in cards):
        return [], []
    ink = scene.ink.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16).astype(np.float32)
    tokens = []
    for image in range(first_image, first_image + 2):
        tokens += [TokenTarget("ink", image, ink), TokenTarget("digit", image, np.array([cards[0].digit]))]
    return tokens, [(first_image, first_image + 1)]


def _group(scene: Scene, cards: Sequence[Card], *, quadrant: bool = False) -> ImageGroup:
    images = tuple(scene.quadrant(c) if quadrant else scene.cell(c) for c in cards)
    return ImageGroup(images, query_for(cards))


def _readings(rng: np.random.Generator, scene: Scene, count: int, first_image: int) -> tuple[list, list]:
    """Extra crops under their query, for the tower alone."""
    groups: list[ImageGroup] = []
    targets: list[TokenTarget] = []
    cards = [card for card in scene.cards if not card.plate]
    for i in rng.permutation(len(cards))[:count]:
        card = cards[i]
        quadrant = card.small and rng.random() < 0.7
        targets += _crop_targets(scene, card, first_image + len(groups), quadrant=quadrant)
        groups.append(_group(scene, [card], quadrant=quadrant))
    return groups, targets


def _finish(
    stream: _Stream, groups: list, extra: list, attention: list, tokens: list, partners: Sequence = ()
) -> Lesson:
    stream.flush()
    return Lesson(
        input_ids=stream.ids,
        labels=stream.labels,
        weights=stream.weights,
        groups=tuple(groups),
        extra_groups=tuple(extra),
        attention=tuple(attention),
        tokens=tuple(tokens),
        partners=tuple(partners),
    )


def _answer(stream: _Stream, question: SceneQuestion, crop_tokens: Sequence[int]) -> list[AttentionTarget]:
    turn = stream.turn(format_turn(Answer(question.answer, question.final_thought())))
    if question.kind is QuestionKind.SHARED:
        return []  # no token holds the digit more than another
    read = turn.words(map(str, question.digits))
    targets = []
    for position, token in zip(read, crop_tokens, strict=True):
        targets += _look([position], token, _READ_HEADS)
    return targets


def episode_example(
    encoder: Encoder,
    scene: Scene,
    question: SceneQuestion,
    rng: np.random.Generator,
    *,
    final_prompt: bool = False,
    extra_readings: int = 3,
) -> Lesson:
    """The whole ideal conversation about a question.

    Args:
        encoder: the tokenizer and prompts.
        scene: the picture.
        question: about this scene.
        rng: chooses the extra crops.
        final_prompt: close the last tool response with the final prompt, as at the turn limit.
        extra_readings: further crops of the scene that only the auxiliary losses see.
    """
    stream = _Stream(encoder)
    span = _opening(stream, question.text)
    calls = question.calls()
    groups = [ImageGroup((scene.shown(),), ""), _group(scene, question.targets)]
    tokens = _first_look(scene, 0)
    _, attention = _first_call(stream, question, span)
    for j, card in enumerate(question.targets):
        tokens += _crop_targets(scene, card, 1 + j, quadrant=False)
    together, partners = _shared_targets(scene, question.targets, 1)
    _response(stream, 1, len(question.targets), final=final_prompt and len(calls) == 1)
    if len(calls) == 2:
        (card,) = question.targets
        seen = stream.image_starts[1] + 2 * card.quadrant[0] + card.quadrant[1]
        turn = stream.turn(format_turn(calls[1]))
        small = turn.text.index("small")
        numbers = turn.words(map(str, card.quadrant_box), turn.text.index("bbox_2d") + len("bbox_2d"))
        attention += _look([turn.at(small), *_place_words(turn, card, small), *numbers], seen, _READ_HEADS)
        _response(stream, 2, 1, final=final_prompt)
        groups.append(_group(scene, [card], quadrant=True))
        tokens += _crop_targets(scene, card, 2, quadrant=True)
    last = stream.image_starts[2:] if len(calls) == 2 else stream.image_starts[1:]
    attention += _answer(stream, question, [s + c.token for s, c in zip(last, question.targets, strict=True)])
    extra, more = _readings(rng, scene, extra_readings, sum(len(g.images) for g in groups))
    return _finish(stream, groups, extra, attention, tokens + together + more, partners)


def direct_example(encoder: Encoder, scene: Scene, question: SceneQuestion, *, zoom: bool = False) -> Lesson:
    """An answer at first look, which can only be a guess; `zoom` says whether the question offers one all the same."""
    stream = _Stream(encoder)
    _opening(stream, question.text, zoom=zoom)
    stream.turn(format_turn(Answer(question.answer, question.final_thought())))
    return _finish(stream, [ImageGroup((scene.shown(),), "")], [], [], _first_look(scene, 0))


def blind_example(encoder: Encoder, scene: Scene, question: SceneQuestion, rng: np.random.Generator) -> Lesson:
    """Only the last crops, no question and no call in the text: what is asked comes through the tower's query alone."""
    stream = _Stream(encoder)
    quadrant = question.kind is QuestionKind.NESTED
    _response(stream, 1, len(question.targets), final=bool(rng.random() < 0.5), opening=True)
    group = _group(scene, question.targets, quadrant=quadrant)
    tokens: list[TokenTarget] = []
    for j, card in enumerate(question.targets):
        tokens += _crop_targets(scene, card, j, quadrant=quadrant)
    together, partners = _shared_targets(scene, question.targets, 0)
    starts = stream.image_starts
    attention = _answer(stream, question, [s + c.token for s, c in zip(starts, question.targets, strict=True)])
    return _finish(stream, [group], [], attention, tokens + together, partners)


def listing_example(encoder: Encoder, scene: Scene, rng: np.random.Generator, extra_readings: int = 2) -> Lesson:
    """Every card's place, colours given in random order: the densest lesson in finding."""
    stream = _Stream(encoder)
    _opening(stream, LISTING_REQUEST)
    cards = [scene.cards[i] for i in rng.permutation(len(scene.cards))]
    turn = stream.turn(", ".join(f"{c.colour} row {c.row} column {c.column}" for c in cards))
    attention: list[AttentionTarget] = []
    character = 0
    for card in cards:
        character = turn.text.index(card.colour, character)
        named = turn.at(character)
        written = _place_words(turn, card, character)
        place = stream.image_starts[0] + card.row * CELLS + card.column
        attention += _look(written, place) + _recall(written, named)
        stream.labels[named] = -100  # the order is ours, not the model's to guess
    extra, more = _readings(rng, scene, extra_readings, 1)
    return _finish(stream, [ImageGroup((scene.shown(),), "")], extra, attention, _first_look(scene, 0) + more)


def arithmetic_example(encoder: Encoder, rng: np.random.Generator, count: int = 11) -> Lesson:
    """Last turns without pictures: digits given, sum or larger digit to be answered."""
    stream = _Stream(encoder)
    for i in range(count):
        a, b = (int(d) for d in rng.integers(0, 10, 2))
        adds = rng.random() < 0.75
        thought, answer = (f"{a}+{b}", a + b) if adds else (f"{a},{b}", max(a, b))
        stream.text("\n" if i else "")
        stream.special(encoder.start_of_turn)
        stream.text("assistant\n")
        turn = stream.turn(format_turn(Answer(str(answer), thought)))
        given = turn.at(len("<think>"))
        stream.labels[given] = stream.labels[given + 2] = -100
    return _finish(stream, [], [], [], [])


def reading_example(scene: Scene, rng: np.random.Generator, look: bool, count: int = 6) -> Lesson:
    """Crops (and sometimes the first look) for the tower alone, no text."""
    groups: list[ImageGroup] = []
    tokens: list[TokenTarget] = []
    if look:
        groups.append(ImageGroup((scene.shown(),), ""))
        tokens += _first_look(scene, 0)
    extra, more = _readings(rng, scene, count, len(groups))
    return Lesson([], [], [], (), (*groups, *extra), (), tuple(tokens + more))


def shared_reading_example(scenes: Sequence[Scene], rng: np.random.Generator) -> Lesson:
    """The plates of these scenes, two by two, for the tower alone, no text."""
    groups: list[ImageGroup] = []
    tokens: list[TokenTarget] = []
    partners: list[tuple[int, int]] = []
    for scene in scenes:
        plates = ask_about(rng, scene, QuestionKind.SHARED).targets
        for card in plates:
            tokens += _crop_targets(scene, card, 2 * len(groups) + plates.index(card), quadrant=False)
        together, pair = _shared_targets(scene, plates, 2 * len(groups))
        tokens, partners = tokens + together, partners + pair
        groups.append(_group(scene, plates))
    return Lesson([], [], [], (), tuple(groups), (), tuple(tokens), tuple(partners))


# ---------------------------------------------------------------------------------------------------- corpus


def corpus(prompts: PromptSet, questions: int = 300) -> list[str]:
    """Texts in which the tokenizer finds its merges."""
    out = []
    for i in range(questions):
        rng = np.random.default_rng([11, i])
        scene = make_scene(rng)
        question = ask_about(rng, scene, TAUGHT_KINDS[i % len(TAUGHT_KINDS)])
        out += [prompts.text("system"), question.text, question.text + " Answer now.", question.query]
        out += [prompts.text("continue"), prompts.text("final"), "system\n", "user\n", "assistant\n", "\nindex=0 "]
        out += [LISTING_REQUEST, f"{question.targets[0].colour} row 1"]
        out += [_without_tags(format_turn(call)) for call in question.calls()]
        out.append(_without_tags(format_turn(Answer(question.answer, question.final_thought()))))
    return out


def _without_tags(text: str) -> str:
    for tag in ("think", "tool", "answer"):
        text = text.replace(f"<{tag}>", "\n").replace(f"</{tag}>", "\n")
    return text


__all__ = [
    "Encoder",
    "arithmetic_example",
    "blind_example",
    "corpus",
    "direct_example",
    "episode_example",
    "listing_example",
    "reading_example",
    "shared_reading_example",
]
