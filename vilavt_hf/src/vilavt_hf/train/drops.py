"""Samples that a run leaves out: listed once, counted over all ranks, and no more than allowed."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vilavt_core.curves import read_log
from vilavt_core.data.dataset import Lengths, SftDataset
from vilavt_core.data.example import Dropped
from vilavt_core.errors import TrainingError
from vilavt_core.sft_config import SftConfig

from .ranks import gathered

logger = logging.getLogger(__name__)


class Drops(TrainerCallback):
    """Lists every sample that is left out, once, and ends a run that leaves out too many.

    Damage inside an image shows when it is the sample's turn, on one rank. The ranks tell one another when a log says
    that there was any, and at the end: those are moments at which all of them are here. So all of them end.
    """

    def __init__(self, config: SftConfig, dataset: SftDataset, lengths: Lengths, path: Path, first: bool, keep: bool):
        self.path, self.first = path, first
        self.total, self.allowed = len(dataset), config.data.max_dropped
        self.reasons = [text for kind, text in lengths.problems.values() if kind != "too long"]
        self.damaged: dict[str, Dropped] = {}
        """Of all ranks, by the sample's name."""
        self.untold: list[Dropped] = []
        """Of this rank, since the ranks last told one another."""
        self.listed = {line["sample"] for line in read_log(path)} if keep else set()
        if first and not keep:
            path.write_text("", encoding="utf-8")
            for i, (kind, text) in lengths.problems.items():
                self._list(Dropped(dataset.name(i), kind, text))
        self._check()
        if lengths.problems and first:
            logger.warning("%d samples are left out: %s; %s lists them", len(lengths.problems),
                           dict(lengths.dropped), path)  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Count what came up since the last log; its figure is that of all ranks."""
        if logs and logs.get("dropped"):
            self._tell()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what came up behind the last log."""
        self._tell()

    def _tell(self) -> None:
        for dropped in (one for untold in gathered(self.untold) for one in untold):
            if dropped.sample in self.damaged:
                continue  # seen in an earlier epoch
            self.damaged[dropped.sample] = dropped
            if dropped.kind != "too long":
                self.reasons.append(dropped.reason)
            if self.first and dropped.sample not in self.listed:
                self._list(dropped)
        self.untold.clear()
        self._check()

    def _check(self) -> None:
        bad = len(self.reasons)
        if bad / self.total > self.allowed:
            raise TrainingError(
                f"{bad} of {self.total} samples cannot be used, data.max_dropped allows {self.allowed:.2%}: "
                f"{'; '.join(self.reasons)[:600]} ({self.path} lists all); restore their files or correct their "
                "records and start again, or raise data.max_dropped. `vilavt data check --decode` finds damage inside "
                "images beforehand"
            )

    def _list(self, dropped: Dropped) -> None:
        line = {"sample": dropped.sample, "kind": dropped.kind, "reason": dropped.reason}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
