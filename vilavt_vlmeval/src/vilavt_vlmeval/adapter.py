"""A question in, a bare answer out: engine, traces and resuming, whichever toolkit asks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vilavt_core.backends import names_server, open_backend
from vilavt_core.results import Sample

from .messages import BenchmarkQuestion
from .settings import PREFIX, AdapterSettings
from .traces import Traces, make_folder

logger = logging.getLogger(__name__)

NO_BENCHMARK = "no-benchmark"
"""Name in traces when the toolkit names none."""


class Adapter:
    """Answers questions of benchmarks with one engine.

    Args:
        settings: how.
        name: of the model, in traces; empty: the folder's, or the server's address.

    Raises:
        SettingsError: no checkpoint is named, or the trace folder cannot be made.
        VilavtError: the checkpoint cannot be loaded, or the server does not answer.
    """

    def __init__(self, settings: AdapterSettings, name: str = "") -> None:
        path = settings.path
        self.settings = settings
        self.name = name or (urlsplit(path).netloc if names_server(path) else Path(path).name)
        if settings.trace_dir is not None:
            make_folder(settings.trace_dir)
        options = settings.options()
        if settings.backend_name == "hf" and options.device == "auto":
            options = replace(options, device=own_gpu())
        self.backend = open_backend(path, settings.backend_name, options)
        self._traces: dict[str, Traces] = {}
        self._lock = threading.Lock()

    def answer(self, question: BenchmarkQuestion, benchmark: str | None = None) -> str:
        """The bare final answer, without thoughts and tags; ``""`` if there is none. Whatever goes wrong is in the
        trace and in the log, and ends this sample only. May be called from several threads with a server.
        """
        return self.answers([question], benchmark)[0]

    def answers(self, questions: Iterable[BenchmarkQuestion | None], benchmark: str | None = None) -> list[str]:
        """Like `answer`, for many questions, as many side by side as the engine takes; in their order. They are
        drawn when their turn comes, and their images let go when they are answered; None is answered with ``""``.
        """
        benchmark = benchmark or NO_BENCHMARK
        traces = self._traces_of(benchmark)
        found: list[str] = []
        waiting: dict[int, tuple[int, BenchmarkQuestion, str]] = {}

        def samples() -> Iterator[Sample]:
            number = 0
            for place, question in enumerate(questions):
                found.append("")
                if question is None:
                    continue
                try:
                    key = self._key(question, benchmark)
                except Exception as error:
                    self.fail(question, benchmark, error)
                    continue
                if traces is not None and self.settings.resume and (known := traces.answer(key)) is not None:
                    found[place] = known
                    continue
                waiting[number] = place, question, key
                number += 1
                yield Sample(question.images, question.text, id=question.sample_id)

        drawn = samples()
        try:
            for number, result in self.backend.iter_many(drawn):
                place, question, key = waiting.pop(number)
                if result.error is not None:
                    self._log(question, benchmark, result.error)
                self._write(benchmark, question, key, result.to_json())
                found[place] = result.answer or ""
        except Exception as error:  # of the engine as a whole
            for _ in drawn:
                pass
            for _, question, key in waiting.values():
                self.fail(question, benchmark, error, key)
        return found

    def fail(self, question: BenchmarkQuestion, benchmark: str, error: Exception, key: str = "") -> None:
        """Record a sample that could not be asked."""
        self._log(question, benchmark, error)
        said = {"question": question.text, "answer": None, "finish": "error"}
        self._write(benchmark, question, key, said | {"error": f"{type(error).__name__}: {error}"})

    def _key(self, question: BenchmarkQuestion, benchmark: str) -> str:
        """Equal for samples whose answers depend on the same things; which device it was is not one of them."""
        seed = Sample([], "", id=question.sample_id).seed_from(self.settings.seed)
        provenance = self.backend.provenance(seed).to_json() | {"device": ""}
        parts = [benchmark, question.digest(), provenance]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _write(self, benchmark: str, question: BenchmarkQuestion, key: str, said: dict[str, Any]) -> None:
        traces = self._traces_of(benchmark)
        if traces is not None:
            head = {"key": key, "model": self.name, "benchmark": benchmark, "sample_id": question.sample_id}
            traces.write({**said, **head, "image_files": question.files})

    def _traces_of(self, benchmark: str) -> Traces | None:
        folder = self.settings.trace_dir
        if folder is None:
            return None
        with self._lock:
            if benchmark not in self._traces:
                traces = Traces(folder, self.name, benchmark, int(os.environ.get("RANK", 0)))
                self._traces[benchmark] = traces
                if self.settings.resume and len(traces):
                    logger.warning(
                        "%s: %s holds %d answers; they are taken where settings and question are the same (%sRESUME=0 "
                        "asks again)",
                        benchmark,
                        folder,
                        len(traces),
                        PREFIX,
                    )
            return self._traces[benchmark]

    def _log(self, question: BenchmarkQuestion, benchmark: str, error: Exception) -> None:
        logger.warning("%s, sample %s: counted as no answer: %s", benchmark, question.sample_id, error)


def own_gpu() -> str:
    """The device of this rank, for runners that show every rank all GPUs; ``auto`` if there is nothing to choose."""
    import torch

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks > 1 and torch.cuda.is_available() and torch.cuda.device_count() >= ranks:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    return "auto"
