"""Rollouts as they were: written while training, played again token by token, shown as a page.

A rollout is stored as its row and the tokens that were sampled. Everything else, the crops included, follows from
running the episode again, so a trace is small and cannot disagree with what was trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vilavt_core.driver import ConversationSettings
from vilavt_core.episode import Episode, Limits
from vilavt_core.json_text import parse_json
from vilavt_core.presets import Sampling, get_preset
from vilavt_core.results import ChatResult, Provenance, Work
from vilavt_core.trace import write_html
from vilavt_core.versions import versions
from vilavt_core.viewer import Trace, shown_tokens

from .data import Row
from .errors import RowError
from .rewards import Reward
from .rollout import finished_episode, start_row

FOLDER = "rollouts"
"""Where a run keeps them, below its checkpoint folder."""


@dataclass(frozen=True)
class SampledTurn:
    """One sampled turn."""

    token_ids: list[int]
    logprobs: list[float | None]


@dataclass(frozen=True, eq=False)
class Rollout:
    """One trajectory of a run."""

    row: Row
    turns: tuple[SampledTurn, ...]
    preset: str
    limits: Limits
    prompts_sha256: str
    temperature: float
    """That its tokens were sampled at; their log-probabilities are those of the logits divided by it. 0: greedy, of the
    logits as they are."""
    step: int
    group: str
    """The trajectories of one prompt share it."""
    reward: Mapping[str, float]

    @classmethod
    def of(
        cls, row: Row, episode: Episode, *, temperature: float, step: int, group: str, reward: Reward | None
    ) -> Rollout:
        """What to keep of a finished episode."""
        record, result = episode.record, episode.result
        turns: list[SampledTurn] = []
        before = 0
        for token, sampled, logprob in zip(record.token_ids, record.loss_mask, record.logprobs, strict=True):
            if sampled and not before:
                turns.append(SampledTurn([], []))
            if sampled:
                turns[-1].token_ids.append(token)
                turns[-1].logprobs.append(logprob)
            before = sampled
        return cls(
            row,
            tuple(turns),
            result.preset,
            result.limits,
            result.prompts_sha256,
            temperature,
            step,
            group,
            {} if reward is None else reward.metrics(),
        )

    def to_json(self) -> dict[str, Any]:
        """One line of a file."""
        return asdict(self) | {"row": self.row.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rollout:
        """Inverse of `to_json`."""
        return cls(
            **{
                **data,
                "row": Row.from_json(data["row"]),
                "turns": tuple(SampledTurn(**turn) for turn in data["turns"]),
                "limits": Limits(**data["limits"]),
            }
        )


def write_rollouts(run: str | Path, rollouts: Sequence[Rollout]) -> None:
    """Add rollouts of one step to those of a run; one file per process and step: nobody shares a file handle."""
    folder = Path(run) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{rollouts[0].step:06d}.{os.uname().nodename}-{os.getpid()}.jsonl"
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(rollout.to_json()) + "\n" for rollout in rollouts)


def read_rollouts(run: str | Path) -> Iterator[Rollout]:
    """The rollouts of a run (its folder, the folder of its rollouts, or one file), by step and group.

    Raises:
        DataError: there are none, or a line is broken.
    """
    run = Path(run)
    folder = run / FOLDER if (run / FOLDER).is_dir() else run
    files = [folder] if folder.is_file() else sorted(folder.glob("step-*.jsonl"))
    if not files:
        raise RowError(
            f"{run}: no rollouts; set trace_every (verl: in the agent loop's configuration, EasyR1: in the block "
            f"vilavt), they are written to {FOLDER} in the folder of the run's checkpoints"
        )
    found: list[Rollout] = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
            try:
                found.append(Rollout.from_json(parse_json(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise RowError(f"{file}, line {number}: not a rollout: {error}") from None
    yield from sorted(found, key=lambda rollout: (rollout.step, rollout.group))


def play(rollout: Rollout, settings: ConversationSettings) -> Episode:
    """Run the episode again.

    Raises:
        DataError: the checkpoint has other prompts, or the images are others than they were.
    """
    if rollout.prompts_sha256 != settings.prompts.sha256:
        raise RowError(
            f"sample {rollout.row.id}: it was run with the prompts {rollout.prompts_sha256[:12]}, the checkpoint has "
            f"{settings.prompts.sha256[:12]}; name the checkpoint of the run"
        )
    preset = settings.preset if settings.preset.name == rollout.preset else get_preset(rollout.preset)
    again = replace(settings, preset=preset, limits=rollout.limits)
    room = rollout.limits.max_context or 2**31
    row = replace(rollout.row, max_pixels=None, max_turns=None)  # they are in the limits
    driver = start_row(row, again, max_prompt=room, max_response=room)
    for number, turn in enumerate(rollout.turns):
        if driver.request is None:
            raise RowError(
                f"sample {rollout.row.id}: the episode ends after {number} turns, {len(rollout.turns)} were recorded; "
                "have its images changed?"
            )
        given = [value for value in turn.logprobs if value is not None]
        stopped = turn.token_ids[-1] in driver.request.stop_token_ids
        driver.take(
            turn.token_ids,
            given if len(given) == len(turn.token_ids) else None,
            "stop" if stopped else "length",
        )
    return finished_episode(driver)


def model_logprobs(model: Any, processor: Any, episode: Episode, temperature: float = 1.0) -> list[float | None]:
    """Log-probability of every sampled token of an episode under a `VilavtPolicy`, in one forward pass; None for
    tokens that were not sampled. Natural log, fp32, placeholders excluded.
    """
    import torch

    from vilavt_hf import compat

    record = episode.record
    ids = torch.tensor(record.token_ids)
    inputs = dict(processor.encode_inquiries(record.inquiries)) if record.inquiries else {}
    positions = compat.rope_index(model.model, ids, inputs.get("image_grid_thw"))
    with torch.inference_mode():
        logits = model(
            input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), position_ids=positions[:, None], **inputs
        ).logits[0, :-1]
    values = (logits.float() / temperature).log_softmax(-1).gather(-1, ids[1:, None])[:, 0].tolist()
    return [value if sampled else None for value, sampled in zip([0.0, *values], record.loss_mask, strict=True)]


def write_page(
    rollouts: Iterable[Rollout],
    settings: ConversationSettings,
    path: str | Path,
    *,
    model: Any = None,
    processor: Any = None,
) -> Path:
    """Write one HTML page that needs nothing else: every rollout with its images, reward, loss mask, and log-probs.

    Args:
        rollouts: which.
        settings: of the checkpoint that they were run with.
        path: the page.
        model: a `VilavtPolicy`; its log-probabilities are compared with the recorded ones.
        processor: its processor.
    """
    traces = []
    for rollout in rollouts:
        episode = play(rollout, settings)
        temperature = rollout.temperature or 1.0
        computed = None if model is None else model_logprobs(model, processor, episode, temperature)
        traces.append(_trace(rollout, episode, computed))
    return write_html(traces, path, title="Rollouts")


def _result(rollout: Rollout, episode: Episode) -> ChatResult:
    result = episode.result
    return ChatResult(
        question=rollout.row.question,
        sample_id=rollout.row.id,
        episode=result,
        record=episode.record,
        provenance=Provenance(
            preset=result.preset,
            limits=result.limits,
            sampling=Sampling(temperature=rollout.temperature),
            seed=0,
            prompts=result.prompts,
            prompts_sha256=result.prompts_sha256,
            checkpoint=None,
            fingerprint=None,
            dtype="",
            device="replayed",
            attention="",
            versions=versions("vilavt-rl"),
        ),
        work=Work(),
        seconds=0.0,
        transcript=episode.transcript,
    )


def _trace(rollout: Rollout, episode: Episode, computed: Sequence[float | None] | None) -> Trace:
    """A rollout as the viewer shows it, with reward, loss mask and log-probabilities."""
    record = episode.record
    recorded = [value for value in record.logprobs if value is not None]
    facts = {
        "step, group": f"{rollout.step}, {rollout.group or '-'}",
        "temperature": f"{rollout.temperature:g}",
        "question type": rollout.row.question_type,
        "reward": ", ".join(f"{name} {value:g}" for name, value in rollout.reward.items()) or "left to the trainer",
        "trained on": f"{sum(record.loss_mask)} of {len(record.token_ids)} tokens",
        "mean log-probability": f"{sum(recorded) / len(recorded):.4f}" if recorded else "not recorded",
    }
    if computed is not None and recorded:
        gaps = [abs(a - b) for a, b in zip(record.logprobs, computed, strict=True) if a is not None and b is not None]
        facts["gap to the model given"] = f"largest {max(gaps):.2e}, mean {sum(gaps) / len(gaps):.2e}"
    return Trace.of(
        _result(rollout, episode),
        target=rollout.row.answer,
        score=rollout.reward.get("accuracy"),
        facts=facts,
        rewards=rollout.reward,
        tokens=list(shown_tokens(record, episode.tokenizer, computed)),
    )
