"""Weight updates of verl's vLLM server that end a run when they fail, with the cause.

verl's trainer sends weights in buckets and waits for each to be acknowledged, without a time limit. When vLLM refuses
one, verl's receiver leaves without an acknowledgement, and the run stands still for ever. This extension goes on
receiving and fails afterwards. It is named in a configuration as
``actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls``; our recipes do.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from ..errors import RolloutError


class VilavtWorkerExtension(vLLMColocateWorkerExtension):
    """verl's, except that a bucket that cannot be loaded does not keep the others from being received."""

    _refused: Exception | None = None

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        """Receive and load all weights.

        Raises:
            RolloutError: some could not be loaded; the cause is in the message, because it travels between processes.
        """
        self._refused = None
        super().update_weights_from_ipc(*args, **kwargs)
        if self._refused is not None:
            raise RolloutError(
                f"vLLM refused a weight update: {type(self._refused).__name__}: {self._refused}"
            ) from self._refused

    def _update_weights(self, weights: Any, *args: Any, **kwargs: Any) -> None:
        if self._refused is not None:
            return
        try:
            super()._update_weights(weights, *args, **kwargs)
        except Exception as error:
            self._refused = error
