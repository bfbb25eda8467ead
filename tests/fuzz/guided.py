"""One target of test_targets.py, with inputs that atheris (libFuzzer) changes until they reach new code.

    python tests/fuzz/guided.py any_text_is_a_turn --seconds 600 --corpus FOLDER

FOLDER keeps the inputs that reached new code, for the next run. What breaks the target ends the run with its traceback,
and its bytes are written to FOLDER/crash-…: `--again FILE` repeats it.
"""

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vilavt_core", "vilavt_eval", "vilavt_vllm"]):
    import test_targets


def main() -> None:
    """Command line; libFuzzer ends the process."""
    names = [name.removeprefix("test_") for name in vars(test_targets) if name.startswith("test_")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=names, metavar="TARGET", help=", ".join(names))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--again", type=Path, metavar="FILE", help="this one input, instead of new ones")
    options = parser.parse_args()
    options.corpus.mkdir(parents=True, exist_ok=True)
    inputs = [f"-max_total_time={options.seconds}", str(options.corpus)] if options.again is None else [options.again]
    limits = ["-max_len=4096", "-timeout=60", "-rss_limit_mb=4096", f"-artifact_prefix={options.corpus}/"]
    target = getattr(test_targets, f"test_{options.target}").of_bytes
    atheris.Setup([sys.argv[0], *limits, *map(str, inputs)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
