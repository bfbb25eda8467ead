"""Lengths of all samples before the first step: every rank measures its share."""

import logging
from pathlib import Path

from vilavt_core.data.dataset import Lengths, SftDataset, measure
from vilavt_core.errors import DataError

from .ranks import all_agree, gathered, rank_and_world

logger = logging.getLogger(__name__)


def measure_all(dataset: SftDataset, *, workers: int = 0, cache: Path | None = None, progress: bool = False) -> Lengths:
    """Measure every sample, each rank its share; all ranks get the same result.

    Args:
        dataset: what to measure.
        workers: processes per rank.
        cache: folder in which the result is kept for the next start, found again by the data set's fingerprint. Then
            only samples are measured whose images have another size or time, or failed because of a file.
        progress: show a bar.
    """
    file = None if cache is None else cache / f"measures-{dataset.fingerprint[:16]}.npz"
    rank, world = rank_and_world()
    known = None if file is None else _known(file, len(dataset))
    known = known if all_agree(known is not None) else None
    share = range(rank, len(dataset), world)
    mine = measure(dataset, share, known=known, workers=workers, progress=progress and rank == 0)
    new = {i: one for part in gathered(mine) for i, one in part.items()}
    if known is not None and not new:
        return known
    lengths = Lengths.of([new[i] if known is None or i in new else known.measure(i) for i in range(len(dataset))])
    if file is not None and rank == 0:
        lengths.save(file)
    return lengths


def _known(file: Path, count: int) -> Lengths | None:
    """Lengths of an earlier start; None: there are none that can be read, of so many samples."""
    if not file.is_file():
        return None
    try:
        lengths = Lengths.load(file)
        if len(lengths.tokens) != count:
            raise DataError(f"{file}: lengths of {len(lengths.tokens)} samples, the data set has {count}", "lengths")
        return lengths
    except DataError as error:
        logger.warning("%s; all samples are measured again", error)
        return None
