"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere, nothing of short work."""

import fcntl
import itertools
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vilavt_core import progress
from vilavt_core.checkpoint import convert_checkpoint
from vilavt_core.cli import app
from vilavt_core.progress import counted, counting, time_left, waiting

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "vilavt-tiny"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "TERM": "xterm"}


def in_terminal(code: str, *arguments: str) -> tuple[str, str]:
    """What Python writes to a terminal as its stderr, and to a pipe as its stdout."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=ENVIRONMENT
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    out = process.stdout.read().decode()
    assert process.wait() == 0, shown.decode()
    return shown.decode(), out


@pytest.fixture
def at_once(monkeypatch):
    """No work is too short to be told of."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)


def test_a_terminal_shows_a_bar_with_what_is_left():
    shown, out = in_terminal("""
from vilavt_core import progress
progress.DELAY = 0
for n in progress.counted(range(3), "reading", "page"):
    print(n)
""")
    assert "\r" in shown
    assert "reading: 100%" in shown
    assert "3/3" in shown
    assert "page/s" in shown or "s/page" in shown
    assert out.split() == ["0", "1", "2"]


def test_a_terminal_says_what_it_waits_for_until_it_ends():
    shown, _ = in_terminal("""
import sys, threading
from rich.progress import Progress
from vilavt_core import progress
progress.DELAY = 0
seen = threading.Event()
class Watched(Progress):
    def get_renderables(self):
        seen.set()
        yield from super().get_renderables()
import rich.progress
rich.progress.Progress = Watched
with progress.waiting("loading [a] model"):
    assert seen.wait(60)
sys.stderr.write("ended")
""")
    assert "loading [a] model" in shown
    assert "0:00:0" in shown
    assert shown.rstrip().endswith("ended")
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor that it hides comes back"


def test_elsewhere_there_are_plain_lines_with_what_is_left(at_once, capfd, monkeypatch):
    clock = itertools.count(0, 10)  # ten seconds pass from one look at it to the next
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(counted(["a", "b", "c"], "pages", "page")) == ["a", "b", "c"]
    with counting(4_000_000_000, "weights", "B", done=1_000_000_000) as advance:
        advance(1_500_000_000)
    with counting(3, "loss", "batch") as advance:
        advance(1)
    with waiting("loading a model"):
        pass
    out, err = capfd.readouterr()
    assert out == ""
    assert [c for c in err if not (c.isprintable() or c == "\n")] == []
    assert err.splitlines() == [
        "pages: 1 of 3 pages, left 0:00:20",
        "pages: 2 of 3 pages, left 0:00:10",
        "weights: 2.5 of 4.0 GB, left 0:00:10",
        "loss: 1 of 3 batches, left 0:00:20",
    ]


def test_nothing_is_told_of_short_work_or_of_work_that_nobody_looks_at(monkeypatch, capfd):
    monkeypatch.setattr(progress, "EVERY", 3600.0)
    assert list(counted(range(1000), "pages", "page")) == list(range(1000))
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(counted(range(3), "pages", "page", shown=False)) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_what_is_left_is_reckoned_from_what_was_done_now_and_not_before():
    assert time_left(10, done=5, to_do=20) == "left 0:00:40"
    assert time_left(0.0, done=0, to_do=20) == "left 0:00:00"


def test_an_error_ends_a_bar_and_a_wait(at_once):
    with pytest.raises(KeyError), waiting("x"), counting(3, "x", "y"):
        raise KeyError("x")


@pytest.mark.parametrize("link", [True, False])
def test_a_conversion_counts_the_bytes_that_it_writes_and_those_that_it_verifies(monkeypatch, tmp_path, link):
    told: dict[str, list[int]] = {}

    def recorded(self, count):
        told.setdefault(self.title, [self.total, 0])[1] += count

    monkeypatch.setattr(progress._Lines, "__call__", recorded)
    convert_checkpoint(TINY, tmp_path / "out", link=link, verify=True, progress=True)
    weights = (TINY / "model.safetensors").stat().st_size
    assert told["weights"] == [weights, weights]
    total, done = told["verifying"]
    assert done == total > 0.9 * weights


def test_json_on_stdout_stays_alone_while_progress_is_shown(tmp_path):
    shown, out = in_terminal(
        """
import sys
from vilavt_core import progress
progress.DELAY = 0
sys.argv[0] = "vilavt"
from vilavt_core.cli import main
main()
""",
        *("ask", "which digit is on the red card?", "--model", str(TINY), "--json"),
        *("--image", str(ROOT / "examples" / "pictures" / "scene-1.png")),
    )
    assert "loading vilavt-tiny" in shown
    assert json.loads(out)["question"] == "which digit is on the red card?"


def test_a_command_writes_no_control_characters_where_there_is_no_terminal(at_once, tmp_path, capfd):
    record = {"id": "a", "question": "x", "answer": "y", "image": []}
    (tmp_path / "set.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"id": "b"}) + "\n")
    CliRunner().invoke(app, ["data", "check", str(tmp_path / "set.jsonl"), "--model", str(TINY), "--workers", "0"])
    convert = CliRunner().invoke(app, ["convert", str(TINY), str(tmp_path / "out"), "--copy", "--verify"])
    assert convert.exit_code == 0, convert.output
    text = convert.output + "".join(capfd.readouterr())
    assert "weights: " in text
    assert [c for c in text if not (c.isprintable() or c == "\n")] == []
