"""`vilavt chat` in a terminal (a pty), `vilavt ask` of a server, pictures in terminals, options of `vilavt web`."""

import base64
import io
import json
import os
import pty
import re
import select
import signal
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vilavt_core import terminal_pictures
from vilavt_core.cli import app, main
from vilavt_core.cli.web import _users
from vilavt_core.errors import EngineError
from vilavt_core.terminal_pictures import print_picture, shows_sixel, way_here, way_of

SHARED = Path(__file__).parents[1] / "shared"
SCRIPTED = f"""
import sys
sys.path.insert(0, {str(SHARED)!r})
from desks import ScriptedBackend
from vilavt_core import terminal_pictures
from vilavt_core.cli import main, model_options
backend = ScriptedBackend()
backend.pause, backend.words = float(sys.argv.pop(1)), int(sys.argv.pop(1))
terminal_pictures.PATIENCE = float(sys.argv.pop(1))
model_options.open_model = lambda *_, **__: backend
main()
"""
runner = CliRunner()


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.text = ""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            kept = {name: value for name, value in os.environ.items() if name not in ("TMUX", "TERM_PROGRAM")}
            os.execvpe(arguments[0], arguments, kept | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment)

    def send(self, text: str) -> None:
        os.write(self.file, text.encode())

    def wait(self, words: str, seconds: float = 60) -> str:
        """Until the words stand in what came since the last wait; gives that."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, f"{words!r} never came: {self.text!r}"
            if select.select([self.file], [], [], 0.2)[0]:
                self.text += os.read(self.file, 65536).decode(errors="replace")
        at = self.text.index(words) + len(words)
        seen, self.text = self.text[:at], self.text[at:]
        return seen

    def interrupt(self, words: str) -> None:
        """Ctrl-C until the words come: one that comes between two keys stops readline at the next."""
        deadline = time.monotonic() + 60
        while words not in self.text and time.monotonic() < deadline:
            self.send("\x03")
            until = time.monotonic() + 2
            while words not in self.text and time.monotonic() < until:
                if select.select([self.file], [], [], 0.2)[0]:
                    self.text += os.read(self.file, 65536).decode(errors="replace")
        self.wait(words, 0)

    def end(self) -> int:
        """Ctrl-D at the next prompt; the exit code."""
        self.wait("> ")
        self.send("\x04")
        return self.ended()

    def ended(self) -> int:
        """The exit code, once the program has ended."""
        while True:
            try:
                if not os.read(self.file, 65536):
                    break
            except OSError:
                break
        os.close(self.file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def start(tmp_path):
    """Starts `vilavt chat` over a scripted backend that pauses before each of so many words, in a terminal that answers
    nothing by itself."""
    running = []

    def started(
        *arguments: str, pause: float = 0.0, words: int = 3, patience: float = 0.0, **environment: str
    ) -> Terminal:
        script = [sys.executable, "-c", SCRIPTED, str(pause), str(words), str(patience)]
        command = [*script, "chat", "--model", "scripted", *arguments]
        running.append(Terminal(*command, XDG_STATE_HOME=str(tmp_path / "state"), **environment))
        return running[-1]

    yield started
    for one in running:
        try:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "my photo.png"
    Image.new("RGB", (560, 560), (255, 0, 0)).save(path)
    return path


def test_questions_pictures_trace_and_reset(start, photo, tmp_path):
    terminal = start()
    terminal.wait("> ")
    terminal.send(f"/image {photo}\n")
    terminal.wait("560 x 560 px")
    terminal.send("what is it?\n")
    terminal.wait("looked for")
    terminal.wait("answer: the mean colours are (255, 0, 0)")
    terminal.wait("> ")
    terminal.send(f"/image {str(photo).replace(' ', chr(92) + ' ')}\n")  # as a terminal writes what is dropped on it
    terminal.wait("560 x 560 px")
    terminal.send("and these?\n")
    terminal.wait("(255, 0, 0), (255, 0, 0)")
    for name in ("t.html", "t.json"):
        terminal.send(f"/trace {tmp_path / name}\n")
        terminal.wait("trace: ")
    assert [one["question"] for one in json.loads((tmp_path / "t.json").read_text())] == ["what is it?", "and these?"]
    assert json.loads((tmp_path / "t.json").read_text())[1]["image_files"] == [str(photo)] * 2
    assert "and these?" in (tmp_path / "t.html").read_text()
    terminal.send("/reset\n")
    terminal.wait("forgotten")
    terminal.send("/trace x.html\n")
    terminal.wait("nothing was answered yet")
    assert terminal.end() == 0


def test_mistakes_are_named_and_the_chat_goes_on(start, tmp_path):
    terminal = start()
    terminal.wait("> ")
    for line, words in (
        ("/imgae a.png", "unknown command /imgae"),
        ("/image", "it is /image PATH"),
        ("/reset now", "it is /reset alone"),
        ("/image nowhere.png", "nowhere.png: there is no such file"),
        (f"/trace {tmp_path}/no/t.html", "nothing was answered yet"),
        ("/help", "Ctrl-D ends the chat"),
    ):
        terminal.send(line + "\n")
        terminal.wait(words)
    assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(start, photo):
    terminal = start("--image", str(photo), pause=0.1, words=30)
    terminal.wait("> ")
    terminal.send("what?\n")
    terminal.wait("word2")
    terminal.send("\x03")
    terminal.wait("stopped")
    terminal.wait("> ")
    terminal.send("half a line")
    terminal.wait("half a line")  # its echo: readline is reading
    terminal.interrupt("> ")
    terminal.send("again?\n")
    terminal.wait("answer: the mean colours are (255, 0, 0)")
    assert terminal.end() == 0


def test_what_was_typed_is_there_in_the_next_chat(start, tmp_path):
    for keys, words in (("/help\n", "this list"), ("\x1b[A\n", "this list")):
        terminal = start()
        terminal.wait("> ")
        terminal.send(keys)
        terminal.wait(words)
        assert terminal.end() == 0
    kept = tmp_path / "state" / "vilavt" / "chat_history"
    assert "/help" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "environment, shows",
    [
        ({"TERM": "xterm-kitty"}, "\x1b_Ga=T"),
        ({"TERM_PROGRAM": "iTerm.app"}, "\x1b]1337;File=inline=1"),
        ({"COLORTERM": "truecolor"}, "\x1b[38;2;255;0;0;48;2;255;0;0m▀"),
    ],
)
def test_crops_are_shown_inside_the_terminal(start, photo, environment, shows):
    terminal = start("--image", str(photo), **environment)
    terminal.wait("> ")
    terminal.send("what?\n")
    terminal.wait(shows)
    terminal.wait("answer:")


def test_a_picture_in_kittys_chunks_is_the_picture():
    console = Console(file=io.StringIO())
    image = Image.effect_noise((200, 100), 90).convert("RGB")
    print_picture(console, image, "kitty", 40)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", console.file.getvalue())
    assert len(pieces) > 2
    assert all(len(data) <= 4096 for _, data in pieces)
    assert [head[-1] for head, _ in pieces] == ["1"] * (len(pieces) - 1) + ["0"]
    assert "c=25" in pieces[0][0]
    data = base64.b64decode("".join(data for _, data in pieces))
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == image.tobytes()


def sixel_picture(text: str) -> Image.Image:
    """What a terminal draws of sixels, after the description in the VT330/VT340 manual; white where nothing is."""
    body = re.fullmatch(r'\x1bP[\d;]*q"1;1;(\d+);(\d+)(.*)\x1b\\\n', text, re.DOTALL)
    width, height = int(body[1]), int(body[2])
    image = Image.new("RGB", (width, height), "white")
    colours, colour, x, y = {}, None, 0, 0
    for define, use, count, sixel, control in re.findall(
        r"#(\d+;2;\d+;\d+;\d+)|#(\d+)|(?:!(\d+))?([?-~])|([$-])", body[3]
    ):
        if define:
            number, _, *percent = map(int, define.split(";"))
            colours[number] = tuple(round(value * 2.55) for value in percent)
        elif use:
            colour = colours[int(use)]
        elif sixel:
            for _ in range(int(count or 1)):
                for bit in range(6):
                    if ord(sixel) - 63 >> bit & 1:
                        image.putpixel((x, y + bit), colour)
                x += 1
        else:
            x, y = 0, y + (6 if control == "-" else 0)
    return image


def sixels_of(image: Image.Image, columns: int) -> Image.Image:
    console = Console(file=io.StringIO())
    print_picture(console, image, "sixel", columns)
    return sixel_picture(console.file.getvalue())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_a_picture_of_few_colours_in_sixels_is_the_picture(width, height, seed, colours):
    generator = np.random.default_rng(seed)
    palette = generator.integers(256, size=(colours, 3), dtype=np.uint8)
    pixels = palette[generator.integers(colours, size=(height, width))]
    shown = sixels_of(Image.fromarray(pixels), 40)
    assert shown.size == (width, height)
    assert np.abs(np.asarray(shown, dtype=int) - pixels).max() <= 2  # sixels count colours in hundredths


def test_a_photograph_in_sixels_is_like_it_and_no_wider_than_told():
    image = Image.merge(
        "RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.effect_noise((256, 256), 20)]
    )
    shown = sixels_of(image, 40)
    assert shown.size == image.size
    assert np.abs(np.asarray(shown, dtype=int) - np.asarray(image)).mean() < 12
    assert sixels_of(image, 10).size == (80, 80)


@pytest.fixture
def line():
    """Both ends of a terminal's line: what the person's side holds, and what the program reads and writes."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(
    ("reply", "shows"),
    [
        ("\x1b[?62;4;22c", True),
        ("\x1b[?63;1;2;3;4;7;29c", True),
        ("\x1b[?64;1;2c", False),
        ("\x1b[?4;6c", False),  # a VT132
        ("\x1b[?6c", False),
        ("x" * 256, False),
    ],
)
def test_a_terminal_is_asked_for_sixels_and_nothing_behind_its_answer_is_taken(line, monkeypatch, reply, shows):
    monkeypatch.setattr(terminal_pictures, "PATIENCE", 60)
    person, program = line
    before = termios.tcgetattr(program)
    asked = []

    def answers():
        asked.append(os.read(person, 3))
        os.write(person, f"{reply}typed\n".encode())

    thread = threading.Thread(target=answers)
    thread.start()
    assert way_here({"TERM": "foot"}, program, program) == ("sixel" if shows else "blocks")
    thread.join()
    assert asked == [b"\x1b[c"]
    assert os.read(program, 100) == b"typed\n"
    assert termios.tcgetattr(program) == before


def test_a_terminal_that_does_not_answer_shows_half_blocks(line, monkeypatch):
    monkeypatch.setattr(terminal_pictures, "PATIENCE", 0)
    assert not shows_sixel(line[1], line[1])


def test_what_was_typed_already_is_not_lost_and_what_is_known_or_no_terminal_is_not_asked(line, tmp_path):
    person, program = line
    os.write(person, b"what is it?\n")
    assert select.select([program], [], [], 60)[0]
    assert way_here({}, program, program) == "blocks"
    assert os.read(program, 100) == b"what is it?\n"
    assert way_here({"TERM": "xterm-kitty"}, program, program) == "kitty"
    with open(tmp_path / "file", "wb+") as file:
        assert way_here({}, file.fileno(), program) == way_here({}, program, file.fileno()) == "blocks"
        assert file.tell() == 0
    os.set_blocking(person, False)
    echoed = b"what is it?\r\n"
    assert os.read(person, 100) == echoed  # no question among it


def test_crops_are_shown_as_sixels_in_a_terminal_that_says_it_has_them(start, photo):
    terminal = start("--image", str(photo), patience=60)
    terminal.wait("\x1b[c")
    terminal.send("\x1b[?62;4c")
    terminal.wait("> ")
    terminal.send("what?\n")
    terminal.wait('q"1;1;140;140')
    terminal.wait("answer:")


def test_which_terminals_show_pictures():
    assert way_of({"TERM": "xterm-kitty"}) == "kitty"
    assert way_of({"TERM_PROGRAM": "WezTerm"}) == "iterm"
    assert way_of({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}) == "blocks"
    assert way_of({}) == "blocks"


# ---------------------------------------------------------------------- a server


def test_a_server_is_talked_with_and_torch_is_not_loaded(stub_server, photo):
    terminal = Terminal(sys.executable, "-c", (
        "import sys\nfrom vilavt_core.cli import main\n"
        "try:\n    main()\nfinally:\n    print('TORCH', 'torch' in sys.modules)"
    ), "chat", "--model", stub_server.url, "--image", str(photo), "--no-history")  # fmt: skip
    terminal.wait("> ")
    terminal.send("what?\n")
    terminal.wait("answer: A")
    terminal.wait("> ")
    terminal.send("\x04")
    terminal.wait("TORCH False")
    assert terminal.ended() == 0


def test_ask_asks_a_server(stub_server, photo, tmp_path):
    arguments = ["ask", "--model", stub_server.url, "--image", str(photo), "what?"]
    result = runner.invoke(app, [*arguments, "--json", "--max-turns", "3", "--temperature", "0.5", "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["answer"] == "A"
    sent = stub_server.requests[-1]
    assert (sent["vilavt"], sent["temperature"], sent["seed"]) == ({"max_turns": 3}, 0.5, 4)
    assert runner.invoke(app, [*arguments, "--trace", str(tmp_path / "t.html")]).exit_code == 0
    assert "what?" in (tmp_path / "t.html").read_text()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--picture", "t.png"], "a server tells no pixels"),
        (["--dtype", "float32"], "does not support dtype"),
        (["--attention", "sdpa"], "a server's engine is set up when it is started"),
        (["--preset", "rl"], "runs the preset 'default', 'rl' was asked for"),
        (["--image", "https://example.com/a.png"], "pass --allow-urls"),
    ],
)
def test_what_a_server_cannot_heed_is_said(stub_server, photo, monkeypatch, capsys, more, words):
    monkeypatch.setattr(
        "sys.argv", ["vilavt", "ask", "--model", stub_server.url, "--image", str(photo), *more, "what?"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (1, 2)
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


# ---------------------------------------------------------------------- options of the web app


def run_web(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["vilavt", "web", "--model", "nowhere", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (1, 2)
    return " ".join(capsys.readouterr().err.split())


def test_the_web_app_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr("vilavt_core.cli.web.find_spec", lambda name: None)
    assert run_web(monkeypatch, capsys) == (
        'vilavt: EngineError: the web app needs gradio: pip install "vilavt-hf[web]"'
    )


def test_another_address_wants_a_password_and_sharing_is_no_option(monkeypatch, capsys):
    assert "add --auth FILE" in run_web(monkeypatch, capsys, "--host", "0.0.0.0")
    assert "there is no option --share; `vilavt web --help`" in run_web(monkeypatch, capsys, "--share")


def test_passwords_come_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "users"
    file.write_text("anna:se:cret\n\nbert:x\n")
    assert _users(str(file), None) == (("anna", "se:cret"), ("bert", "x"))
    assert _users(None, "anna:secret") == (("anna", "secret"),)
    assert _users(None, None) == ()
    with pytest.raises(EngineError, match="could be read by every user") as refused:
        _users("anna:topsecret", None)
    assert "topsecret" not in str(refused.value)
    file.write_text("anna\n")
    with pytest.raises(EngineError, match="line 1: it must be USER:PASSWORD"):
        _users(str(file), None)
    file.write_text("")
    with pytest.raises(EngineError, match="an empty file lets nobody in"):
        _users(str(file), None)
