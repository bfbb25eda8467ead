"""What the import hook of vilavt-vlmeval costs at every start of an interpreter.

    python benchmarks/vlmeval_startup.py [--starts 100] [--json FILE]

Two bare environments take turns: one whose ``.pth`` file does nothing, and one with ours. Printed is the smallest
process CPU time of each, which other work on the machine disturbs least.
"""

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import venv
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "vilavt_vlmeval" / "src"


def environment(folder: Path, *, ours: bool) -> Path:
    """A bare environment; its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    if ours:
        shutil.copytree(
            SOURCE / "vilavt_vlmeval", site / "vilavt_vlmeval", ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copy(SOURCE / "vilavt_vlmeval.pth", site)
    else:
        (site / "nothing.pth").write_text("import sys\n")
    return folder / "bin" / "python"


def milliseconds(python: Path) -> float:
    """CPU time of one start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, "-c", "pass"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=100, help="of each environment")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pythons = {name: environment(Path(folder) / name, ours=name == "hook") for name in ("nothing", "hook")}
        times: dict[str, list[float]] = {name: [] for name in pythons}
        for _ in range(arguments.starts + 2):
            for name, python in pythons.items():
                times[name].append(milliseconds(python))
    least = {name: min(values[2:]) for name, values in times.items()}  # the first two compile
    base = least["nothing"]
    for name, value in least.items():
        print(f"{name:8} {value:6.2f} ms  {value - base:+.2f} ms  x {value / base:.3f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(least, indent=1) + "\n")


if __name__ == "__main__":
    main()
