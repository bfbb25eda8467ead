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
from vilavt_core.viewer import Trace, shown_talk

from .definition import Benchmark
from .pictures import PictureFolder
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
    """Without pictures."""
    sources: Sequence[str] = ()
    """Path or ``data:`` URL of each source picture, by its number."""
    inside: Mapping[int, str] = field(default_factory=dict)
    """``data:`` URLs of images, where the file has them."""
    category: str = ""
    sizes: ShownSizes | None = None
    """How its images were sized, if the file says so and not what was shown."""

    def replayed(self, folder: PictureFolder, roots: Sequence[Path]) -> Recording:
        """With the images that its turns asked for, of a row that does not say what was shown and whose pictures are
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
        """The trace with its pictures, as far as their files are found."""
        found: dict[int, str] = {}
        for image in self.trace.images:
            source = self._source(image, folder, roots)
            if source is not None:
                whole = replace(image, region=WHOLE, parent=None) if image.index in self.inside else image
                if (address := folder.address_of(source, whole)) is not None:
                    found[image.index] = address
        return replace(self.trace, pictures=found)

    def thumbnail(self, folder: PictureFolder, roots: Sequence[Path], address: str) -> str | None:
        """Address of a thumbnail of the picture that is looked at first."""
        images = self.trace.images
        first = next((image for image in images if image.parent is not None), images[0] if images else None)
        if first is None:
            return None
        original = next((image for image in images if image.source == first.source), first)
        source = self._source(original, folder, roots)
        return None if source is None else folder.thumbnail(source, address)

    def _source(self, image: ShownImage, folder: PictureFolder, roots: Sequence[Path]) -> Path | str | None:
        if image.index in self.inside:
            return self.inside[image.index]
        if image.time is not None or not 0 <= image.source < len(self.sources):
            return None
        name = self.sources[image.source]
        if name.startswith("data:"):
            return name
        found = folder.find(name, roots)
        if found is None:
            folder.missing.setdefault(name[:200], "no such file")
        return found


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
        benchmark: says under which key the row's pictures are.
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
        ShownImage(n, "original", width, height, n, WHOLE, None, None, "", Path(sources[n]).name)
        for n, (width, height) in enumerate(shown.get("originals") or ())
        if n < len(sources)
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
    return Recording(question_id_of(row, line), trace, sources)


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
    originals = {image.source: image.name for image in result.images if image.parent is None}
    named = [originals.get(n, "") for n in range(max(originals, default=-1) + 1)]
    sources = [str(file) for file in files] if isinstance(files, list) and len(files) >= len(named) else named
    return Recording(key, trace, sources, inside)


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
