"""``torchrun … -m vilavt_hf.train CONFIG.yaml [section.key=value …]``: a rank of what ``vilavt sft`` starts alone."""

import logging
import sys

from vilavt_core.cli.quiet import hide_bars
from vilavt_core.cli.sft import check_run, goes_on
from vilavt_core.ending import ending, resumable, start_logging
from vilavt_core.sft_config import SftConfig


def main() -> None:
    """Train; errors are told as by every command."""
    start_logging(logging.WARNING)
    if len(sys.argv) < 2:
        sys.exit("usage: torchrun … -m vilavt_hf.train CONFIG.yaml [section.key=value …]")
    with ending("vilavt"):
        config = SftConfig.load(sys.argv[1], sys.argv[2:])
        check_run(config)
        with resumable(goes_on(config)):
            hide_bars()
            _train(config)


def _train(config: SftConfig) -> None:
    from .run import Run

    run = Run(config)
    report = run.train()
    if run.trainer.is_world_process_zero():
        sys.stdout.write(report.summary() + "\n")
        sys.stdout.flush()
    # Ranks leave together, before the interpreter takes down what the process group's threads still use.
    run.trainer.accelerator.wait_for_everyone()
    run.trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
