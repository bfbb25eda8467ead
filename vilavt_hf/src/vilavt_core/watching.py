"""The attention of a conversation's zooms, measured after it: only who asks for it pays for it.

`with_attention` adds to a result the maps of each of its zooms (`ChatResult.attention`), which JSON carries and
`vilavt_core.trace.write_html` shows over the crops. A local model measures them (`vilavt_hf.VilavtChat.attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from .attention import AttentionPicture
from .conversation import Inquiry
from .errors import AttentionError
from .results import ChatResult


class Watched(Protocol):
    """A backend whose vision encoder can be watched."""

    @property
    def query_aware_blocks(self) -> Sequence[int]:
        """Blocks that see the query, in order; without one there is nothing to watch."""
        ...

    def attention(self, inquiry: Inquiry) -> AttentionPicture:
        """Encode the images of an inquiry once more, and say where their patches look.

        Raises:
            AttentionError: no block is query-aware.
        """
        ...


def require_watched(backend: Any) -> Watched:
    """The backend, if its attention can be measured; asked before a conversation, so that none is run in vain.

    Raises:
        AttentionError: it gives no attention, or has no query-aware block.
    """
    if not hasattr(backend, "attention"):
        raise AttentionError(
            "a server gives no attention; load the checkpoint here: --model CKPT instead of a URL, or VilavtChat"
        )
    if not backend.query_aware_blocks:
        raise AttentionError("no vision block of this checkpoint is query-aware: no query changes what it looks at")
    watched: Watched = backend
    return watched


def zooms(result: ChatResult) -> list[Inquiry]:
    """What the encoder saw in the zooms of a question, in order; nothing of a result without its record."""
    shown = {index for turn in result.turns for index in turn.image_indices}
    inquiries = () if result.record is None else result.record.inquiries
    return [one for one in inquiries if shown.issuperset(one.image_indices)]


def with_attention(backend: Any, result: ChatResult) -> ChatResult:
    """A result with the attention of its zooms. Costs one more encode of each zoom; what has it already, costs nothing.

    Args:
        backend: that gave the result. Of an ablation, whose encoder saw something else than the conversation says, this
            shows what the conversation says.
        result: with its record.

    Raises:
        AttentionError: the backend gives no attention, or the result came without its record.
    """
    if result.attention:
        return result
    watched = require_watched(backend)
    if result.record is None:
        raise AttentionError("the result was read from a file or told by a server: its images are not here; ask again")
    return replace(result, attention=tuple(watched.attention(inquiry) for inquiry in zooms(result)))
