"""`vilavt ask` and `vilavt demo`: output, files, exit codes."""

import json
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from vilavt_core import shipped
from vilavt_core.cli import app, main
from vilavt_core.cli import chat as commands
from vilavt_core.failures import printable_text

runner = CliRunner()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((120, 90)).convert("RGB").save(path)
    return path


@pytest.fixture
def ask(tiny_checkpoint, photo):
    """Runs `vilavt ask` briefly; the random model never answers."""

    def run(*arguments: str):
        base = [
            "ask",
            "--model",
            str(tiny_checkpoint),
            "--image",
            str(photo),
            "--max-new-tokens",
            "5",
            "--device",
            "cpu",
        ]
        return runner.invoke(app, [*base, *arguments])

    return run


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["vilavt", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_ask_prints_the_turns_and_writes_a_trace_and_a_picture(ask, tmp_path):
    result = ask("what?", "--trace", str(tmp_path / "t.html"), "--picture", str(tmp_path / "t.png"))
    assert result.exit_code == commands.NO_ANSWER
    assert "turn 1" in result.output
    assert "no answer (length)" in result.output
    assert "what?" in (tmp_path / "t.html").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "t.png").width > 100


def test_json_goes_to_stdout_alone(ask):
    result = ask("what?", "--json", "--seed", "5", "--max-turns", "2", "--temperature", "0.5")
    data = json.loads(result.stdout)
    assert data["question"] == "what?"
    assert data["finish"] == "length"
    assert data["provenance"]["seed"] == 5
    assert data["provenance"]["limits"]["max_turns"] == 2
    assert data["provenance"]["sampling"]["temperature"] == 0.5
    assert data["work"]["tokens_ratio"] == 1.0
    assert "turn 1" in result.stderr


def test_several_pictures_may_be_given(ask, photo):
    data = json.loads(ask("what?", "--image", str(photo), "--json").stdout)
    assert [image["kind"] for image in data["images"]] == ["original", "original"]
    assert data["image_files"] == [str(photo)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "ImageError: nowhere.png: there is no such file"),
        (["--image", "https://example.com/a.png"], "URLs are not allowed"),
        (["--preset", "fancy"], "EpisodeError: no preset 'fancy'"),
        (["--model", "/no/such/folder"], "CheckpointError: /no/such/folder: no such folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(tiny_checkpoint, photo, monkeypatch, capsys, arguments, message):
    given = ["--model", str(tiny_checkpoint), "--image", str(photo)]
    code = run_main(monkeypatch, "ask", *given, *arguments, "what?")
    error = capsys.readouterr().err.strip()
    assert code == 1
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "there is no device 'gpu'"),
        (["--device", "cuda:99"], "EngineError"),
        (["--device", "meta"], "device meta cannot be used here"),
        (["--attention", "spda"], "there is no attention 'spda'; choose"),
        (["--attention", "flash_attention_3"], "needs the package flash_attn_interface, which is not installed"),
    ],
)
def test_device_and_attention_are_checked_before_the_weights_are_loaded(
    tiny_checkpoint, photo, monkeypatch, capsys, arguments, message
):
    def load(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("vilavt_hf.modeling_vilavt.VilavtForConditionalGeneration.from_pretrained", load)
    given = ["--model", str(tiny_checkpoint), "--image", str(photo)]
    assert run_main(monkeypatch, "ask", *given, *arguments, "what?") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_option_that_the_engine_does_not_take_is_one_line(tiny_checkpoint, monkeypatch, capsys, tmp_path):
    from vilavt_core.backends import BackendOptions, open_backend
    from vilavt_core.errors import EngineError

    with pytest.raises(EngineError, match=r"there is no option 'nonsense'; take it out of --engine"):
        open_backend(str(tiny_checkpoint), "hf", BackendOptions(engine={"nonsense": 1}, device="cpu"))


def test_wrong_options_are_exit_code_2(ask, monkeypatch):
    assert ask("what?", "--max-turns", "0").exit_code == 2
    assert ask("what?", "--trace", "/no/such/folder/t.html").exit_code == 2
    assert run_main(monkeypatch, "ask", "what?") == 2


def test_the_demo_asks_every_question_and_says_where_the_trace_is(tiny_checkpoint, photo, tmp_path):
    questions = [{"image": "photo.png", "question": "[bold]which?[/]", "answer": "1"}] * 2
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    (tiny_checkpoint / "vilavt_chat.json").write_text('{"preset": "default", "limits": {"max_new_tokens_per_turn": 4}}')
    out = tmp_path / "out.html"
    try:
        arguments = ["--model", str(tiny_checkpoint), "--data", str(tmp_path / "questions.json"), "--out", str(out)]
        result = runner.invoke(app, ["demo", *arguments, "--device", "cpu"])
    finally:
        (tiny_checkpoint / "vilavt_chat.json").unlink()
    assert result.exit_code == 0, result.output
    assert result.output.count("[bold]which?[/]") == 2  # a question is text, not markup
    assert "0 of 2 right" in result.output
    assert f"trace: {out}" in result.output
    assert out.read_text(encoding="utf-8").count("<article>") == 2


def test_without_the_video_extra_the_demo_asks_about_images_only(tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("vilavt_core.cli.chat.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "av", None)
    (tiny_checkpoint / "vilavt_chat.json").write_text('{"preset": "default", "limits": {"max_new_tokens_per_turn": 2}}')
    try:
        arguments = ["--model", str(tiny_checkpoint), "--out", str(tmp_path / "out.html"), "--device", "cpu"]
        result = runner.invoke(app, ["demo", *arguments])
    finally:
        (tiny_checkpoint / "vilavt_chat.json").unlink()
    assert result.exit_code == 0, result.output
    assert "2 of 8 questions are about a clip" in result.output
    assert "vilavt-hf[video]" in result.output
    assert "of 6 right" in result.output


def test_the_demo_says_what_to_pass_when_nothing_is_shipped(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "a" / "b" / "c" / "d" / "shipped.py"))
    assert run_main(monkeypatch, "demo") == 1
    assert "examples/pictures/questions.json is not here; pass --data" in capsys.readouterr().err


def test_a_broken_question_file_is_named(monkeypatch, capsys, tmp_path):
    path = tmp_path / "q.json"
    path.write_text('[{"question": "?"}]')
    assert run_main(monkeypatch, "demo", "--data", str(path)) == 1
    assert "q.json: not a list of" in capsys.readouterr().err


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert printable_text("a\x1b[2J\x07b\u202ec\n") == "a\ufffd[2J\ufffdb\ufffdc\n"
