"""What `vilavt score` takes for a large result file: seconds and peak memory of the whole command, imports included.

    python benchmarks/scoring_speed.py [--rows 100000] [--json FILE]

The file is made up: half multiple choices, half numbers, of four categories of VSI-Bench, with traces and 32 image
paths a row, about 1.8 kB each. A third is right, a third empty, a third wrong (numbers by 10 %, which scores 0.9), and
the command must find exactly that. It writes its whole report. The issue's bound is 20 s and 1 GB for 100,000 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CATEGORIES = ("object_rel_distance", "object_counting", "route_planning", "room_size_estimation")
COMMAND = """
import atexit, os, pathlib
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: pathlib.Path(os.environ["PEAK"]).write_text(status.read_text()))
from vilavt_core.cli import main
main()
"""
"""Keeps the kernel's account of its memory: what a parent is told includes the parent's own memory at the fork."""


def row(i: int) -> dict[str, Any]:
    number = i % 2 == 1
    target, wrong = ("100", "110") if number else ("B", "A")
    return {
        "question_id": i,
        "problem_type": "regression" if number else "multiple choice",
        "original_question_type": CATEGORIES[i % 4],
        "question": "How many are there? " * 10,
        "images": [f"scene{i}/frame_{j}.jpg" for j in range(32)],
        "answer": target,
        "response": (target, "", wrong)[i % 3],
        "finish": "answer",
        "error": None,
        "turns": ["<think>" + "word " * 60 + "</think>", "<answer>" + target + "</answer>"],
    }


def benchmark(rows: int, folder: Path) -> dict[str, Any]:
    """Seconds, megabytes, and the scores found beside those that are right."""
    path, out = folder / "results.jsonl", folder / "out"
    expected: dict[str, list[float]] = {name: [] for name in CATEGORIES}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"run": {"benchmark": {"name": "VSI-Bench"}, "seed": 0}}) + "\n")
        for i in range(rows):
            file.write(json.dumps(row(i)) + "\n")
            expected[CATEGORIES[i % 4]].append((1.0, 0.0, 0.9 if i % 2 else 0.0)[i % 3])
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "score", str(path), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PEAK": str(folder / "peak")},
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status != 0:
        raise SystemExit(f"vilavt score failed with status {status}")
    (setting,) = json.loads((out / "scores.json").read_text())["settings"]
    found = {figure["name"]: figure["score"] for figure in setting["figures"]}
    return {
        "rows": rows,
        "file_mb": path.stat().st_size / 1e6,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": int(re.findall(r"VmHWM:\s+(\d+) kB", (folder / "peak").read_text())[0]) / 1e3,
        "found": {name: found[name] for name in expected} | {"overall": found["overall"]},
        "expected": {name: sum(scores) / len(scores) for name, scores in expected.items()},
        "flaws": setting["flaws"],
    }


def main() -> None:
    """Print the table; exit with 1 if a score is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = benchmark(options.rows, Path(folder))
    table = Table("rows", "file", "seconds", "CPU seconds", "peak memory")
    table.add_row(
        f"{report['rows']:,}",
        f"{report['file_mb']:.0f} MB",
        f"{report['seconds']:.1f}",
        f"{report['cpu_seconds']:.1f}",
        f"{report['peak_mb']:.0f} MB",
    )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any(abs(report["found"][name] - score) > 1e-9 for name, score in report["expected"].items()):
        raise SystemExit(f"the scores are wrong: {report['found']}, they are {report['expected']}")


if __name__ == "__main__":
    main()
