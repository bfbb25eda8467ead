"""What a run shows and writes down: the console, ``log.jsonl``, ``validation.jsonl``."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from vilavt_core.curves import read_log
from vilavt_core.progress import Advance, counting, time_left


class LastStep(TrainerCallback):
    """Logs and validates the last step, whatever the intervals are."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for both."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"


class StepFile(TrainerCallback):
    """A file of JSON lines, each with its step, and the seconds since the start of this process.

    A resumed run drops the lines behind the step it goes on from, which the killed run had written.
    """

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what is still true."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self.path) if line.get("step", 0) <= state.global_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def append(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add a line."""
        line = {"step": step, "seconds": round(time.monotonic() - self.start, 2), **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class LogFile(StepFile):
    """One line per log, with its figures."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append."""
        if logs and "loss" in logs and state.is_world_process_zero:
            self.append(state.global_step, logs)


class ValidationFile(StepFile):
    """One line per validation, with its figures."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Append."""
        if metrics and state.is_world_process_zero:
            self.append(state.global_step, {name.removeprefix("eval_"): value for name, value in metrics.items()})


class ConsoleReport(TrainerCallback):
    """A bar with the last figures on a terminal, a line per log elsewhere; on one rank only."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task: Any = None
        self.begin, self.first_step = time.monotonic(), 0
        self.shown = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self.begin, self.first_step = time.monotonic(), state.global_step
        self.shown = state.is_world_process_zero
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task("step", total=state.max_steps, completed=state.global_step, figures="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the figures."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        figures = (
            f"loss {logs['loss']:.4f}  |grad| {logs.get('grad_norm', float('nan')):.2f}  "
            f"{logs.get('tokens_per_second', 0):,.0f} tokens/s  {logs.get('images_per_second', 0):.1f} images/s  "
            f"padding {100 * logs.get('padding_share', 0):.0f} %"
        )
        if logs.get("dropped"):
            figures += f"  dropped {logs['dropped']:.0f}"
        if self.bar is not None:
            self.bar.update(self.task, figures=figures)
        else:
            done, to_do = state.global_step - self.first_step, state.max_steps - state.global_step
            left = time_left(time.monotonic() - self.begin, done, to_do)
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  {figures}  {left}", highlight=False, soft_wrap=True
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Show what a validation found, above the bar."""
        if not metrics or not state.is_world_process_zero:
            return
        text = f"validation at step {state.global_step}: loss {metrics['eval_loss']:.4f}"
        if "eval_answers_right" in metrics:
            text += f"  answers right {100 * metrics['eval_answers_right']:.1f} % of {metrics['eval_questions']:.0f}"
        (self.console if self.bar is None else self.bar.console).print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def counting(self, total: int, title: str, unit: str) -> Iterator[Advance]:
        """`vilavt_core.progress.counting`, below the bar of the steps while there is one."""
        if self.bar is None:
            with counting(total, title, unit, shown=self.shown) as advance:
                yield advance
            return
        bar, task = self.bar, self.bar.add_task(title, total=total, figures="")
        try:
            yield partial(bar.advance, task)
        finally:
            bar.remove_task(task)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar."""
        if self.bar is not None:
            self.bar.stop()
