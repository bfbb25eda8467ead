"""``torchrun … -m vilavt_hf.train CONFIG.yaml [section.key=value …]``: a rank of what ``vilavt sft`` starts alone."""

import logging
import sys

from vilavt_core.errors import VilavtError
from vilavt_core.sft_config import SftConfig

from .run import Run


def main() -> None:
    """An error that we raise on purpose is one line, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if len(sys.argv) < 2:
        sys.exit("usage: torchrun … -m vilavt_hf.train CONFIG.yaml [section.key=value …]")
    try:
        run = Run(SftConfig.load(sys.argv[1], sys.argv[2:]))
        report = run.train()
    except VilavtError as error:
        sys.exit(f"vilavt: {type(error).__name__}: {error}")
    if run.trainer.is_world_process_zero():
        sys.stdout.write(report.summary() + "\n")
        sys.stdout.flush()
    # Ranks leave together, before the interpreter takes down what the process group's threads still use.
    run.trainer.accelerator.wait_for_everyone()
    run.trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
