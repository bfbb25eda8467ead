"""Asks questions on a Ray cluster, through ``ray.data``: every actor opens a backend of its own.

The process that started the run writes the results, so that resuming and merging are the same as without Ray. Needs
``pip install "vilavt-hf[ray]"``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vilavt_core.errors import EvaluationError
from vilavt_core.results import Provenance

from .questions import Question, Selection
from .runner import Ask, ResultRow, Setting, asking

logger = logging.getLogger(__name__)

QUESTIONS_PER_CALL = 64
"""Handed to an actor at once; it sends rows back as they are known."""


class Cluster:
    """A connection to Ray.

    Args:
        address: of a running cluster (``auto``: the one that the environment names), or ``local`` to start one here.
        actors: backends; None: one per GPU that each needs, or one if there are no GPUs.

    Raises:
        EvaluationError: Ray is not installed, or does not answer there.
    """

    def __init__(self, address: str, actors: int | None = None) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise EvaluationError(f'--ray needs ray.data ({error}): pip install "vilavt-hf[ray]"') from None
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise EvaluationError(
                f"--ray {address}: {error}; start a cluster with `ray start --head`, or pass --ray local"
            ) from None
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self.address, self.actors = address, actors

    def provenance(self, setting: Setting) -> Callable[[int], Provenance]:
        """What results will depend on, by seed; a worker opens the backend to find out."""
        import ray

        gpus_each, _ = self._share(setting)
        told: Provenance = ray.get(ray.remote(num_gpus=gpus_each, num_cpus=1)(_provenance).remote(setting))
        return lambda seed: replace(told, seed=seed)

    def asking(self, setting: Setting, seed: int) -> Ask:
        """Ask on the cluster; see `vilavt_eval.runner.asking`."""

        def ask(questions: Sequence[Question]) -> Iterator[ResultRow]:
            import ray.data

            gpus_each, actors = self._share(setting)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.target_max_block_size = 1  # a row leaves its actor when it is known
            calls = min(len(questions), max(actors, -(-len(questions) // QUESTIONS_PER_CALL)))
            # Only places are handed out, one block per call: a question is read by the actor that asks it.
            places = ray.data.from_numpy(np.array_split(np.arange(len(questions)), calls))
            rows = places.map_batches(
                _Asker,
                fn_constructor_args=(setting, seed, ray.put(questions)),
                compute=ray.data.ActorPoolStrategy(size=actors),
                batch_size=None,
                num_gpus=gpus_each,
                num_cpus=1,
            )
            for found in rows.iter_rows():
                yield json.loads(found["row"])

        return ask

    def _share(self, setting: Setting) -> tuple[int, int]:
        """GPUs of an actor, and number of actors."""
        import ray

        there = int(ray.cluster_resources().get("GPU", 0))
        each = int(dict(setting.engine).get("tensor_parallel_size", 1)) if there and setting.backend != "server" else 0
        return each, self.actors or (max(1, there // each) if each else 1)


def _provenance(setting: Setting) -> Provenance:
    return setting.open().provenance(0)


class _Asker:
    """One actor: a backend, and what is asked of it."""

    def __init__(self, setting: Setting, seed: int, questions: Any) -> None:
        import ray

        self.questions: Sequence[Question] = ray.get(questions)
        self.ask = asking(setting.open(), setting, seed)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for row in self.ask(Selection(self.questions, batch["data"].tolist())):
            yield {"row": [json.dumps(row, default=str)]}
