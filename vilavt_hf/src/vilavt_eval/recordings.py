"""Recorded conversations as the viewer shows them: rows of result files, results of ``vilavt ask --json``, traces of
VLMEvalKit runs. Nothing that a file says is trusted: what is no conversation is listed with its line and left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vilavt_core.conversation import ShownImage, Turn
from vilavt_core.errors import EvaluationError, ImageError, RegionError, VilavtError
from vilavt_core.json_text import parse_json
from vilavt_core.presets import Limits, get_preset
from vilavt_core.protocol import ToolCall, parse_turn
from vilavt_core.regions import WHOLE, Gallery, Picture, share_budget
from vilavt_core.results import ChatResult
from vilavt_core.sources import Video, source_name
from vilavt_core.viewer import Trace, shown_talk

from .definition import Benchmark
from .pictures import Frame, PictureFolder
from .scores import Flaw, ScoredFile, ScoredRow, question_id_of, read_lines, response_of, score_file

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
"""What a row of another shape than ours may raise."""


@dataclass(frozen=True)
class ShownSizes:
    """How a run sized its images."""

    limits: Limits
    split: Literal["per_image", "total"]

    @classmethod
    def of(cls, run: Mapping[str, Any] | None) -> ShownSizes | None:
        """What the run line of a result file says; None if it says nothing, or that crops were not those asked for."""
        if run is None or run.get("ablation"):
            return None
        try:
            provenance = run["provenance"]
            return cls(Limits(**provenance["limits"]), get_preset(provenance["preset"]).budget_split)
        except (*MALFORMED, VilavtError):
            return None

    def original_pixels(self, count: int) -> float:
        """At most, of each of `count` originals."""
        return share_budget(self.limits.max_pixels, count, self.split)

    @property
    def crop_pixels(self) -> float:
        """At most, of a crop."""
        return self.limits.crop_max_pixels or self.limits.max_pixels


@dataclass(frozen=True, eq=False)
class Recording:
    """A conversation out of a file."""

    key: str
    """The same for the same question in another run."""
    trace: Trace
    """Without images."""
    sources: Sequence[str] = ()
    """Path or ``data:`` URL of each source image, by its number."""
    videos: Sequence[Video] = ()
    """Of a row, behind its images; their paths as the row names them."""
    inside: Mapping[int, str] = field(default_factory=dict)
    """``data:`` URLs of images, where the file has them."""
    category: str = ""
    sizes: ShownSizes | None = None
    """How its images were sized, if the file says so and not what was shown."""

    def replayed(self, folder: PictureFolder, roots: Sequence[Path]) -> Recording:
        """With the images that its turns asked for, of a row that does not say what was shown and whose images are
        found: the crop rule is applied again.
        """
        if self.sizes is None or self.trace.images or not self.sources:
            return self
        paths = [folder.find(name, roots) for name in self.sources]
        gallery = Gallery(min_pixels=self.sizes.limits.min_pixels)
        turns = list(self.trace.turns)
        try:
            for name, path in zip(self.sources, paths, strict=True):
                if path is None:
                    return self
                picture = Picture(folder.open(path), Path(name).name)
                gallery.add_original(picture, self.sizes.original_pixels(len(paths)))
            for place, turn in enumerate(turns[:-1]):  # what the last turn asks for is not shown
                if isinstance(turn.action, ToolCall):
                    first = len(gallery)
                    with suppress(RegionError):  # refused then, too
                        gallery.crop(turn.action, self.sizes.crop_pixels)
                    turns[place] = replace(turn, image_indices=tuple(range(first, len(gallery))))
        except ImageError as error:
            folder.missing.setdefault(self.sources[0][:200], str(error)[:300])
            return self
        images = [ShownImage.of(index, view, "") for index, view in enumerate(gallery.views)]
        return replace(self, trace=replace(self.trace, images=images, turns=turns))

    def pictured(self, folder: PictureFolder, roots: Sequence[Path]) -> Trace:
        """The trace with its images, as far as their files are found; of the others it says why not."""
        found, missing = dict[int, str](), dict[int, str]()
        frames = self._frames(folder, roots)
        images = []
        for image in self.trace.images:
            frame = frames.get(image.source)
            if isinstance(frame, Frame) and image.time is None:
                image = replace(image, time=frame.time, name=frame.path.name)
            images.append(image)
            source, why = self._source(image, frames, folder, roots)
            if source is not None:
                whole = replace(image, region=WHOLE, parent=None) if image.index in self.inside else image
                if (address := folder.address_of(source, whole)) is not None:
                    found[image.index] = address
                    continue
                name = "image in the file" if isinstance(source, str) else Path(str(source)).name
                why = f"{name}: {folder.missing.get(str(source)[:200], 'cannot be read')}"
            if why:
                missing[image.index] = why
        return replace(self.trace, images=images, pictures=found, missing=missing)

    def thumbnail(self, folder: PictureFolder, roots: Sequence[Path], address: str) -> str | None:
        """Address of a thumbnail of the image that is looked at first."""
        images = self.trace.images
        first = next((image for image in images if image.parent is not None), images[0] if images else None)
        if first is None:
            return None
        original = next((image for image in images if image.source == first.source), first)
        source, _ = self._source(original, self._frames(folder, roots), folder, roots)
        return None if source is None else folder.thumbnail(source, address)

    def _source(
        self, image: ShownImage, frames: Mapping[int, Frame | str], folder: PictureFolder, roots: Sequence[Path]
    ) -> tuple[Path | Frame | str | None, str]:
        """Where the pixels of an image come from, or None and why that is not known."""
        if image.index in self.inside:
            return self.inside[image.index], ""
        if image.source in frames:
            frame = frames[image.source]
            return (frame, "") if isinstance(frame, Frame) else (None, frame)
        if not 0 <= image.source < len(self.sources):
            return None, ""
        name = self.sources[image.source]
        if name.startswith("data:"):
            return name, ""
        found = folder.find(name, roots)
        return found, "" if found is not None else _no_file(name, folder)

    def _frames(self, folder: PictureFolder, roots: Sequence[Path]) -> dict[int, Frame | str]:
        """Source -> the frame of a video that it is, or why that is not known."""
        timed = {image.source: image.time for image in self.trace.images if image.time is not None}
        if self.videos:
            return self._frames_of_row(timed, folder, roots)
        times: dict[str, list[float]] = {}
        named = {source: self.sources[source] for source in timed if 0 <= source < len(self.sources)}
        for source, name in named.items():
            times.setdefault(name, []).append(timed[source])
        found: dict[int, Frame | str] = {}
        for source, name in named.items():
            path = folder.find(name, roots)
            wanted = tuple(sorted(set(times[name])))
            found[source] = _no_file(name, folder) if path is None else Frame(path, timed[source], wanted)
        return found

    def _frames_of_row(
        self, timed: Mapping[int, float], folder: PictureFolder, roots: Sequence[Path]
    ) -> dict[int, Frame | str]:
        """A row says no times of its originals: the frames are chosen again, as the benchmark's definition says."""
        shown = [image.source for image in self.trace.images if image.parent is None]
        frames: list[Frame] = []
        for video in self.videos:
            name = str(video.source)
            path = folder.find(name, roots)
            times = None if path is None else folder.times(path, video.frames, video.fps, video.rule)
            if path is None or times is None or isinstance(times, ImageError):
                why = f"{Path(name).name}: {times}" if times is not None else _no_file(name, folder)
                folder.missing.setdefault(name[:200], str(times)[:300])
                return dict.fromkeys(shown[len(self.sources) :], why)
            frames += [Frame(path, time, times) for time in times]
        numbered = dict(enumerate(frames, len(self.sources)))
        told = all(source in numbered and abs(numbered[source].time - time) < 1e-3 for source, time in timed.items())
        if len(shown) != len(self.sources) + len(frames) or not told:
            names = ", ".join(Path(str(video.source)).name for video in self.videos)
            why = (
                f"{names}: {len(shown) - len(self.sources)} frames were shown, not the {len(frames)} that the "
                "definition takes now"
            )
            folder.missing.setdefault(names[:200], why)
            return dict.fromkeys(shown[len(self.sources) :], why)
        return dict(numbered)


@dataclass(frozen=True, eq=False)
class Recordings:
    """The conversations of a file."""

    path: Path
    name: str
    entries: Sequence[Recording]
    benchmark: Benchmark | None
    problems: Sequence[str]
    """Lines that hold no conversation, and why."""


def read_recordings(path: Path, benchmark: Benchmark | None = None) -> Recordings:
    """Read a file of conversations.

    Args:
        path: a result file of an evaluation, traces of VLMEvalKit (both ``.jsonl``), or results of
            ``vilavt ask --json``, one or a list.
        benchmark: whose questions a result file holds; None: what it says.

    Raises:
        EvaluationError: there is no conversation in it.
        BenchmarkError: it cannot be read, or names a benchmark that cannot be used.
    """
    entries: dict[str, Recording] = {}
    problems: list[str] = []
    scored: ScoredFile | None = None
    rows: dict[int, ScoredRow] = {}
    for line, data in _objects(path):
        where = f"{path}, {f'line {line}' if path.suffix == '.jsonl' else f'entry {line}'}"
        try:
            if isinstance(data, Mapping) and "run" in data and "question_id" not in data:
                continue
            if isinstance(data, Mapping) and "question_id" in data:
                if scored is None:
                    scored = score_file(path, benchmark)
                    rows = {row.line: row for row in scored.rows}
                if line not in rows:
                    continue  # answered again in a later line
                entry = recording_of_row(data, line, scored.benchmark, rows[line].strict)
                entry = replace(entry, category=rows[line].category or "", sizes=ShownSizes.of(scored.run))
            else:
                entry = _recording_of_result(data, path, line)
            shown_talk([entry.trace])
            before = entries.get(entry.key)
            if before is None or entry.trace.error is None or before.trace.error is not None:
                entries[entry.key] = entry
        except EvaluationError:
            raise
        except MALFORMED as error:
            problems.append(f"{where}: {_why(data, error)}"[:400])
    if not entries:
        why = f": {problems[0]}" if problems else ""
        raise EvaluationError(
            f"{path}: there is no conversation in it{why}; give result files of vilavt eval, of vilavt ask --json, or "
            "traces of VLMEvalKit"
        )
    name = path.stem if scored is None else _name(scored)
    return Recordings(path, name, list(entries.values()), None if scored is None else scored.benchmark, problems)


def recording_of_row(row: Mapping[str, Any], line: int, benchmark: Benchmark | None, score: float | None) -> Recording:
    """A row of a result file.

    Args:
        row: what the line holds.
        line: its number, from 1; names a row without an id.
        benchmark: says under which key the row's images are.
        score: of its answer, 0 to 1; None: nobody knows.

    Raises:
        KeyError, TypeError, ValueError: it has another shape (see `MALFORMED`).
    """
    texts = row.get("turns")
    seconds = row.get("turn_seconds")
    turns = [str(text) for text in texts] if isinstance(texts, list) else []
    times = seconds if isinstance(seconds, list) and len(seconds) == len(turns) else [None] * len(turns)
    key = (None if benchmark is None else benchmark.keys.images) or "images"
    named = row.get(key) or row.get("images") or row.get("image") or []
    sources = [str(path) for path in (named if isinstance(named, list) else [named])]
    shown = row.get("shown") or {}
    images = [
        ShownImage(
            n, "original", width, height, n, WHOLE, None, None, "", Path(sources[n]).name if n < len(sources) else ""
        )
        for n, (width, height) in enumerate(shown.get("originals") or ())
    ]
    crops: dict[int, list[int]] = {}
    for crop in shown.get("crops") or ():
        images.append(ShownImage.from_json(crop))
        crops.setdefault(crop["turn"], []).append(crop["index"])
    error = row.get("error")
    target = row.get("answer")
    response = response_of(row)
    finish = str(row.get("finish") or "")
    facts = {
        "category": row.get("category"),
        "question type": row.get("problem_type"),
        "seed": row.get("seed"),
        "images": ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else ""),
        "computed": _work(row),
    }
    trace = Trace(
        question=str(row.get("question") or row.get("text") or ""),
        turns=[
            Turn(n, text, parse_turn(text), 0, image_indices=tuple(crops.get(n, ())), seconds=_number(time))
            for n, (text, time) in enumerate(zip(turns, times, strict=True))
        ],
        images=images,
        answer=None if response in (None, "") else str(response),
        finish=finish,
        error=str(error) if error else None,
        sample_id=question_id_of(row, line),
        target=None if target is None else str(target),
        score=score,
        seconds=_number(row.get("seconds")),
        facts={name: str(value) for name, value in facts.items() if value not in (None, "")},
    )
    return Recording(question_id_of(row, line), trace, sources, _videos(row, benchmark))


def _videos(row: Mapping[str, Any], benchmark: Benchmark | None) -> list[Video]:
    videos = None if benchmark is None else benchmark.videos
    if videos is None:
        return []
    return [videos.video(videos.path.format(**one)) for one in videos.named(row)]


def _recording_of_result(data: Any, path: Path, line: int) -> Recording:
    """What `ChatResult.to_json` wrote, with what a VLMEvalKit run adds."""
    if isinstance(data, Flaw):
        raise ValueError(str(data))
    if not isinstance(data, Mapping):
        raise ValueError("not a JSON object")
    if "row" in data and "prompts_sha256" in data:
        raise EvaluationError(f"{path}: these are rollouts of a training run; vilavt-rl replay shows them")
    files = data.get("image_files")
    sample = data.get("sample_id")
    key = str(data["key"] if sample is None and "key" in data else line if sample is None else sample)
    if data.get("error") and "turns" not in data:
        trace = Trace(
            str(data["question"]),
            finish="error",
            error=str(data["error"]),
            sample_id=None if sample is None else str(sample),
        )
        return Recording(key, trace, [str(file) for file in files or ()])
    result = ChatResult.from_json(data)
    trace = replace(Trace.of(result, pictures={}), error=str(data["error"]) if data.get("error") else None)
    inside = {
        image["index"]: image["png"]
        for image in data["images"]
        if isinstance(image.get("png"), str) and image["png"].startswith("data:image/")
    }
    return Recording(key, trace, _files(result.images, files), inside=inside)


def _files(images: Sequence[ShownImage], files: Any) -> list[str]:
    """The file of each source: by the list that the result came with, one entry for each image and each video in the
    order of the conversation, as far as the names agree; else the bare name.
    """
    originals = {image.source: image for image in images if image.parent is None}
    given = [str(file) for file in files] if isinstance(files, list) else []
    out: list[str] = []
    at, before = -1, None
    for source in range(max(originals, default=-1) + 1):
        image = originals.get(source)
        if image is None:
            out.append("")
            continue
        frame_of_same = (
            before is not None
            and image.time is not None
            and before.time is not None
            and image.name == before.name
            and image.time > before.time
        )
        at, before = at if frame_of_same else at + 1, image
        path = given[at] if at < len(given) else ""
        if source_name(path) != image.name and image.name:
            path = next((file for file in given if source_name(file) == image.name), image.name)
        out.append(path)
    return out


def _no_file(name: str, folder: PictureFolder) -> str:
    why = "an image on the network" if "://" in name[:20] else "no such file"
    folder.missing.setdefault(name[:200], why)
    return f"{Path(name).name[:200]}: {why}"


def _objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Line, or number of the entry from 1, and what is there."""
    if path.suffix != ".json":
        yield from read_lines(path)
        return
    try:
        data = parse_json(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except ValueError as error:
        raise EvaluationError(f"{path}: no JSON: {error}; files of one object per line end in .jsonl") from None
    yield from enumerate(data if isinstance(data, list) else [data], 1)


def _name(scored: ScoredFile) -> str:
    from .summary import name_of

    return name_of(scored) if scored.seed is None else f"{name_of(scored)} seed {scored.seed}"


def _work(row: Mapping[str, Any]) -> str:
    work = row.get("work")
    if not isinstance(work, Mapping) or not work.get("distinct_patches"):
        return ""
    computed = work["tokens_prefilled"] + work["tokens_decoded"]
    patches = work["patches_encoded"] / work["distinct_patches"]
    tokens = computed / work["distinct_tokens"] if work["distinct_tokens"] else 1.0
    return (
        f"{work['patches_encoded']} patches ({patches:.2f} per distinct one), {computed} tokens ({tokens:.2f} per "
        "distinct one)"
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _why(data: Any, error: Exception) -> str:
    if isinstance(data, Mapping) and not isinstance(error, KeyError):
        return str(error)
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
