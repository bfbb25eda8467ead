"""The model class that VLMEvalKit drives: one message in, the bare answer out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmeval.vlm.base import BaseModel

from vilavt_core.sources import FRAMES, Video

from .adapter import NO_BENCHMARK, Adapter
from .errors import MessageError, SettingsError
from .messages import CUSTOM_PROMPTS, INDEX, BenchmarkQuestion, question_of
from .settings import AdapterSettings


class ViLaVT(BaseModel):
    """A ViLaVT in VLMEvalKit.

    Args:
        name: of the model, for the traces.
        verbose: VLMEvalKit's flag; the toolkit prints the answers itself.
        settings: see `AdapterSettings`; what is not given comes from the environment.

    Raises:
        SettingsError: unknown setting, unusable value, no checkpoint named.
        VilavtError: the checkpoint cannot be loaded, or the server does not answer.
    """

    INTERLEAVE = True
    VIDEO_LLM = False
    """A benchmark hands over its frames as images, unless the setting `video_files` says otherwise: the model names
    them, and zooms into them."""

    def __init__(self, name: str = "", verbose: bool = False, **settings: Any) -> None:
        super().__init__()
        self.verbose = verbose
        self.adapter = Adapter(AdapterSettings.resolve(settings), name)
        # The toolkit's word for "answers several questions at once, from threads": --api-nproc says how many.
        self.is_api = self.adapter.settings.backend_name == "server" and not _distributed()
        if self.adapter.settings.video_files and self.is_api:
            raise SettingsError(
                "'video_files' cannot be had with a server: VLMEvalKit tells a model that it asks from threads nothing "
                "of a benchmark's frames; leave it out"
            )
        self.VIDEO_LLM = self.adapter.settings.video_files
        self._frames, self._fps = self.adapter.settings.frames or FRAMES, self.adapter.settings.fps or 1.0
        self._by_rate = self.adapter.settings.fps is not None

    @property
    def nframe(self) -> int:
        """Frames of a video; the toolkit sets it to a benchmark's, and to None for one that counts by `fps`."""
        return self._frames

    @nframe.setter
    def nframe(self, value: int | None) -> None:
        self._frames, self._by_rate = value or self._frames, not value

    @property
    def fps(self) -> float:
        """Frames per second of a video; likewise."""
        return self._fps

    @fps.setter
    def fps(self, value: float | None) -> None:
        self._fps, self._by_rate = value or self._fps, bool(value)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Only for benchmarks of an allow-list: the others' own prompts hold options, units and interleaved images."""
        return self.adapter.settings.custom_prompts and dataset in CUSTOM_PROMPTS

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, Any]]:
        """The message of one row, for benchmarks of the allow-list."""
        paths = self.dump_image(line, dataset)
        images = [{"type": "image", "value": path} for path in ([paths] if isinstance(paths, str) else paths)]
        return [*images, {"type": "text", "value": CUSTOM_PROMPTS[dataset](line), INDEX: str(line["index"])}]

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message; ``""`` if there is none."""
        try:
            frames = Video("", None, self._fps) if self._by_rate else Video("", self._frames)
            question = question_of(message, frames)
        except MessageError as error:
            text = "\n".join(str(item["value"]) for item in message if item["type"] == "text")
            self.adapter.fail(BenchmarkQuestion(text), dataset or NO_BENCHMARK, error)
            return ""
        return self.adapter.answer(question, dataset)


def _distributed() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
