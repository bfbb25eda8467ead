"""What the loop does, counted beside vLLM's own metrics on ``/metrics``."""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import Counter, Gauge

from vilavt_core.driver import Driver


class Metrics:
    """Prometheus series of the loop. One per process: made by :func:`metrics`."""

    def __init__(self) -> None:
        self.running = Gauge("vilavt_episodes_running", "Questions being answered.", multiprocess_mode="livesum")
        self.episodes = Counter(
            "vilavt_episodes",
            "Questions answered, by how they finished; aborted, error and refused among them.",
            ["finish"],
        )
        self.turns = Counter("vilavt_turns", "Assistant turns.")
        self.crops = Counter("vilavt_crops", "Regions cropped and shown.")
        self.follow_ups = Counter(
            "vilavt_follow_ups",
            "Questions that continued a conversation: its token stream was kept, or rebuilt from the messages.",
            ["history"],
        )
        self.prompt_tokens = Counter("vilavt_prompt_tokens", "Prompt tokens over all turns.")
        self.cached_tokens = Counter("vilavt_cached_tokens", "Of these, tokens that vLLM's prefix cache held.")
        self.sampled_tokens = Counter("vilavt_sampled_tokens", "Sampled tokens.")

    def finished(self, driver: Driver | None, finish: str) -> None:
        """Count a question that ended; without a driver it was refused before it began."""
        self.episodes.labels(finish).inc()
        if driver is None:
            return
        result = driver.result
        self.turns.inc(len(result.turns))
        self.crops.inc(sum(view.kind == "crop" for view in result.views) - driver.crops_before)
        self.prompt_tokens.inc(result.billed.prompt)
        self.cached_tokens.inc(result.billed.cached)
        self.sampled_tokens.inc(result.billed.sampled)


@lru_cache(maxsize=1)
def metrics() -> Metrics:
    """The series of this process; registered on first use."""
    return Metrics()
