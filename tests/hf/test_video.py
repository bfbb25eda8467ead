"""Videos given to the local model: by the command, by `ask`, in conversations."""

import json

import pytest
from clips import clip, marked
from PIL import Image
from typer.testing import CliRunner

import vilavt_hf
from vilavt_core.cli import app
from vilavt_core.errors import ImageError
from vilavt_core.results import Sample
from vilavt_core.shipped import shipped
from vilavt_core.sources import Video
from vilavt_core.video import VideoLimits
from vilavt_hf.chat import VilavtChat

pytest.importorskip("av", reason='videos need the extra "video"')

runner = CliRunner()
QUESTION = "What is the sum of the digits on the blue and red cards?"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A scene that the tiny model can read, ten times, without loss."""
    picture = Image.open(shipped("pictures/scene-3.png", "")).convert("RGB")
    path = tmp_path_factory.mktemp("clips") / "scene.mp4"
    path.write_bytes(clip([picture] * 10, codec="libx264rgb", pix_fmt="rgb24"))
    return path


@pytest.fixture
def short(tmp_path):
    path = tmp_path / "short.mp4"
    path.write_bytes(clip(marked(6, (56, 56))))
    return path


def ask(*arguments: str):
    model = str(shipped("vilavt-tiny", ""))
    return runner.invoke(app, ["ask", "--model", model, "--device", "cpu", *arguments, QUESTION])


def test_the_tiny_model_answers_through_a_video(scene):
    result = ask("--video", str(scene), "--frames", "2", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["answer"] == "5"
    frames = [image for image in told["images"] if image["kind"] == "original"]
    assert [(image["name"], image["time"]) for image in frames] == [("scene.mp4", 0.0), ("scene.mp4", 0.9)]
    assert any(image["kind"] == "crop" for image in told["images"])


@pytest.mark.parametrize("picture_first", [True, False])
def test_pictures_and_videos_keep_the_order_of_their_options(short, tmp_path, picture_first):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (56, 56)).save(photo)
    options = [["--image", str(photo)], ["--video", str(short), "--fps", "5"]]
    arguments = [word for option in (options if picture_first else options[::-1]) for word in option]
    images = json.loads(ask(*arguments, "--json").stdout)["images"]
    names = [image["name"] for image in images if image["kind"] == "original"]
    clips = ["short.mp4"] * 3
    assert names == (["photo.png", *clips] if picture_first else [*clips, "photo.png"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "a.png", "--frames", "3"], "--frames 3 says which frames of a video are taken; pass --video"),
        (["--image", "a.png", "--fps", "2"], "--fps 2 says which frames of a video are taken; pass --video"),
        ([], "there is nothing to look at; pass --image or --video"),
    ],
)
def test_wrong_options_say_what_to_pass(arguments, message):
    result = ask(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "3", "--fps", "2"], "frames=3 and fps=2.0; give one of the two"),
        (["--fps", "0"], "fps=0.0 must be above 0"),
    ],
)
def test_frames_and_rate_contradict_one_another(short, arguments, message):
    result = ask("--video", str(short), *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, ImageError)
    assert message in str(result.exception)


def test_a_file_that_is_no_video_is_named(tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video at all")
    result = ask("--video", str(path))
    assert result.exit_code == 1
    assert f"{path}: not a video that can be read" in str(result.exception)


def test_every_way_of_asking_takes_a_video(tiny_checkpoint, short):
    chat = VilavtChat.from_pretrained(tiny_checkpoint, device="cpu", video_limits=VideoLimits(max_frames=8))
    limits = chat.settings.limits.__class__(max_turns=1, max_new_tokens_per_turn=2)
    video = vilavt_hf.Video(short, frames=3)

    def originals(result):
        assert result.error is None, result.error
        return [image.time for image in result.images if image.kind == "original"]

    assert originals(chat.ask(video, "?", limits=limits)) == [0, 0.2, 0.5]
    *_, last = chat.stream([video], "?", limits=limits)
    assert originals(last.result) == [0, 0.2, 0.5]
    both = chat.ask_many([Sample(video, "?", limits=limits), ([Image.new("RGB", (56, 56)), video], "?")])
    assert [originals(result) for result in both] == [[0, 0.2, 0.5], [None, 0, 0.2, 0.5]]
    with chat.conversation(Video(short, frames=1), limits=limits) as talk:
        assert originals(talk.ask("?")) == [0]
        assert originals(talk.ask("And there?", images=Video(short, fps=2))) == [0, 0, 0.5]


def test_a_cap_of_the_chat_ends_that_question_alone(tiny_checkpoint, short):
    chat = VilavtChat.from_pretrained(tiny_checkpoint, device="cpu", video_limits=VideoLimits(max_frames=2))
    with pytest.raises(ImageError, match=r"short\.mp4: 3 frames would be taken, at most 2 are allowed"):
        chat.ask(Video(short, frames=3), "?")


def test_the_processor_names_the_remedy(processor, short):
    with pytest.raises(ImageError, match="image 0: a Video is taken where a question is asked, not here"):
        processor(images=[[Video(short)]], text=["<|vision_start|><|image_pad|><|vision_end|>"])
