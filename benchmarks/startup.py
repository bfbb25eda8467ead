"""What starting costs: CPU seconds and peak memory of imports and of commands that need no model.

    python benchmarks/startup.py [--repeats 5] [--cases REGEX] [--beside CHECKOUT] [--json FILE]

Every repeat starts each case in a process of its own, the cases in turn; printed are medians. The sources are those of
this checkout, and of CHECKOUT beside it; entry points (`vilavt doctor` calls them) are those of what is installed. The
bounds are stated for one core of 2020s hardware: 1.0 s without a model, 1.5 s for `doctor`, and `import vilavt_hf` at
most 0.2 s above transformers' own module of the model that ours is a subclass of.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "examples" / "vilavt-tiny")
TRANSFORMERS, OURS = "import transformers' qwen2_5_vl", "import vilavt_hf"
PEAK = """
import atexit, os, sys
def _peak():
    lines = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    open(os.environ["PEAK"], "w").write(lines[0].split()[1])
atexit.register(_peak)
"""
"""Keeps the kernel's account of its memory: what a parent is told includes the parent's own memory at the fork."""
RECORD = {
    "images": ["a.png"],
    "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "<answer>B</answer>"}],
    "queries": [""],
    "image_to_query_mapping": [0],
}
RESULT = {
    "question_id": 0,
    "problem_type": "multiple choice",
    "original_question_type": "route_planning",
    "question": "Left or right?",
    "answer": "B",
    "response": "B",
    "finish": "answer",
    "error": None,
}


def write_inputs(folder: Path) -> None:
    """A training set of one record, and a result file of one row."""
    from PIL import Image

    Image.new("RGB", (56, 56)).save(folder / "a.png")
    (folder / "set.jsonl").write_text(json.dumps(RECORD) + "\n")
    head = {"run": {"benchmark": {"name": "VSI-Bench"}, "seed": 0}}
    (folder / "results.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(RESULT)}\n")


def imports() -> dict[str, str]:
    """Name of a case -> the module that it imports."""
    return {
        "import vilavt_core": "vilavt_core.episode",
        "import vilavt_eval": "vilavt_eval.runner",
        TRANSFORMERS: "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        OURS: "vilavt_hf",
    }


def commands(inputs: Path, out: Path) -> dict[str, list[str]]:
    """Name of a case -> the arguments of `vilavt`."""
    records = str(inputs / "set.jsonl")
    return {
        "vilavt --help": ["--help"],
        "vilavt version": ["version"],
        "vilavt inspect": ["inspect", TINY],
        "vilavt convert": ["convert", TINY, str(out / "converted")],
        "vilavt score": ["score", str(inputs / "results.jsonl")],
        "vilavt prompts show": ["prompts", "show", "default"],
        "vilavt data check": ["data", "check", records, "--model", TINY, "--workers", "0"],
        "vilavt doctor": ["doctor"],
    }


class Checkout:
    """A checkout whose sources are measured."""

    def __init__(self, root: Path) -> None:
        self.sources = [str(path) for path in sorted(root.glob("vilavt_*/src"))]
        project = tomllib.loads((root / "vilavt_hf" / "pyproject.toml").read_text())["project"]
        self.entry = project["scripts"]["vilavt"]

    def cases(self, inputs: Path, out: Path) -> dict[str, tuple[str, list[str]]]:
        """Name -> code and arguments. Modules that this checkout has not are left out."""
        module, _, function = self.entry.partition(":")
        start = f"from {module} import {function}\n{function}()"
        found = {name: (f"import {place}", []) for name, place in imports().items() if self._has(place)}
        return found | {name: (start, arguments) for name, arguments in commands(inputs, out).items()}

    def _has(self, module: str) -> bool:
        package = module.partition(".")[0]
        if not package.startswith("vilavt"):
            return importlib.util.find_spec(package) is not None
        return any(Path(source, package).is_dir() for source in self.sources)

    def measure(self, code: str, arguments: list[str], folder: Path) -> tuple[float, float]:
        """CPU seconds and peak megabytes of one process.

        Raises:
            SystemExit: it failed. A doctor that found something (1) has not.
        """
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*self.sources, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PEAK": str(folder / "peak"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-c", PEAK + code, *arguments]
        with (folder / "said").open("w+b") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode > ("doctor" in arguments):
                said.seek(0)
                raise SystemExit(f"{code} {arguments} ended with {process.returncode}:\n{said.read().decode()}")
        return usage.ru_utime + usage.ru_stime, int((folder / "peak").read_text()) / 1e3


def benchmark(checkouts: dict[str, Checkout], repeats: int, which: str = "") -> dict[str, dict[str, dict[str, float]]]:
    """Case -> checkout -> ``cpu_seconds`` and ``peak_mb``, of the cases in whose names `which` is found."""
    figures: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as inputs:
        write_inputs(Path(inputs))
        for _ in range(repeats):
            for name, checkout in checkouts.items():
                with tempfile.TemporaryDirectory() as out:
                    for case, (code, arguments) in checkout.cases(Path(inputs), Path(out)).items():
                        if re.search(which, case):
                            figure = checkout.measure(code, arguments, Path(out))
                            figures.setdefault(case, {}).setdefault(name, []).append(figure)
    return {
        case: {
            name: {"cpu_seconds": median(s for s, _ in found), "peak_mb": median(mb for _, mb in found)}
            for name, found in of.items()
        }
        for case, of in figures.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default="", help="only those in whose names this regular expression is found")
    parser.add_argument("--beside", type=Path, help="another checkout, measured in the same run")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    checkouts = {"here": Checkout(ROOT)}
    if options.beside is not None:
        checkouts["beside"] = Checkout(options.beside.resolve())
    cases = benchmark(checkouts, options.repeats, options.cases)
    table = Table("case", *(f"{what}, {name}" for name in checkouts for what in ("CPU seconds", "peak MB")))
    for case, of in cases.items():
        shown = [of.get(name) for name in checkouts]
        pairs = [("-", "-") if one is None else (f"{one['cpu_seconds']:.2f}", f"{one['peak_mb']:.0f}") for one in shown]
        table.add_row(case, *(cell for pair in pairs for cell in pair))
    Console().print(table)
    both = checkouts if {OURS, TRANSFORMERS} <= set(cases) else {}
    above = {name: cases[OURS][name]["cpu_seconds"] - cases[TRANSFORMERS][name]["cpu_seconds"] for name in both}
    for name, seconds in above.items():
        print(f"{name}: `import vilavt_hf` costs {seconds:+.2f} s more than transformers' own module of the model")
    report: dict[str, Any] = {"repeats": options.repeats, "cases": cases, "above_transformers": above}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
