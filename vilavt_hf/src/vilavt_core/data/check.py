"""Is a training set sound, and what is in it?"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from ..errors import DataError
from ..protocol import IMAGE_MARK, Malformed, ToolCall, parse_turn
from .dataset import Lengths, SftDataset
from .example import Dropped
from .parallel import in_processes
from .rendering import query_groups
from .schema import PublishedRecord, read_record


@dataclass(frozen=True)
class Finding:
    """Something wrong with one sample."""

    sample: str
    severity: Literal["error", "warning"]
    """An error keeps the sample out of training; a warning is about what it teaches."""
    kind: str
    text: str


def check(dataset: SftDataset, *, decode: bool = False, workers: int = 0, progress: bool = False) -> Iterator[Finding]:
    """Everything that is wrong with the samples of a data set, in their order.

    Args:
        dataset: what to check; samples longer than its ``max_length`` are findings.
        decode: decode every image too, not only its header: finds damage inside, takes far longer.
        workers: processes.
        progress: show a bar.
    """
    look = partial(_findings, dataset, decode)
    for findings in in_processes(look, range(len(dataset)), workers=workers, title="checking samples",
                                 progress=progress):  # fmt: skip
        yield from findings


def _findings(dataset: SftDataset, decode: bool, i: int) -> list[Finding]:
    name, measure = dataset.name(i), dataset.measure(i)
    findings = []
    if measure.kind:
        findings.append(Finding(name, "error", measure.kind, measure.problem))
    elif decode and isinstance(sample := dataset[i], Dropped):
        findings.append(Finding(name, "error", sample.kind, sample.reason))
    if measure.cut_from:
        text = f"{name}: {measure.cut_from} tokens, {measure.tokens} are left after the cut"
        findings.append(Finding(name, "warning", "cut", text))
    try:
        record = read_record(dataset.record(i), name)
    except DataError:
        return findings  # already among them
    if isinstance(record, PublishedRecord):
        findings += [Finding(name, "warning", kind, f"{name}, {text}") for kind, text in call_problems(record)]
    return findings


def call_problems(record: PublishedRecord) -> Iterator[tuple[str, str]]:
    """What a published record's tool calls would teach wrongly, as (kind, sentence).

    The published loader never reads a call: a box that is missing, a query that is not the one its crops are encoded
    with, or crops that do not follow go unnoticed there.
    """
    if record.videos:
        return  # how many images a mark stands for is not known without the files
    try:
        groups = query_groups(record, "", len(record.images))
    except DataError:
        return
    query_of = [query for query, count in groups for _ in range(count)]
    shown, pending = 0, None
    for i, turn in enumerate(record.conversations):
        if turn.role == "user":
            marks = turn.content.count(IMAGE_MARK)
            if pending is not None and marks != len(pending.regions):
                yield "crops", f"turn {i}: {marks} images follow a call of {len(pending.regions)} regions"
            elif pending is not None:
                asked = {query_of[k] for k in range(shown, min(shown + marks, len(query_of)))}
                if asked and asked != {pending.query}:
                    yield (
                        "query",
                        f"turn {i}: its crops are encoded with {sorted(asked)}, the call asks {pending.query!r}",
                    )
            shown, pending = shown + marks, None
        elif turn.role == "assistant":
            action = parse_turn(turn.content)
            if isinstance(action, Malformed):
                yield "tool call", f"turn {i}: {action.detail}"
            elif isinstance(action, ToolCall):
                pending = action
                for k, region in enumerate(action.regions):
                    if not 0 <= region.index < shown:
                        yield "tool call", f"turn {i}: region {k} names image {region.index}, {shown} were shown"
    if pending is not None:
        yield "crops", "the last tool call has no response"


@dataclass(frozen=True)
class Statistics:
    """One data set in figures."""

    name: str
    samples: int
    """Those that can be trained on."""
    dropped: dict[str, int]
    cut: int
    tokens: int
    trained_tokens: int
    image_tokens: int
    images: int
    turns: int
    """Assistant turns."""
    length_quantiles: dict[str, int]
    """Tokens of a sample: median, 90 %, 99 %, longest."""


def statistics(dataset: SftDataset, lengths: Lengths) -> list[Statistics]:
    """Figures of every source, and of all together if there are several."""
    sources = np.array([dataset.source_of(i) for i in range(len(dataset))], dtype=object)
    names = [source.name for source in dataset.sources]
    rows = [_statistics(name, np.flatnonzero(sources == name), lengths) for name in names]
    return rows if len(rows) == 1 else [*rows, _statistics("all", np.arange(len(dataset)), lengths)]


def _statistics(name: str, samples: np.ndarray, lengths: Lengths) -> Statistics:
    tokens = lengths.tokens[samples]
    kept = tokens[tokens > 0]
    quantiles = np.quantile(kept, [0.5, 0.9, 0.99, 1]).astype(int).tolist() if len(kept) else [0] * 4
    problems = Counter(lengths.problems[i][0] for i in samples.tolist() if i in lengths.problems)
    return Statistics(
        name=name,
        samples=len(kept),
        dropped=dict(problems),
        cut=int((lengths.cut_from[samples] > 0).sum()),
        tokens=int(kept.sum()),
        trained_tokens=int(lengths.trained[samples].sum()),
        image_tokens=int(lengths.image_tokens[samples].sum()),
        images=int(lengths.images[samples].sum()),
        turns=int(lengths.turns[samples].sum()),
        length_quantiles=dict(zip(("50%", "90%", "99%", "max"), quantiles, strict=True)),
    )


def padding_share(tokens: Sequence[int] | np.ndarray, size: int, seed: int = 0) -> float:
    """Share of the slots that hold padding when samples of these lengths are batched at random."""
    shuffled = np.random.default_rng(seed).permutation(np.asarray(tokens))
    whole = shuffled[: len(shuffled) // size * size].reshape(-1, size)
    return float(1 - whole.sum() / (whole.max(1).sum() * size)) if len(whole) else 0.0
