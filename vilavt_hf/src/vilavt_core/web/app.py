"""The page: components of Gradio, wired to the visitors' desks. Gradio is imported when the page is built."""

# Without postponed annotations: Gradio reads those of the functions it calls, whose `gr` is no global.
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import Backend, BackendOptions, names_server
from ..dialogue import Wishes, note_of
from ..errors import EngineError, VilavtError
from ..presets import PRESETS, Preset
from ..results import Provenance
from ..shipped import shipped
from ..sources import VIDEO_SUFFIXES, ImageSource, Video
from ..video import VideoLimits
from . import exhibits
from .desk import Desk, Desks

if TYPE_CHECKING:
    from gradio import Blocks
    from starlette.requests import Request
    from starlette.responses import Response

CSS = Path(__file__).with_name("app.css")
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
"""Of the machine: the page loads nothing from elsewhere."""
MOST_TURNS = 12
FRAMES = 32


@dataclass(frozen=True)
class Access:
    """Where the page is served, and to whom."""

    host: str = "127.0.0.1"
    port: int = 7860
    users: tuple[tuple[str, str], ...] = ()
    """Names and passwords; none: whoever reaches the address."""


def serve_page(model: str, backend: Backend, access: Access, *, examples: bool = True) -> "Blocks":
    """Start the app; it runs in threads of its own until its `close`.

    Args:
        model: as it was named to `vilavt_core.backends.open_backend`.
        backend: what came of that.
        access: where and to whom.
        examples: whether the shipped scenes are offered.

    Raises:
        EngineError: the address is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported: nothing is sent anywhere
    import gradio as gr
    from starlette.routing import Route

    desks = Desks(backend)
    page = build_page(model, desks, examples=examples)
    try:
        page.launch(
            server_name=access.host,
            server_port=access.port,
            auth=list(access.users) or None,
            share=False,
            quiet=True,
            ssr_mode=False,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size=VideoLimits().max_bytes,
            css_paths=[CSS],
            theme=gr.themes.Default(font=list(FONTS[0]), font_mono=list(FONTS[1])),
            app_kwargs={"routes": [Route("/vilavt/trace/{name}", _trace_of(desks))]},
        )
    except OSError as error:
        raise EngineError(
            f"{access.host}:{access.port} cannot be served: {error}; choose another port with --port"
        ) from None
    return page


def build_page(model: str, desks: Desks, *, examples: bool = True) -> "Blocks":
    """The page, not yet served."""
    import gradio as gr

    backend = desks.backend
    told = backend.provenance(0)
    settings = _Settings(model, told)
    with gr.Blocks(title="ViLaVT", analytics_enabled=False, fill_width=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# ViLaVT\nAsk about images, and see where the model looks. Model: `{_name(model, told)}`")
        if note := note_of(model, backend):
            gr.Markdown(note, elem_id="note")
        thread = gr.HTML(elem_id="thread")
        now = gr.HTML(elem_id="now")
        links = gr.HTML(elem_id="links")
        box = gr.MultimodalTextbox(
            label="Question",
            placeholder="Drop or paste images or a video, and ask …",
            file_count="multiple",
            file_types=["image", *VIDEO_SUFFIXES],
            autofocus=True,
            elem_id="question",
        )
        with gr.Row():
            stop = gr.Button("Stop", interactive=False, variant="stop", elem_id="stop")
            look = gr.Button("Attention", interactive=False, elem_id="attention")
            new = gr.Button("New conversation", elem_id="new")
        if examples and (scenes := _scenes()):
            gr.Examples(scenes, inputs=[box], label="Example scenes", elem_id="scenes")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            wishes = settings.components()

        def put(request: gr.Request, value: dict[str, Any], frames: float, *wanted: Any) -> Any:
            desk = desks.of(str(request.session_hash))
            try:
                wish = settings.wishes(*wanted)
                sources = _sources(value.get("files") or [], int(frames or FRAMES))
            except VilavtError as error:
                desk.refuse(str(error))
                taken = False
            else:
                taken = desk.put(value.get("text") or "", sources, wish)
            shown = gr.update(value=None if taken else {"text": value.get("text") or "", "files": []})
            waits = exhibits.thread([exhibits.remark("waits for its turn …")]) if taken else ""
            return shown, desk.thread, waits, gr.update(interactive=taken)

        def answer(request: gr.Request) -> Iterator[Any]:
            desk = desks.of(str(request.session_hash))
            shown = -1
            for _ in desk.answer():
                grown = len(desk.shown) != shown
                shown = len(desk.shown)
                yield desk.thread if grown else gr.skip(), desk.now, gr.skip(), gr.skip(), gr.skip()
            yield desk.thread, "", desk.links, gr.update(interactive=False), gr.update(interactive=desk.watchable)

        def watch(request: gr.Request) -> Any:
            desk = desks.of(str(request.session_hash))
            desk.watch()
            return desk.thread, gr.update(interactive=desk.watchable)

        def end(request: gr.Request) -> None:
            desks.of(str(request.session_hash)).dialogue.stop()

        def leave(request: gr.Request) -> None:
            desks.leave(str(request.session_hash))

        def begin(request: gr.Request) -> Any:
            leave(request)
            return "", "", "", gr.update(interactive=False), gr.update(interactive=False)

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        side_by_side = backend.concurrency if names_server(model) else 1  # a local engine is no thread's but one's
        engine: dict[str, Any] = {"concurrency_limit": side_by_side, "concurrency_id": "engine"}
        box.submit(put, [box, *wishes], [box, thread, now, stop], queue=False, **quiet).then(
            answer, None, [thread, now, links, stop, look], trigger_mode="multiple", **engine, **quiet
        )
        look.click(watch, None, [thread, look], **engine, **quiet)
        stop.click(end, queue=False, **quiet)
        new.click(begin, None, [thread, now, links, stop, look], queue=False, **quiet)
        settings.follow_preset(backend, quiet)
        page.unload(leave)
    return page.queue(api_open=False)


class _Settings:
    """The fields below "Settings", and what they ask for.

    Args:
        model: as it was named.
        told: what the backend does by itself.
    """

    def __init__(self, model: str, told: Provenance) -> None:
        self.model, self.told, self.server = model, told, names_server(model)

    def components(self) -> list[Any]:
        """Frames of a video, then the arguments of `wishes`."""
        import gradio as gr

        limits, sampling = self.told.limits, self.told.sampling
        most = limits.max_turns if self.server else max(MOST_TURNS, limits.max_turns)
        names = [self.told.preset] if self.server else list(PRESETS)
        with gr.Row():
            self.preset = gr.Dropdown(names, value=self.told.preset, label="Preset", interactive=not self.server)
            self.turns = gr.Slider(1, most, value=limits.max_turns, step=1, label="Turns at most")
            self.temperature = gr.Slider(0, 2, value=sampling.temperature, step=0.05, label="Temperature (0: greedy)")
        with gr.Row():
            self.pixels = gr.Number(limits.max_pixels, label="Pixels of an image, at most", minimum=limits.min_pixels)
            self.seed = gr.Number(None, label="Seed", precision=0, info="empty: a fresh one")
            frames = gr.Number(FRAMES, label="Frames of a video", precision=0, minimum=1)
        return [frames, self.preset, self.turns, self.temperature, self.pixels, self.seed]

    def wishes(self, preset: str, turns: float, temperature: float, pixels: float, seed: float | None) -> Wishes:
        """What differs from what the backend does by itself, under this preset.

        Raises:
            VilavtError: a value cannot be one.
        """
        chosen = self._preset(preset)
        told = self.told if chosen is None else self._under(chosen)
        limits = {"max_turns": int(turns), "max_pixels": pixels}
        return Wishes(
            chosen,
            {
                name: value
                for name, value in limits.items()
                if value is not None and value != getattr(told.limits, name)
            },
            {} if temperature == told.sampling.temperature else {"temperature": temperature},
            None if seed is None else int(seed),
        )

    def follow_preset(self, backend: Backend, event: dict[str, Any]) -> None:
        """Show the limits and the temperature of a preset as soon as it is chosen."""
        self.backend = backend

        def show(name: str) -> Any:
            chosen = self._preset(name)
            told = self.told if chosen is None else self._under(chosen)
            return told.limits.max_turns, told.sampling.temperature, told.limits.max_pixels

        self.preset.input(show, [self.preset], [self.turns, self.temperature, self.pixels], queue=False, **event)

    def _preset(self, name: str) -> Preset | None:
        return None if name == self.told.preset else BackendOptions(preset=name).preset_for(self.model)

    def _under(self, preset: Preset) -> Provenance:
        return self.backend.varied(preset=preset).provenance(0)


# ---------------------------------------------------------------------- parts


def _name(model: str, told: Provenance) -> str:
    """What people call the model: no folders of this machine."""
    return str(told.checkpoint or model) if names_server(model) else Path(model).name


def _sources(paths: Sequence[str], frames: int) -> list[ImageSource]:
    """Files that Gradio has received, under their own names.

    Raises:
        EngineError: one cannot be read.
    """
    sources: list[ImageSource] = []
    for path in map(Path, paths):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            sources.append(Video(path, frames, name=path.name))
            continue
        try:
            sources.append({"bytes": path.read_bytes(), "path": path.name})
        except OSError as error:
            raise EngineError(f"{path.name}: cannot be read: {error.strerror}; drop it again") from None
    return sources


def _scenes() -> list[list[dict[str, Any]]]:
    """Shipped images with a question each, as values of the question's field; none where they are not installed."""
    try:
        file = shipped("pictures/questions.json")
    except VilavtError:
        return []
    asked = json.loads(file.read_text(encoding="utf-8"))
    return [[{"text": one["question"], "files": [str(file.parent / one["image"])]}] for one in asked]


def _trace_of(desks: Desks) -> Any:
    """The route of traces. In a sandbox: whatever a page says, it cannot reach the app's origin."""

    from starlette.responses import PlainTextResponse, Response

    def trace(request: "Request") -> "Response":
        token, _, kind = str(request.path_params["name"]).rpartition(".")
        desk: Desk | None = desks.by_token(token)
        if desk is None or kind not in ("html", "json") or not desk.dialogue.results:
            return PlainTextResponse("There is no such trace, or its page was closed.", 404)
        headers = {
            "Content-Security-Policy": "sandbox allow-scripts",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
        }
        media = "text/html" if kind == "html" else "application/json"
        return Response(desk.trace(kind), media_type=media, headers=headers)

    return trace
