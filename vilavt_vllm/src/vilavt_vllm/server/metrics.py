"""What the loop does, counted beside vLLM's own metrics on ``/metrics``."""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vilavt_core.driver import Driver

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
TURNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
BYTES = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """Prometheus series of the loop. One per process: made by `metrics`."""

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
            "Questions that continued a conversation: it was kept, came as a state, or was rebuilt from the messages.",
            ["history"],
        )
        self.prompt_tokens = Counter("vilavt_prompt_tokens", "Prompt tokens over all turns.")
        self.cached_tokens = Counter("vilavt_cached_tokens", "Of these, tokens that vLLM's prefix cache held.")
        self.sampled_tokens = Counter("vilavt_sampled_tokens", "Sampled tokens.")
        self.refusals = Counter(
            "vilavt_refusals", "Requests that got an error instead of an answer or a stream, by its status.", ["status"]
        )
        self.preparation = Histogram(
            "vilavt_preparation_seconds", "From a request to its question, images decoded.", buckets=SECONDS
        )
        self.first_thought = Histogram(
            "vilavt_first_thought_seconds", "From a streamed request to the first text of its answer.", buckets=SECONDS
        )
        self.answers = Histogram(
            "vilavt_answer_seconds", "From a request to the end of its question, however it finished.", buckets=SECONDS
        )
        self.states = Histogram("vilavt_state_bytes", "Size of the states that went out with answers.", buckets=BYTES)
        self.turns_each = Histogram("vilavt_question_turns", "Assistant turns of a question.", buckets=TURNS)

    def finished(self, driver: Driver | None, finish: str, seconds: float) -> None:
        """Count a question that ended.

        Args:
            driver: None: it was refused before it began.
            finish: how it ended.
            seconds: since its request.
        """
        self.episodes.labels(finish).inc()
        if driver is None:
            return
        result = driver.result
        self.answers.observe(seconds)
        self.turns_each.observe(len(result.turns))
        self.turns.inc(len(result.turns))
        self.crops.inc(driver.crops)
        self.prompt_tokens.inc(result.billed.prompt)
        self.cached_tokens.inc(result.billed.cached)
        self.sampled_tokens.inc(result.billed.sampled)


def queued_turns(registry: CollectorRegistry = REGISTRY) -> int:
    """Requests in the engine's queue, of all its ranks, as vLLM's own metric says it."""
    families = registry.restricted_registry(["vllm:num_requests_waiting"]).collect()
    return int(sum(sample.value for family in families for sample in family.samples))


@lru_cache(maxsize=1)
def metrics() -> Metrics:
    """The series of this process; registered on first use."""
    return Metrics()
