"""One record to one tokenised conversation, with its label mask.

Label mask. Trained are assistant turns only, never their header ``<|im_start|>assistant\\n``, and never system, user
and tool turns. ``turn`` trains what the model samples: the text and its ``<|im_end|>``. ``turn_and_newline`` is the
published mask: it also trains the newline after ``<|im_end|>``, which no engine ever samples.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from PIL import Image

from ..conversation import Mark, SpecialTokens, Tokenizer, compose, encode_text
from ..driver import ConversationSettings, Driver
from ..errors import DataError, ImageError, RegionError, VilavtError
from ..images import image_size, load_image
from ..presets import Preset
from ..prompts import PromptSet
from ..protocol import IMAGE_MARK, VIDEO_MARK, Box, FinishReason, Malformed, Rules, ToolCall, parse_turn
from ..regions import MIN_PIXELS, Gallery, Picture, fit
from ..results import Sample
from ..sources import Video
from ..video import VideoLimits, frame_times, read_frames
from .example import IGNORE, Example, ImageGroup
from .registry import Crops
from .schema import EpisodeRecord, PublishedRecord, PublishedTurn, TrainingRecord

Labels = Literal["turn", "turn_and_newline"]
_Slot = Picture | None
"""What an ``<image>`` stands for: a frame, or (None) the next of the record's images."""


QWEN_SYSTEM = "You are a helpful assistant."
"""What Qwen's chat template puts where a conversation has no system turn."""


@dataclass(frozen=True)
class RenderSettings:
    """How records become tokens."""

    max_pixels: float
    """Of one image; a record's own value wins."""
    min_pixels: float = MIN_PIXELS
    labels: Labels = "turn"
    system: str | None = QWEN_SYSTEM
    """Put before a published record that has no system turn; None puts nothing."""
    image_rules: Rules = "strict"
    """``published`` leaves the EXIF orientation unapplied."""
    frames: int | None = None
    """Of each video; a record's own value wins. None: 32, unless `fps` is set."""
    fps: float | None = None
    """Instead, frames per second of each video."""


@dataclass(frozen=True)
class Cut:
    """Where a conversation may end: behind an assistant turn."""

    tokens: int
    groups: int
    """Image groups before it, all of them whole."""


@dataclass(frozen=True)
class Rendered:
    """A conversation and where it may be cut; the last cut, if there is one, is not always the end."""

    example: Example
    cuts: tuple[Cut, ...]

    @property
    def trained(self) -> int:
        """Labelled tokens."""
        return sum(label != IGNORE for label in self.example.labels)

    def within(self, max_length: int) -> "Rendered | None":
        """This conversation up to the last cut that leaves at most `max_length` tokens, some of them trained.

        None if there is no such cut. An image is never cut, and a joint group stays whole.
        """
        for cut in reversed(self.cuts):
            if cut.tokens > max_length:
                continue
            example = replace(
                self.example,
                input_ids=self.example.input_ids[: cut.tokens],
                labels=self.example.labels[: cut.tokens],
                groups=self.example.groups[: cut.groups],
            )
            shorter = Rendered(example, tuple(c for c in self.cuts if c.tokens <= cut.tokens))
            return shorter if shorter.trained else None
        return None


class Outline(Image.Image):
    """An image of which only the size is known: measures conversations without decoding anything."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self._size, self._mode = size, "RGB"

    def resize(self, size: Sequence[int], *args: object, **kwargs: object) -> "Outline":  # type: ignore[override]
        """Another size."""
        return Outline((size[0], size[1]))

    def crop(self, box: Box | None = None) -> "Outline":
        """The size of the box."""
        assert box is not None
        return Outline((int(box[2] - box[0]), int(box[3] - box[1])))


def planned_frames(video: Video, limits: VideoLimits | None = None) -> list[Picture]:
    """What `read_frames` will give, as outlines.

    Raises:
        ImageError: the file cannot be read, or a cap is broken.
    """
    planned = frame_times(video, limits or VideoLimits())
    return [Picture(Outline((planned.width, planned.height)), planned.name, time) for time in planned.times]


class Renderer:
    """Records to conversations.

    Args:
        tokenizer: the language model's.
        prompts: the checkpoint's wording, for episode records.
        settings: see there.
        preset: how episode records run; of its limits only those on turns and images apply.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: PromptSet, settings: RenderSettings, preset: Preset):
        self.tokenizer, self.prompts, self.settings, self.preset = tokenizer, prompts, settings, preset
        self.special = SpecialTokens.of(tokenizer)

    def load(self, path: Path) -> Image.Image:
        """The image, decoded."""
        return load_image(path, rules=self.settings.image_rules)

    def outline(self, path: Path) -> Image.Image:
        """The image's size, from its header."""
        return Outline(image_size(path, rules=self.settings.image_rules))

    def videos(self, record: TrainingRecord, root: Path) -> list[Video]:
        """The videos of a record, each with the frames that are taken of it."""
        default = Video("", self.settings.frames, self.settings.fps)
        return [Video.of(entry, default, root=root) for entry in record.videos]

    def frames(self, video: Video, *, decode: bool) -> list[Picture]:
        """The frames of a video, or of what size they will be.

        Raises:
            ImageError: it cannot be read, or breaks a cap.
        """
        return read_frames(video) if decode else planned_frames(video)

    def render(
        self,
        record: TrainingRecord,
        sample: str,
        image_root: Path,
        crops: Crops = "files",
        *,
        decode: bool = True,
    ) -> Rendered:
        """Tokens, labels and image groups of a record.

        Args:
            record: either schema.
            sample: names it in errors.
            image_root: where relative paths start.
            crops: see `DataSource`.
            decode: whether images and frames are decoded; else only their sizes are read.

        Raises:
            DataError: the record cannot be used; names the sample and says why.
        """
        opened = self.load if decode else self.outline

        def picture(name: str) -> Image.Image:
            if name[:5].lower() == "data:":
                raise DataError(
                    f"{sample}: images holds a data URL of {len(name)} characters; save the image as a file and name "
                    "that",
                    "schema",
                )
            path = image_root / name
            try:
                return opened(path)
            except ImageError as error:
                kind = "image" if os.path.exists(path) else "missing file"  # Path.exists raises for a very long name
                raise DataError(f"{sample}: {error}", kind) from None

        def frames(video: Video) -> list[Picture]:
            try:
                return self.frames(video, decode=decode)
            except ImageError as error:
                kind = "image" if os.path.exists(video.source) else "missing file"  # type: ignore[arg-type]
                raise DataError(f"{sample}: {error}", kind) from None

        try:
            videos = [frames(video) for video in self.videos(record, image_root)]
            if isinstance(record, EpisodeRecord):
                rendered = self._episode(record, sample, picture, videos)
            else:
                rendered = self._published(record, sample, picture, videos, crops)
        except DataError:
            raise
        except RegionError as error:
            raise DataError(f"{sample}: {error}", "region") from None
        except ImageError as error:
            raise DataError(f"{sample}: {error}", "image") from None
        except VilavtError as error:
            raise DataError(f"{sample}: {error}", "record") from None
        if not rendered.trained:
            raise DataError(f"{sample}: no token of it is trained", "nothing to train")
        return rendered

    # ------------------------------------------------------------------ published records

    def _published(
        self,
        record: PublishedRecord,
        sample: str,
        picture: Callable[[str], Image.Image],
        videos: Sequence[Sequence[Picture]],
        crops: Crops,
    ) -> Rendered:
        turns = list(record.conversations)
        first = 0
        if turns[0].role != "system" and self.settings.system is not None:
            turns.insert(0, PublishedTurn(role="system", content=self.settings.system))
            first = 1  # not an entry of `conversations`: mask_history does not count it
        turns, slots = _with_frames(turns, videos, sample)
        marks = [len(slot) for slot in slots]
        images, groups = (
            self._from_files(record, sample, picture, [one for slot in slots for one in slot])
            if crops == "files"
            else self._from_boxes(record, sample, picture, turns, slots)
        )
        sizes = {i: image.size for i, image in enumerate(images)}
        ends = [0]
        for _, count in groups:
            ends.append(ends[-1] + count)
        ids: list[int] = []
        labels: list[int] = []
        cuts: list[Cut] = []
        shown = 0
        for i, (turn, count) in enumerate(zip(turns, marks, strict=True)):
            trained = turn.role == "assistant" and i - first >= record.mask_history
            tokens, header = self._turn(turn, range(shown, shown + count), sizes)
            shown += count
            end = len(tokens) - (0 if self.settings.labels == "turn_and_newline" else self._newline)
            ids += tokens
            if trained:
                labels += [IGNORE] * header + tokens[header:end] + [IGNORE] * (len(tokens) - end)
            else:
                labels += [IGNORE] * len(tokens)
            if turn.role == "assistant" and shown in ends:
                cuts.append(Cut(len(ids), len(ends) - 1 - ends[::-1].index(shown)))
        pictures = iter(images)
        whole = tuple(
            ImageGroup(tuple(next(pictures) for _ in range(count)), query) for query, count in groups if count
        )
        kept = [i for i, (_, count) in enumerate(groups) if count]
        cuts = [Cut(cut.tokens, sum(k < cut.groups for k in kept)) for cut in cuts]
        return Rendered(Example(ids, labels, groups=whole), tuple(cuts))

    @property
    def _newline(self) -> int:
        return len(encode_text("\n", self.tokenizer, self.special))

    def _turn(self, turn: PublishedTurn, images: range, sizes: dict[int, tuple[int, int]]) -> tuple[list[int], int]:
        """Ids of one turn with its closing newline, and how many of them are its header."""
        special = self.special
        header = f"{turn.role}\n"
        length = 1 + len(encode_text(header, self.tokenizer, special))
        parts: list[str | int | Mark] = []
        if images:
            for text, image in zip(turn.content.split(IMAGE_MARK), [*images, None], strict=True):
                parts += [text] if image is None else [text, image]
        else:
            parts = [turn.content]
        opening: list[str | int | Mark] = [Mark(special.im_start), header]
        closing: list[str | int | Mark] = [Mark(special.im_end), "\n"]
        if turn.role == "assistant" and self.settings.labels == "turn":
            # as it is sampled: the header is the end of the prompt, and the text never melts into it
            chunks = [opening, [*parts, *closing]]
        else:
            chunks = [[*opening, *parts, *closing]]
        tokens = [t for chunk in chunks for t in compose(chunk, sizes, self.tokenizer, special).tokens]
        return tokens, length

    def _from_files(
        self, record: PublishedRecord, sample: str, picture: Callable[[str], Image.Image], slots: Sequence[_Slot]
    ) -> tuple[list[Image.Image], list[tuple[str, int]]]:
        count, marks = len(record.images), slots.count(None)
        if marks != count:
            raise DataError(
                f"{sample}: {marks} {IMAGE_MARK} in user turns, {count} images; they must be as many", "image marks"
            )
        groups = query_groups(record, sample, len(slots))
        cap = self._cap(record)
        images = []
        names = iter(record.images)
        for i, frame in enumerate(slots):
            name = next(names) if frame is None else frame.name
            try:
                image = picture(name) if frame is None else frame.image
                images.append(fit(image, min_pixels=self.settings.min_pixels, max_pixels=cap))
            except ImageError as error:
                raise DataError(f"{sample}, image {i} ({name}): {error}", "image") from None
        return images, groups

    def _from_boxes(
        self,
        record: PublishedRecord,
        sample: str,
        picture: Callable[[str], Image.Image],
        turns: Sequence[PublishedTurn],
        slots: Sequence[Sequence[_Slot]],
    ) -> tuple[list[Image.Image], list[tuple[str, int]]]:
        """Originals from the list, the images of a turn that follows a tool call cut from the call's boxes."""
        gallery = Gallery(min_pixels=self.settings.min_pixels)
        groups: list[tuple[str, int]] = []
        cap = self._cap(record)
        call: ToolCall | None = None
        names = iter(record.images)
        for i, (turn, wanted) in enumerate(zip(turns, slots, strict=True)):
            count = len(wanted)
            if turn.role == "assistant":
                action = parse_turn(turn.content, "published")
                if isinstance(action, Malformed):
                    raise DataError(f"{sample}, turn {i}: {action.detail}; its crops cannot be cut", "tool call")
                call = action if isinstance(action, ToolCall) else None
                continue
            if call is not None and count:
                if count != len(call.regions) or any(wanted):
                    raise DataError(
                        f"{sample}, turn {i}: {count} {IMAGE_MARK} after a call of {len(call.regions)} regions",
                        "image marks",
                    )
                gallery.crop(call, cap)
                groups.append((call.query, count))
                call = None
                continue
            for frame in wanted:
                name = next(names, None) if frame is None else frame.name
                if name is None:
                    raise DataError(
                        f"{sample}, turn {i}: {len(record.images)} images, but more {IMAGE_MARK} outside tool "
                        "responses",
                        "image marks",
                    )
                gallery.add_original(picture(name) if frame is None else frame, cap)
                groups.append(("", 1))
        return [view.image for view in gallery.views], groups

    def _cap(self, record: PublishedRecord | EpisodeRecord) -> float:
        return record.max_pixels or self.settings.max_pixels

    # ------------------------------------------------------------------ episode records

    def _episode(
        self,
        record: EpisodeRecord,
        sample: str,
        picture: Callable[[str], Image.Image],
        videos: Sequence[Sequence[Picture]],
    ) -> Rendered:
        if videos and VIDEO_MARK in record.question:
            raise DataError(
                f"{sample}: the question holds {VIDEO_MARK}; an episode shows its videos before the question, leave it "
                "out",
                "image marks",
            )
        cap = self._cap(record)
        longest = max(len(turn.text) for turn in record.turns) + 64  # a character is never more than a few bytes
        preset = self.preset.with_limits(
            max_pixels=cap,
            crop_max_pixels=cap if record.max_pixels else self.preset.limits.crop_max_pixels,
            min_pixels=min(self.settings.min_pixels, cap),
            max_new_tokens_per_turn=4 * longest,
            max_context=None,
            **({"max_turns": record.max_turns} if record.max_turns else {}),
        )
        settings = ConversationSettings(self.tokenizer, self.prompts, preset, preset.limits, preset.sampling, seed=0)
        pictures: list[Image.Image | Picture] = [
            *map(picture, record.images),
            *(frame for frames in videos for frame in frames),
        ]
        episode = settings.episode(pictures, record.question, sample_id=sample)
        driver = Driver(Sample((), record.question, sample), settings, episode=episode, fallback=False)
        driver.start()
        cuts, untrained = [], []
        for i, turn in enumerate(record.turns):
            if driver.request is None:
                raise DataError(
                    f"{sample}: {len(record.turns)} turns, but the episode ended before turn {i} ({episode.finish}): "
                    f"{episode.result.detail}",
                    "turns",
                )
            start = len(episode.record.token_ids)
            driver.take_text(turn.text)
            if (error := driver.result.error) is not None:
                raise error
            fed = episode.turns[-1]
            if fed.problem is not None:
                raise DataError(f"{sample}, turn {i}: {fed.problem}", "tool call")
            end = start + fed.token_count
            shown = sum(len(inquiry.images) for inquiry in episode.inquiries) - len(fed.views)
            whole = sum(1 for inquiry in episode.inquiries if inquiry.image_indices[-1] < shown)
            cuts.append(Cut(end, whole))
            if not turn.train:
                untrained.append(range(start, end))
        if episode.finish is not FinishReason.ANSWER:
            raise DataError(f"{sample}: the last of {len(record.turns)} turns gives no answer", "turns")
        record_ = episode.record
        labels = [t if m else IGNORE for t, m in zip(record_.token_ids, record_.loss_mask, strict=True)]
        for span in untrained:
            labels[span.start : span.stop] = [IGNORE] * len(span)
        groups = tuple(ImageGroup(inquiry.images, inquiry.query, inquiry.query_prefix) for inquiry in record_.inquiries)
        return Rendered(Example(record_.token_ids, labels, groups=groups), tuple(cuts))


def _with_frames(
    turns: Sequence[PublishedTurn], videos: Sequence[Sequence[Picture]], sample: str
) -> tuple[list[PublishedTurn], list[list[_Slot]]]:
    """Turns with one ``<image>`` per frame instead of each ``<video>``, and of every turn what its marks stand for.

    Without videos ``<video>`` is text, as in a question about web pages.

    Raises:
        DataError: the marks are not as many as the videos.
    """
    pattern = re.compile("|".join(map(re.escape, (IMAGE_MARK, *([VIDEO_MARK] if videos else [])))))
    marks = sum(turn.content.count(VIDEO_MARK) for turn in turns if turn.role == "user")
    if videos and marks != len(videos):
        raise DataError(
            f"{sample}: {marks} {VIDEO_MARK} in user turns, {len(videos)} videos; they must be as many", "image marks"
        )
    rest = iter(videos)
    out: list[PublishedTurn] = []
    slots: list[list[_Slot]] = []
    for turn in turns:
        own: list[_Slot] = []

        def spelled(mark: re.Match[str], own: list[_Slot] = own) -> str:
            frames: Sequence[_Slot] = [None] if mark[0] == IMAGE_MARK else next(rest)
            own += frames
            return IMAGE_MARK * len(frames)

        content = pattern.sub(spelled, turn.content) if turn.role == "user" else turn.content
        out.append(turn.model_copy(update={"content": content}))
        slots.append(own)
    return out, slots


def query_groups(record: PublishedRecord, sample: str, count: int) -> list[tuple[str, int]]:
    """Queries of a published record with the number of images of each, in order.

    Args:
        record: the record.
        sample: names it in errors.
        count: images, the frames of videos among them.

    Raises:
        DataError: the mapping does not give every image a query, or not in the order that the encoder needs.
    """
    mapping = list(range(count)) if record.image_to_query_mapping is None else record.image_to_query_mapping
    queries = [""] * count if record.queries is None else record.queries
    if len(mapping) != count:
        raise DataError(
            f"{sample}: image_to_query_mapping has {len(mapping)} entries, there are {count} images", "query mapping"
        )
    if not mapping:
        return []
    if min(mapping) < 0 or len(queries) != max(mapping) + 1:
        raise DataError(
            f"{sample}: image_to_query_mapping names queries {min(mapping)} to {max(mapping)}, queries has "
            f"{len(queries)} entries; it must have {max(mapping) + 1}",
            "query mapping",
        )
    if any(later < earlier for earlier, later in pairwise(mapping)):
        raise DataError(
            f"{sample}: image_to_query_mapping {mapping} must not decrease: images of one query are neighbours, and "
            "queries are numbered in the order of the images",
            "query mapping",
        )
    return [(query, mapping.count(i)) for i, query in enumerate(queries)]
