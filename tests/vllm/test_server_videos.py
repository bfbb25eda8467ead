"""Videos in requests to the server: parts as vLLM's and Qwen's clients send them, through the route, with a model that
always says the same."""

import asyncio
import base64
import functools
import http.server
import io
import json
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from clips import clip, marked, number_of
from fastapi import FastAPI
from PIL import Image
from vllm import __version__ as vllm_version
from vllm.config import ModelConfig

from vilavt_core.backends import BackendOptions
from vilavt_core.client import ServerClient
from vilavt_core.errors import EngineError, ImageError
from vilavt_core.regions import Picture, PixelBounds
from vilavt_core.results import Sample
from vilavt_core.sources import Video
from vilavt_core.video import VideoLimits
from vilavt_core.wire import settings_body
from vilavt_vllm import register, support

if problem := support.server_problem(vllm_version):
    pytest.skip(problem, allow_module_level=True)
pytest.importorskip("av", reason='videos need the extra "video" of vilavt-hf')

from vilavt_vllm.server.endpoint import VilavtEndpoint
from vilavt_vllm.server.options import ServerOptions

CHECKPOINT = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")
TEXT = {"type": "text", "text": "What?"}


@pytest.fixture(scope="module")
def data() -> bytes:
    return clip(marked(20, (84, 56)))


@pytest.fixture(scope="module")
def url(data) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(data).decode()}"


def jpeg(number: int) -> str:
    file = io.BytesIO()
    marked(number + 1, (84, 56))[number].save(file, "jpeg", quality=95)
    return base64.b64encode(file.getvalue()).decode()


class Served:
    """A server whose model answers every question at once, and remembers what it was shown."""

    def __init__(self, options: ServerOptions, **config) -> None:
        register()
        self.app, endpoint = FastAPI(), VilavtEndpoint()
        self.shown: list[Picture] = []
        endpoint.attach_router(self.app)
        names = SimpleNamespace(is_base_model=lambda name: name == "tiny", model_name=lambda: "tiny")
        self.app.state.openai_serving_models = names
        engine = SimpleNamespace(model_config=ModelConfig(model=CHECKPOINT, **config))
        asyncio.run(endpoint.init_state(engine, self.app.state, Namespace(vilavt=options)))
        self.loop = self.app.state.vilavt_loop

        async def events(driver, handling):
            told = [*driver.start(), *driver.take_text("<think>Red.</think><answer>4</answer>")]
            gallery = driver.episode.gallery
            self.shown = [Picture(s, time=v.time) for s, v in zip(gallery.sources, gallery.views, strict=True)]
            for event in told:
                yield event

        self.loop.llm.events = events

    def post(self, body: dict) -> httpx.Response:
        async def send():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.post("/v1/chat/completions", json=body)

        return asyncio.run(send())

    def ask(self, *parts: dict, **fields) -> dict:
        response = self.post({"messages": [{"role": "user", "content": [*parts, TEXT]}], **fields})
        assert response.status_code == 200, response.text
        return response.json()["vilavt"]

    def refuse(self, *parts: dict, **fields) -> str:
        response = self.post({"messages": [{"role": "user", "content": [*parts, TEXT]}], **fields})
        assert response.status_code == 400, response.text
        return response.json()["error"]["message"]

    @property
    def numbers(self) -> list[int]:
        return [number_of(picture.image) for picture in self.shown]


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(ServerOptions())


def part(url: str, **more) -> dict:
    return {"type": "video_url", "video_url": {"url": url}, **more}


@pytest.mark.parametrize(
    "said",
    [
        lambda url: part(url, num_frames=3),
        lambda url: part(url, nframes=3, fps=None),
        lambda url: {"type": "video_url", "video_url": {"url": url, "num_frames": 3}},
        lambda url: {"type": "video_url", "video_url": url, "nframes": 3},
        lambda url: {"type": "video", "video": url, "nframes": 3},
        lambda url: {"video_url": {"url": url}, "num_frames": 3},
        lambda url: {"type": "input_video", "video_url": url, "frames": 3},
    ],
)
def test_every_way_of_naming_a_video_and_its_frames(served, url, said):
    assert served.ask(said(url))["ignored"] == []
    assert served.numbers == [0, 9, 19]
    assert [picture.time for picture in served.shown] == [0, 0.9, 1.9]


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, list(range(20))),
        ({"mm_processor_kwargs": {"fps": 2, "do_sample_frames": True}}, [0, 5, 10, 15]),
        ({"media_io_kwargs": {"video": {"num_frames": 2}}}, [0, 19]),
        ({"mm_processor_kwargs": {"fps": 2}, "media_io_kwargs": {"video": {"fps": 2}}}, [0, 5, 10, 15]),
    ],
)
def test_frames_may_be_said_for_the_whole_request(served, url, fields, taken):
    assert served.ask(part(url), **fields)["ignored"] == []
    assert served.numbers == taken


def test_a_part_wins_over_the_request_and_the_rule_is_kept(served, url):
    served.ask(part(url, num_frames=4), mm_processor_kwargs={"fps": 2, "rule": "centres"})
    assert served.numbers == [2, 7, 12, 17]


def test_pictures_and_videos_keep_their_order_and_bounds_hold_for_every_frame(served, url):
    blue = io.BytesIO()
    Image.new("RGB", (56, 56), "blue").save(blue, "png")
    picture = f"data:image/png;base64,{base64.b64encode(blue.getvalue()).decode()}"
    told = served.ask(
        part(url, num_frames=2, min_pixels=12544, max_pixels=25088),
        {"type": "image_url", "image_url": {"url": picture}},
    )
    sizes = [(image["width"], image["height"]) for image in told["conversation"]["images"]]
    assert [12544 <= width * height <= 25088 for width, height in sizes] == [True, True, False]
    assert [picture.image.size for picture in served.shown] == [(84, 56), (84, 56), (56, 56)]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("fps", "times"), [(None, [None, None]), (2, [0, 0.5])])
def test_a_list_of_frames_has_times_if_its_rate_is_told(served, listed, fps, times):
    frames = [jpeg(3), jpeg(7)]
    if listed:
        sent = {"type": "video", "video": [f"data:image/jpeg;base64,{frame}" for frame in frames]}
    else:
        sent = part(f"data:video/jpeg;base64,{','.join(frames)}")
    served.ask({**sent, "fps": fps})
    assert served.numbers == [3, 7]
    assert [picture.time for picture in served.shown] == times


@pytest.mark.parametrize(
    ("more", "fields", "message"),
    [
        ({"num_frames": 3, "fps": 1}, {}, "content[0]: num_frames is 3 and fps is 1; say one of the two"),
        ({"num_frames": 3, "nframes": 4}, {}, "the number of frames is said twice, as num_frames and nframes"),
        ({"num_frames": 0}, {}, "messages[0].content[0].frames: Input should be greater than or equal to 1"),
        ({"fps": "many"}, {}, "messages[0].content[0].fps: "),
        ({"rule": "random"}, {}, "messages[0].content[0].rule: "),
        ({"video_start": 3.0}, {}, "messages[0].content[0].video_start=3.0 is not supported here"),
        ({"max_frames": 3}, {}, "messages[0].content[0].max_frames=3 is not supported here"),
        ({"total_pixels": 3000}, {}, "say num_frames or fps, and max_pixels of a frame"),
        ({"do_sample_frames": False}, {}, "do_sample_frames=false is not supported here"),
        ({"num_framez": 3}, {}, "messages[0].content[0].num_framez: there is no such field; did you mean num_frames?"),
        ({"text": "x"}, {}, 'messages[0].content[0].text="x" is not supported here'),
        ({"max_pixels": 1e9}, {}, "messages[0].content[0].max_pixels is 1000000000, this request allows"),
        ({"video": ["x"]}, {}, "it needs a file, "),
        ({}, {"mm_processor_kwargs": {"crop_size": 3}}, "mm_processor_kwargs.crop_size=3 is not supported here"),
        ({}, {"media_io_kwargs": {"image": {"mode": "L"}}}, "media_io_kwargs.image="),
        ({}, {"media_io_kwargs": {"video": {"backend": "x"}}}, "media_io_kwargs.video.backend="),
        ({}, {"mm_processor_kwargs": {"fps": 1}, "media_io_kwargs": {"video": {"fps": 2}}}, "say different frames"),
    ],
)
def test_what_is_said_of_a_video_is_heeded_or_refused_by_name(served, url, more, fields, message):
    assert message in served.refuse(part(url, **more), **fields).replace("Value error, ", "")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"type": "video_url"}, "messages[0].content[0]: it needs a file"),
        ({"type": "video", "video": []}, "messages[0].content[0].video"),
        ({"type": "video", "video": ["data:image/png;base64,AAAA"]}, "not an image"),
        ({"type": "video", "video": ["x"], "num_frames": 3}, "it comes as 1 frames, of which all are taken"),
        (part("data:video/mp4;base64,AAAA"), "the video: not a video that can be read"),
        (part("data:video/mp4;base64,!!!"), "a data URL is not valid base64"),
        (part("clip.mp4"), "'clip.mp4' is no URL; send the video as a data URL, data:video/mp4;base64,…"),
    ],
)
def test_what_is_no_video_is_refused(served, sent, message):
    assert message in served.refuse(sent)


def test_frames_of_a_request_without_videos_are_listed_as_ignored(served):
    assert served.ask(mm_processor_kwargs={"fps": 2})["ignored"] == ["mm_processor_kwargs"]


def test_caps_name_the_flags_that_raise_them(url):
    small = Served(ServerOptions(max_video_bytes=1000, limits={"max_images": 6}))
    assert "at most 1000 are allowed; raise it with --max-video-bytes" in small.refuse(part(url))
    few = Served(ServerOptions(max_video_pixels=3 * 84 * 56, limits={"max_images": 6}))
    assert "20 frames would be taken, at most 6 are allowed" in (message := few.refuse(part(url)))
    assert "or raise --max-images" in message
    assert "4 frames of 84 x 56 px have 18816 pixels, at most 14112" in few.refuse(part(url, num_frames=4))
    assert "--max-video-pixels" in few.refuse(part(url, num_frames=2), part(url, num_frames=2))
    assert few.ask(part(url, num_frames=3))["images"] == 3
    six = {"type": "video", "video": [f"data:image/jpeg;base64,{jpeg(1)}"] * 6}
    assert "the request has 7 images, at most 6 are allowed" in few.refuse(six, part(url, num_frames=2))


@pytest.fixture
def site(tmp_path, data):
    """A web server with the clip."""
    (tmp_path / "clip.mp4").write_bytes(data)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/clip.mp4", (tmp_path / "clip.mp4").as_uri()
        server.shutdown()


def test_addresses_and_files_are_fetched_as_the_flags_allow(site, served, tmp_path):
    web, file = site
    for url, flag in ((web, "--allowed-media-domains"), (file, "--allowed-local-media-path")):
        refused = served.refuse(part(url))
        assert "send the video as a data URL" in refused
        assert flag in refused
    allowed = Served(ServerOptions(), allowed_media_domains=["127.0.0.1"], allowed_local_media_path=str(tmp_path))
    for url in (web, file):
        allowed.ask(part(url, num_frames=2))
        assert allowed.numbers == [0, 19]
    elsewhere = Served(ServerOptions(), allowed_media_domains=["example.org"])
    assert "must be from one of the allowed domains" in elsewhere.refuse(part(web))


def test_a_follow_up_is_about_the_same_frames(served, url):
    first = [{"role": "user", "content": [part(url, num_frames=2), TEXT]}]
    again = [*first, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And now?"}]
    served.post({"messages": first})
    served.post({"messages": again})
    assert served.numbers == [0, 19]
    other = [{"role": "user", "content": [part(url, num_frames=3), TEXT]}, *again[1:]]
    served.post({"messages": other})  # not the conversation that is remembered
    assert served.numbers == [0, 9, 19]


# ---------------------------------------------------------------------- our client


@pytest.fixture
def client(served, monkeypatch):
    """`ServerClient` over the route."""
    import openai

    class Transport(httpx.BaseTransport):
        def handle_request(self, request):
            if request.url.path.endswith("/vilavt"):
                provenance = served.loop.llm.settings.provenance(0)
                return httpx.Response(200, json=settings_body("tiny", provenance))
            answer = served.post(json.loads(request.content))
            return httpx.Response(answer.status_code, json=answer.json())

    real = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda **k: real(**k, http_client=httpx.Client(transport=Transport())))
    return ServerClient("http://server/v1", BackendOptions(video_limits=VideoLimits(max_bytes=1_000_000)))


@pytest.mark.parametrize("form", ["path", "bytes", "file"])
def test_the_client_sends_the_file_and_which_frames(client, served, data, tmp_path, form):
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    source = {"path": path, "bytes": data, "file": io.BytesIO(data)}[form]
    result = client.ask(Video(source, frames=4, rule="centres"), "What?")
    assert result.answer == "4"
    assert served.numbers == [2, 7, 12, 17]
    assert [image.time for image in result.images] == [p.time for p in served.shown]
    client.ask([Video(source, fps=2)], "What?")
    assert served.numbers == [0, 5, 10, 15]
    client.ask(Video(source), "What?")
    assert served.numbers == list(range(20))


def test_the_client_sends_bounds_and_addresses_as_they_are(client):
    sample = Sample([Video("https://example.org/a.mp4", fps=1)], "?", bounds=[PixelBounds(max_pixels=25088)])
    (sent, _) = client.message(sample)["content"]
    assert sent == {
        "type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}, "fps": 1, "max_pixels": 25088,
    }  # fmt: skip


def test_what_the_client_cannot_send_is_named(client, tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.mp4: the video cannot be read"):
        client.ask(Video(tmp_path / "nowhere.mp4"), "?")
    client.options = replace(client.options, video_limits=VideoLimits(max_bytes=10))
    with pytest.raises(ImageError, match="11 bytes, at most 10 are allowed"):
        client.ask(Video(b"x" * 11), "?")
    with pytest.raises(EngineError, match="a frame with its time cannot be sent to a server; send the Video"):
        client.message(Sample([Picture(Image.new("RGB", (56, 56)), "f", 1.0)], "?"))
