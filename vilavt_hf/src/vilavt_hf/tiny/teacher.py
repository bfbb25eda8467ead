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
    MOST_PICTURES,
    SHARED_KINDS,
    Card,
    QuestionKind,
    Scene,
    SceneQuestion,
    ask_about,
    query_for,
    scene_about,
    words_for_place,
)

COLOUR_NAMES = list(COLOURS)

NUMBER_WEIGHT = 3.0
"""Loss weight of digits, places and coordinates; words and punctuation weigh 1."""

LISTING_REQUEST = "Where is each card?"
"""A training-only task: name the place of every card."""

BIND_TEXT, BIND_IMAGE = 1, 2
"""Language model layers whose attention is supervised: to the colour word, then to the image token it names."""
_TEXT_HEADS, _NUMBER_HEADS, _LOOK_HEADS, _READ_HEADS = (0, 1), (2, 3), (0, 1), (2, 3)


@dataclass
class _Stream:
    """Token ids, labels and weights of one conversation while it grows, in the layout of the episode."""

    encoder: "Encoder"
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Position of the number of each original in its index line."""
    question: list[int] = field(default_factory=list)
    """Positions of the question's tokens."""
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


def _opening(stream: _Stream, pictures: int, question: str, *, zoom: bool = True) -> None:
    """System and user turn up to the assistant's first token."""
    encoder, prompts = stream.encoder, stream.encoder.prompts
    stream.special(encoder.start_of_turn)
    stream.text("system\n" + prompts.text("system"))
    stream.special(encoder.end_of_turn)
    stream.text("\n")
    stream.special(encoder.start_of_turn)
    stream.text("user\n")
    for index in range(pictures):
        for part in prompts.render("original", image=index, index=index):
            stream.image(CELLS * CELLS) if isinstance(part, int) else stream.text(part)
        start = stream.image_starts[-1]
        numbers = (p for p in range(start - 1, 0, -1) if stream.ids[p] in encoder.number_ids)
        stream.numbers.append(next(numbers))
    begin = len(stream.ids)
    stream.text(prompts.text("user" if zoom else "user_no_zoom", question=question, images=""))
    stream.question = list(range(begin, stream.flush()))
    _close(stream)


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


def _place_words(turn: _Turn, colour_at: int, *, index: bool = False, cell: bool = True) -> list[int]:
    """Positions of the numbers that say where a card is, after its colour word at character `colour_at`."""
    words = [" index "] * index + [" row ", " column "] * cell
    found = []
    for word in words:
        colour_at = turn.text.index(word, colour_at) + len(word)
        found.append(turn.at(colour_at))
    return found


def _token_of(stream: _Stream, card: Card) -> int:
    """Position of the token of the first look that shows the card."""
    return stream.image_starts[card.picture] + card.row * CELLS + card.column


def _numbering(stream: _Stream, cards: Iterable[Card]) -> list[AttentionTarget]:
    """Tokens of cards in one of several images should look at the number of their image."""
    if len(stream.numbers) == 1:
        return []
    places = [(_token_of(stream, card), stream.numbers[card.picture]) for card in cards]
    return [AttentionTarget(BIND_TEXT, _NUMBER_HEADS, place, number) for place, number in places]


def _first_call(stream: _Stream, question: SceneQuestion) -> list[AttentionTarget]:
    """The first call as a turn; returns where it should look."""
    call = question.calls()[0]
    turn = stream.turn(format_turn(call))
    several = question.pictures > 1
    targets = _numbering(stream, question.named)
    character, box_character = 0, turn.text.index("<tool>")
    if question.kind is QuestionKind.FIRST:
        more, character = _find_both(stream, turn, question)
        targets += more
    query_character = turn.text.rindex('"query"')
    for card in question.targets:
        asked = _find(stream, card.colour)
        character = turn.text.index(card.colour, character)
        named = turn.at(character)
        place = _token_of(stream, card)
        written = _place_words(turn, character, index=several)
        box_character = turn.text.index('"index":', box_character) + len('"index":')
        if several:
            written.append(turn.at(box_character))
        box_character = turn.text.index("bbox_2d", box_character) + len("bbox_2d")
        numbers = turn.words(map(str, card.cell_box), box_character)
        targets += _look([*written, *numbers], place)
        if question.kind is not QuestionKind.FIRST:  # there the number just written says which card it is
            targets += _recall([named], asked)
        targets += _recall([*written, *numbers, *turn.words([card.colour], query_character)], named)
        character += 1
    return targets


def _find_both(stream: _Stream, turn: _Turn, question: SceneQuestion) -> tuple[list[AttentionTarget], int]:
    """Naming the frames of both cards, then the earlier one; returns the targets and the character after that."""
    targets: list[AttentionTarget] = []
    character = 0
    for card in question.named:
        character = turn.text.index(card.colour, character)
        named = turn.at(character)
        written = _place_words(turn, character, index=True, cell=False)
        targets += _recall([named], _find(stream, card.colour))
        targets += _recall(written, named) + _look(written, _token_of(stream, card))
        character += 1
    (card,) = question.targets
    more, character = _choose_first(turn, [c.colour for c in question.named], card.colour)
    return targets + more, character


def _choose_first(turn: _Turn, colours: Sequence[str], first: str) -> tuple[list[AttentionTarget], int]:
    """Where to look when two frames are written and the smaller number is to be, then the colour that has it.

    Returns:
        The targets, and the character after the smaller number.
    """
    targets: list[AttentionTarget] = []
    character, frames = 0, {}
    for colour in colours:
        character = turn.text.index(colour, character)
        (frames[colour],) = _place_words(turn, character, index=True, cell=False)
        # the number knows its colour
        targets.append(AttentionTarget(BIND_TEXT, _TEXT_HEADS, frames[colour], turn.at(character)))
        character += 1
    character = turn.text.index(" first ", character) + len(" first ")
    smaller = turn.at(character)
    for head, position in zip(_READ_HEADS, frames.values(), strict=True):  # compare
        targets.append(AttentionTarget(BIND_IMAGE, (head,), smaller - 1, position))
    targets.append(AttentionTarget(BIND_IMAGE, _LOOK_HEADS, smaller, frames[first]))
    return targets, character


def _find(stream: _Stream, colour: str) -> int:
    """Position of a colour in the question."""
    (wanted,) = stream.encoder.encode(" " + colour)
    return next(p for p in stream.question if stream.ids[p] == wanted)


def _colour_rows(cards: Iterable[tuple[int, Card]], tokens: int) -> np.ndarray:
    rows = np.zeros((tokens, len(COLOUR_NAMES)), np.float32)
    for token, card in cards:
        rows[token, COLOUR_NAMES.index(card.colour)] = 1
    return rows


def _first_look(scene: Scene) -> list[TokenTarget]:
    """What every token of the first looks, the lesson's first images, should know: where it is, which colours it
    holds."""
    tokens = np.arange(CELLS * CELLS)
    out = []
    for image in range(len(scene.images)):
        cards = [(c.row * CELLS + c.column, c) for c in scene.cards if c.picture == image]
        out += [
            TokenTarget("row", image, tokens // CELLS),
            TokenTarget("column", image, tokens % CELLS),
            TokenTarget("colour", image, _colour_rows(cards, CELLS * CELLS)),
        ]
    return out


def _looks(scene: Scene) -> list[ImageGroup]:
    """The first looks, each an inquiry of its own."""
    return [ImageGroup((image,), "") for image in scene.shown()]


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
    if scene.ink is None or not cards or not all(card.plate for card in cards):
        return [], []
    twins = scene.ink.all() or not scene.ink.any()
    ink = scene.ink.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16).astype(np.float32)
    tokens = []
    for image in range(first_image, first_image + 2):
        tokens.append(TokenTarget("ink", image, ink))
        if not twins:
            tokens.append(TokenTarget("digit", image, np.array([cards[0].digit])))
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


def _answer_from_look(stream: _Stream, question: SceneQuestion, turn: "_Turn") -> list[AttentionTarget]:
    (card,) = question.named
    named = turn.at(turn.text.index(card.colour))
    written = _place_words(turn, turn.text.index(card.colour), index=True, cell=False)
    targets = _numbering(stream, [card]) + _look(written, _token_of(stream, card)) + _recall(written, named)
    return targets + _recall([named], _find(stream, card.colour))


def _answer(stream: _Stream, question: SceneQuestion, crop_tokens: Sequence[int]) -> list[AttentionTarget]:
    turn = stream.turn(format_turn(Answer(question.answer, question.final_thought())))
    if question.kind in SHARED_KINDS:
        return []  # no token holds the digit more than another
    if not question.targets:
        return _answer_from_look(stream, question, turn)
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
        scene: the image.
        question: about this scene.
        rng: chooses the extra crops.
        final_prompt: close the last tool response with the final prompt, as at the turn limit.
        extra_readings: further crops of the scene that only the auxiliary losses see.
    """
    stream = _Stream(encoder)
    count = len(scene.images)
    _opening(stream, count, question.text)
    calls = question.calls()
    groups = _looks(scene)
    tokens = _first_look(scene)
    attention: list[AttentionTarget] = []
    partners: list[tuple[int, int]] = []
    if calls:
        attention += _first_call(stream, question)
        groups.append(_group(scene, question.targets))
        for j, card in enumerate(question.targets):
            tokens += _crop_targets(scene, card, count + j, quadrant=False)
        together, partners = _shared_targets(scene, question.targets, count)
        tokens += together
        _response(stream, count, len(question.targets), final=final_prompt and len(calls) == 1)
    if len(calls) == 2:
        (card,) = question.targets
        seen = stream.image_starts[count] + 2 * card.quadrant[0] + card.quadrant[1]
        turn = stream.turn(format_turn(calls[1]))
        small = turn.text.index("small")
        numbers = turn.words(map(str, card.quadrant_box), turn.text.index("bbox_2d") + len("bbox_2d"))
        attention += _look([turn.at(small), *_place_words(turn, small), *numbers], seen, _READ_HEADS)
        _response(stream, count + 1, 1, final=final_prompt)
        groups.append(_group(scene, [card], quadrant=True))
        tokens += _crop_targets(scene, card, count + 1, quadrant=True)
    last = stream.image_starts[count + len(calls) - 1 :] if calls else []
    attention += _answer(stream, question, [s + c.token for s, c in zip(last, question.targets, strict=True)])
    extra, more = _readings(rng, scene, extra_readings, sum(len(g.images) for g in groups))
    return _finish(stream, groups, extra, attention, tokens + more, partners)


def direct_example(encoder: Encoder, scene: Scene, question: SceneQuestion, *, zoom: bool = False) -> Lesson:
    """An answer at first look, which can only be a guess; `zoom` says whether the question offers one all the same."""
    stream = _Stream(encoder)
    _opening(stream, len(scene.images), question.text, zoom=zoom)
    turn = stream.turn(format_turn(Answer(question.answer, question.final_thought())))
    attention = [] if question.targets else _answer_from_look(stream, question, turn)
    return _finish(stream, _looks(scene), [], attention, _first_look(scene))


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
    several = len(scene.images) > 1
    _opening(stream, len(scene.images), LISTING_REQUEST)
    cards = [scene.cards[i] for i in rng.permutation(len(scene.cards))]
    turn = stream.turn(", ".join(words_for_place(c, len(scene.images)) for c in cards))
    attention = _numbering(stream, cards)
    character = 0
    for card in cards:
        character = turn.text.index(card.colour, character)
        named = turn.at(character)
        written = _place_words(turn, character, index=several)
        attention += _look(written, _token_of(stream, card)) + _recall(written, named)
        stream.labels[named] = -100  # the order is ours, not the model's to guess
    extra, more = _readings(rng, scene, extra_readings, len(scene.images))
    return _finish(stream, _looks(scene), extra, attention, _first_look(scene) + more)


def arithmetic_example(encoder: Encoder, rng: np.random.Generator, count: int = 11) -> Lesson:
    """Last turns without images: digits given, sum or larger digit to be answered."""
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


def order_example(encoder: Encoder, rng: np.random.Generator, count: int = 11) -> Lesson:
    """Turns without images: the frames of two cards given, the smaller number and its colour to be named."""
    stream = _Stream(encoder)
    targets: list[AttentionTarget] = []
    for i in range(count):
        colours = rng.permutation(COLOUR_NAMES)[:2].tolist()
        frames = rng.permutation(MOST_PICTURES)[:2].tolist()
        first = int(np.argmin(frames))
        places = [f"{colour} index {frame}" for colour, frame in zip(colours, frames, strict=True)]
        stream.text("\n" if i else "")
        stream.special(encoder.start_of_turn)
        stream.text("assistant\n")
        turn = stream.turn(format_turn(Answer("", f"{', '.join(places)}, first {frames[first]} {places[first]}")))
        more, character = _choose_first(turn, colours, colours[first])
        targets += more
        smaller = turn.at(character)
        asked = {smaller, smaller + 1, *_place_words(turn, character, index=True, cell=False)}
        for position in set(range(turn.begin, len(stream.ids))) - asked:
            stream.labels[position] = -100
    return _finish(stream, [], [], targets, [])


def reading_example(scene: Scene, rng: np.random.Generator, look: bool, count: int = 6) -> Lesson:
    """Crops (and sometimes the first look) for the tower alone, no text."""
    groups: list[ImageGroup] = []
    tokens: list[TokenTarget] = []
    if look:
        groups += _looks(scene)
        tokens += _first_look(scene)
    extra, more = _readings(rng, scene, count, len(groups))
    return Lesson([], [], [], (), (*groups, *extra), (), tuple(tokens + more))


def shared_reading_example(scenes: Sequence[Scene], rng: np.random.Generator) -> Lesson:
    """The plates of these scenes, two by two, for the tower alone, no text; of twins, only that they agree or not."""
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


def corpus(prompts: PromptSet, questions: int = 480) -> list[str]:
    """Texts in which the tokenizer finds its merges."""
    out = []
    kinds = list(QuestionKind)
    for i in range(questions):
        rng = np.random.default_rng([11, i])
        kind = kinds[i % len(kinds)]
        question = ask_about(rng, scene_about(rng, "train", kind), kind)
        out += [prompts.text("system"), question.text, question.text + " Answer now.", question.query]
        out += [prompts.text("continue"), prompts.text("final"), "system\n", "user\n", "assistant\n", "\nindex=0 "]
        out += [LISTING_REQUEST, f"{question.named[0].colour} row 1"]
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
    "order_example",
    "reading_example",
    "shared_reading_example",
]
