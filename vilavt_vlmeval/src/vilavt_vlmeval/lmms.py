"""The model class that lmms-eval drives: ``--model vilavt --model_args model_path=CHECKPOINT,backend=vllm``.

lmms-eval finds it through its own plug-in seam, the entry point group ``lmms_eval.models``. It hands over all questions
of a task at once, so `vllm` and a server answer many side by side.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms

from .adapter import Adapter
from .errors import MessageError
from .messages import BenchmarkQuestion, question_of
from .settings import AdapterSettings


class ViLaVT(lmms):
    """A ViLaVT in lmms-eval.

    The task's generation settings are not used: tokens, temperature and stopping are the preset's.

    Args:
        name: of the model, for the traces.
        batch_size: accepted and not used; the backend says how many conversations run side by side.
        max_batch_size: accepted and not used.
        device: lmms-eval's ``--device``.
        settings: see `AdapterSettings`; what is not given comes from the environment.

    Raises:
        SettingsError: unknown setting, unusable value, no checkpoint named.
        VilavtError: the checkpoint cannot be loaded, or the server does not answer.
    """

    is_simple = False

    def __init__(
        self,
        name: str = "",
        batch_size: int | str | None = None,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        given = settings if device is None else {"device": device, **settings}
        self.adapter = Adapter(AdapterSettings.resolve(given), name)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The bare answer to every request; ``""`` where there is none."""
        found: list[str] = []
        for task, several in groupby(requests, key=lambda request: request.args[4]):
            found += self.adapter.answers(map(self._question, several), task)
        return found

    def _question(self, request: Any) -> BenchmarkQuestion | None:
        _, to_messages, _, number, task, split = request.args
        messages = to_messages(self.task_dict[task][split][number])
        items = [_item(message["role"], part) for message in messages for part in message["content"]]
        identity = BenchmarkQuestion(
            "\n".join(str(item["value"]) for item in items if item["type"] == "text"), (), str(number)
        )
        try:
            question = question_of(items, self.adapter.settings.video)
        except MessageError as error:
            self.adapter.fail(identity, task, error)
            return None
        return BenchmarkQuestion(question.text, question.images, identity.id)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not supported: an answer comes out of a conversation, not out of one continuation."""
        raise NotImplementedError("ViLaVT answers in conversations; use the generate_until variant of the task")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported: the rounds are the model's own."""
        raise NotImplementedError("the rounds of a ViLaVT conversation are its own; use a generate_until task")


def _item(role: str, part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message in the form that `question_of` takes; what an assistant said is refused there."""
    kind = part["type"]
    more = {key: value for key, value in part.items() if key not in ("type", "text", "url")} if kind == "video" else {}
    return {
        "type": kind if role != "assistant" else "few-shot example",
        "value": part["text" if kind == "text" else "url"],
        **more,
    }
