"""The viewer of conversations: what every page of them shows, whoever recorded them.

A `Trace` is one question with its turns, images and answer: of a chat or a server (`Trace.of`), of a
result file, of a training run. `shown_talk` makes of the questions of one conversation what the macros of
``templates/talk.html`` show: images with their regions beside the turns, each region linked with its crop and with
the words that asked for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .attention import AttentionPicture
from .attention_figure import heading, mass_lines, most_of, tint
from .conversation import Record, ShownImage, Turn
from .drawing import colour, picture_url, png_url
from .protocol import Answer, Box, Malformed, NoAction, ToolCall
from .regions import FACTOR
from .results import ChatResult

SCRIPT = "viewer.js"
"""What a page with talks runs."""

STRIP = 3
"""With more originals than this only one is shown large, the others as thumbnails."""

_SAME = 0.01
"""Two boxes whose edges are this close, as a fraction of the longest side, hide each other."""


class Decoder(Protocol):
    """The half of a tokenizer that is needed to show tokens."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""
        ...


@dataclass(frozen=True)
class ShownToken:
    """A token of the stream as it is shown."""

    text: str
    trained: bool = False
    """Whether it carries loss: it was sampled."""
    shade: int = 0
    """Percent, the darker the less likely."""
    title: str = ""
    """Its log-probabilities."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One question as it is shown."""

    question: str
    turns: Sequence[Turn] = ()
    images: Sequence[ShownImage] = ()
    """All of the conversation up to the end of this question, in order."""
    pictures: Mapping[int, str] = field(default_factory=dict)
    """Image -> address of its pixels: a ``data:`` URL, or a file beside the page. Others are drawn as frames."""
    missing: Mapping[int, str] = field(default_factory=dict)
    """Image -> which file its pixels should come from, and why they do not."""
    answer: str | None = None
    finish: str = ""
    detail: str = ""
    """Why there is no answer."""
    error: str | None = None
    asked_again: bool = False
    """Whether the answer is of a second conversation, without zoom."""
    sample_id: str | None = None
    target: str | None = None
    """The right answer."""
    score: float | None = None
    """0 to 1; None: nobody knows."""
    seconds: float | None = None
    run: str = ""
    """Whose answer it is, where several are compared."""
    facts: Mapping[str, str] = field(default_factory=dict)
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Of a training run."""
    transcript: str = ""
    """Everything that the model saw and said, as text."""
    tokens: Sequence[ShownToken] = ()
    attention: Sequence[AttentionPicture] = ()
    """Where the patches of its zooms look."""

    @classmethod
    def of(
        cls,
        result: ChatResult,
        *,
        pictures: Mapping[int, str] | None = None,
        target: str | None = None,
        score: float | None = None,
        tokenizer: Decoder | None = None,
        **more: Any,
    ) -> Trace:
        """What came of a question.

        Args:
            result: of any backend.
            pictures: see `Trace.pictures`; None: the views of the result, as ``data:`` URLs.
            target: the right answer.
            score: 0 to 1.
            tokenizer: shows the tokens of a result that has its record, unless `more` does.
            more: other fields.
        """
        if pictures is None:
            pictures = {index: picture_url(view.image) for index, view in enumerate(result.views)}
        if tokenizer is not None and result.record is not None:
            more.setdefault("tokens", list(shown_tokens(result.record, tokenizer)))
        return cls(
            question=result.question,
            turns=result.turns,
            images=result.images,
            pictures=pictures,
            answer=result.answer,
            finish=result.finish,
            detail="" if result.episode is None else result.episode.detail,
            error=None if result.error is None else f"{type(result.error).__name__}: {result.error}",
            asked_again=result.fallback is not None,
            sample_id=result.sample_id,
            target=target,
            score=score,
            seconds=result.seconds or None,
            transcript=result.transcript,
            attention=result.attention,
            **({"facts": facts_of(result)} | more),
        )

    @property
    def verdict(self) -> str:
        """``right``, ``wrong``, ``partly right``, or nothing if nobody knows."""
        if self.score is None:
            return ""
        return "right" if self.score >= 1 - 1e-9 else "wrong" if self.score <= 1e-9 else "partly right"


def facts_of(result: ChatResult) -> dict[str, str]:
    """What a result depends on and what it cost, in words."""
    provenance, work = result.provenance, result.work
    computed = work.tokens_prefilled + work.tokens_decoded
    facts = {
        "checkpoint": f"{provenance.checkpoint or 'in memory'} {(provenance.fingerprint or '')[:12]}",
        "preset, prompts": f"{provenance.preset}, {provenance.prompts} {provenance.prompts_sha256[:12]}",
        "sampling": f"temperature {provenance.sampling.temperature:g}, seed {provenance.seed}",
        "computed": (
            f"{work.patches_encoded} patches ({work.patches_ratio:.2f} per distinct one), "
            f"{computed} tokens ({work.tokens_ratio:.2f} per distinct one), {result.seconds:.2f} s"
        ),
        "run on": ", ".join(filter(None, (provenance.device, provenance.dtype, provenance.attention))),
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
    }
    return {name: value for name, value in facts.items() if value}


def shown_tokens(
    record: Record, tokenizer: Decoder, computed: Sequence[float | None] | None = None
) -> Iterator[ShownToken]:
    """The stream as text; runs of image placeholders are shortened.

    Args:
        record: of the conversation.
        tokenizer: of its checkpoint.
        computed: log-probabilities of another computation, one per token, shown beside the recorded ones.
    """
    images = {span.start: span.length for span in record.image_spans}
    at = 0
    while at < len(record.token_ids):
        if at in images:
            yield ShownToken(f"[{images[at]} image tokens]")
            at += images[at]
            continue
        text = str(tokenizer.decode([record.token_ids[at]], skip_special_tokens=False))
        if record.loss_mask[at]:
            value = record.logprobs[at]
            other = None if computed is None else computed[at]
            said = [f"token {record.token_ids[at]}"]
            said += [] if value is None else [f"log-probability {value:.4f}"]
            said += [] if other is None else [f"model {other:.4f}"]
            yield ShownToken(
                text, True, 15 if value is None else round(15 + 60 * min(1.0, -value / 5)), ", ".join(said)
            )
        else:
            yield ShownToken(text)
        at += 1


# ---------------------------------------------------------------------- what the templates show


def shown_talk(questions: Sequence[Trace], number: int = 0) -> dict[str, Any]:
    """The questions of one conversation as the macro ``talk`` shows them.

    Args:
        questions: in order; the images of a later one begin with those of the earlier ones.
        number: of the conversation on its page.
    """
    images = max((question.images for question in questions), key=len, default=())
    pictures = {index: url for question in questions for index, url in question.pictures.items()}
    missing = {index: why for question in questions for index, why in question.missing.items()}
    figures = [_figure(image, images, pictures, number) | {"missing": missing.get(image.index)} for image in images]
    originals = [figure for figure in figures if figure["original"]]
    chosen = next((figure for figure in originals if figure["boxes"]), originals[0] if originals else None)
    return {
        "id": f"c{number}",
        "stage": originals,
        "many": len(originals) > STRIP,
        "chosen": None if chosen is None else chosen["index"],
        "questions": [_question(question, figures, number, place) for place, question in enumerate(questions)],
    }


def _question(trace: Trace, figures: Sequence[Mapping[str, Any]], number: int, place: int) -> dict[str, Any]:
    known = {figure["index"]: figure for figure in figures}
    anchor = f"c{number}q{place}"
    no_answer = None
    if trace.answer is None and trace.error is None and (trace.turns or trace.finish):
        no_answer = f"No answer ({trace.finish}): {trace.detail}" if trace.detail else f"No answer ({trace.finish})"
    return {
        "anchor": anchor,
        "run": trace.run,
        "text": trace.question,
        "sample_id": trace.sample_id,
        "turns": [_turn(turn, known, number, anchor, trace.attention) for turn in trace.turns],
        "timeline": _timeline(trace, anchor),
        "answer": trace.answer,
        "no_answer": no_answer,
        "error": trace.error,
        "asked_again": trace.asked_again,
        "target": trace.target,
        "verdict": trace.verdict,
        "score": None if trace.score is None else f"{trace.score:.2f}",
        "facts": trace.facts,
        "rewards": [
            {"name": name, "value": f"{value:g}", "part": round(100 * min(1.0, abs(value)))}
            for name, value in trace.rewards.items()
        ],
        "transcript": trace.transcript,
        "tokens": trace.tokens,
    }


def _turn(
    turn: Turn,
    figures: Mapping[int, Mapping[str, Any]],
    number: int,
    anchor: str,
    attention: Sequence[AttentionPicture],
) -> dict[str, Any]:
    action = turn.action
    watched = [one for one in attention if one.image_indices and set(one.image_indices) <= set(turn.image_indices)]
    looks, heats = _attention(watched)
    regions, linked = [], len(turn.image_indices)
    if isinstance(action, ToolCall):
        linked = linked == len(action.regions)
        for place, region in enumerate(action.regions):
            index = turn.image_indices[place] if linked else None
            regions.append(
                {
                    "link": "" if index is None else f"{number}-{index}",
                    "label": "" if index is None else str(index),
                    "colour": "" if index is None else colour(index),
                    "text": f"{_box(region.box)} of image {region.index}",
                }
            )
    meta = [f"{turn.token_count} tokens"] if turn.token_count else []
    meta += [] if turn.seconds is None else [f"{turn.seconds:.2f} s"]
    return {
        "number": turn.index + 1,
        "anchor": f"{anchor}t{turn.index + 1}",
        "text": turn.text,
        "feedback": turn.feedback,
        "thought": "" if isinstance(action, Malformed) else action.thought,
        "query": action.query if isinstance(action, ToolCall) else None,
        "links": " ".join(region["link"] for region in regions if region["link"]),
        "regions": regions,
        "answer": action.text if isinstance(action, Answer) else None,
        "nothing": isinstance(action, NoAction) and not action.thought,
        "meta": " · ".join(meta),
        "problem": turn.problem or (action.detail if isinstance(action, Malformed) else None),
        "images": [
            {**figures[index], "heats": heats.get(index, [])} for index in turn.image_indices if index in figures
        ],
        "attention": looks,
    }


def _attention(pictures: Sequence[AttentionPicture]) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]]]:
    """What can be laid over the crops of a turn, and by image index the maps themselves."""
    looks: list[dict[str, Any]] = []
    heats: dict[int, list[dict[str, Any]]] = {}
    number = 0
    for picture in pictures:
        groups = []
        for layer in picture.layers:
            options = []
            for heat in layer.heats:
                number += 1
                options.append({"number": number, "label": f"{heading(heat.name, picture)} ({most_of(heat)})"})
                for place, index in enumerate(picture.image_indices):
                    url = png_url(tint(heat, place))
                    heats.setdefault(index, []).append({"number": number, "url": url})
            groups.append({"title": layer.title, "options": options})
        first = picture.layers[0] if picture.layers else None
        shares = [] if first is None else list(zip(picture.words, first.words, strict=True))
        top = max((share for _, share in shares), default=0.0) or 1.0
        looks.append(
            {
                "groups": groups,
                "masses": [] if first is None else mass_lines(first, picture),
                "words": [
                    {"word": word, "share": f"{100 * share:.1f} %", "part": round(100 * max(0.0, share) / top)}
                    for word, share in shares
                ],
            }
        )
    return looks, heats


def _timeline(trace: Trace, anchor: str) -> list[dict[str, Any]]:
    """Turns by their seconds, or by their tokens where nobody took the time."""
    timed = all(turn.seconds for turn in trace.turns)
    sizes = [(turn.seconds if timed else turn.token_count or len(turn.text)) or 0 for turn in trace.turns]
    whole = max(float(sum(sizes)), 1e-9)
    found = []
    for turn, size in zip(trace.turns, sizes, strict=True):
        said = [f"turn {turn.index + 1}"]
        said += [f"{turn.token_count} tokens"] if turn.token_count else []
        said += [f"{turn.seconds:.2f} s"] if turn.seconds is not None else []
        kind = "zoom" if isinstance(turn.action, ToolCall) else "answer" if isinstance(turn.action, Answer) else "other"
        share = f"{100 * size / whole:.2f}"
        found.append({"anchor": f"{anchor}t{turn.index + 1}", "size": share, "label": ", ".join(said), "kind": kind})
    return found


def _figure(
    image: ShownImage, images: Sequence[ShownImage], pictures: Mapping[int, str], number: int
) -> dict[str, Any]:
    original = image.parent is None
    said = [image.name] if original and image.name else []
    said += [f"{image.width} x {image.height} px", f"{image.width * image.height // FACTOR**2} tokens"]
    if image.box is not None:
        said.append(f"region {_box(image.box)} of image {image.parent}")
    parent = next((other for other in images if other.index == image.parent), None)
    return {
        "index": image.index,
        "original": original,
        "url": pictures.get(image.index),
        "width": image.width,
        "height": image.height,
        "name": image.name,
        "time": "" if image.time is None else _clock(image.time),
        "colour": "" if original else colour(image.index),
        "link": "" if original else f"{number}-{image.index}",
        "caption": ", ".join(said),
        "boxes": _boxes(image, images, number),
        "heats": [],
        "where": None if parent is None or image.box is None else _where(image.box, parent),
    }


def _boxes(image: ShownImage, images: Sequence[ShownImage], number: int) -> list[dict[str, Any]]:
    """Regions on an image: those named on it, and on an original those named on crops of it, too."""
    found: list[tuple[ShownImage, Box]] = []
    for other in images:
        if other.parent is None or other.box is None:
            continue
        if other.parent == image.index:
            found.append((other, other.box))
        elif image.parent is None and other.source == image.source and other.index > image.index:
            x1, y1, x2, y2 = other.region
            found.append((other, (x1 * image.width, y1 * image.height, x2 * image.width, y2 * image.height)))
    out = []
    for place, (other, (x1, y1, x2, y2)) in enumerate(found):
        same = [n for n, (_, box) in enumerate(found) if _alike(box, found[place][1], image)]
        turn = same.index(place)
        corner = sum(
            abs(box[0] - x1) < _TAG * image.width and abs(box[1] - y1) < _TAG * image.height for _, box in found[:place]
        )
        out.append(
            {
                "link": f"{number}-{other.index}",
                "label": str(other.index),
                "colour": colour(other.index),
                "nested": other.parent != image.index,
                "x": f"{x1:g}",
                "y": f"{y1:g}",
                "width": f"{x2 - x1:g}",
                "height": f"{y2 - y1:g}",
                # Boxes in one place take turns along the line, so that each of them is seen.
                "dash": f"{_DASH} {_DASH * (len(same) - 1)}" if len(same) > 1 else "",
                "offset": -_DASH * turn,
                "shift": corner,
                "left": f"{100 * x1 / image.width:.3f}",
                "top": f"{100 * y1 / image.height:.3f}",
                "inside": y1 < 0.08 * image.height,
            }
        )
    return out


_DASH = 12
"""Of boxes in one place, in pixels of the screen."""
_TAG = 0.04
"""Tags of boxes whose corners are this close, as a fraction of a side, stand beside each other."""


def _alike(one: Box, other: Box, image: ShownImage) -> bool:
    near = _SAME * max(image.width, image.height)
    return all(abs(a - b) <= near for a, b in zip(one, other, strict=True))


def _where(box: Box, parent: ShownImage) -> dict[str, str]:
    x1, y1, x2, y2 = box
    size = f"{parent.width} {parent.height}"
    place = {"x": f"{x1:g}", "y": f"{y1:g}", "width": f"{x2 - x1:g}", "height": f"{y2 - y1:g}"}
    return {"size": size, "whole_width": f"{parent.width}", "whole_height": f"{parent.height}", **place}


def _box(box: Box) -> str:
    return f"[{', '.join(f'{value:g}' for value in box)}]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"
