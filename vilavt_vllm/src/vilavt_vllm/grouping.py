"""Which images of a prompt belong together, read from its token ids.

The images of the turn that follows a zoom request form one group under the request's query; every other image is alone
and has no query. Turns are told apart by the ids of ``<|im_start|>`` and ``<|im_end|>``, never by text, so text that
merely looks like a turn groups nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vilavt_core.protocol import ToolCall, parse_turn

from .errors import PlaceholderError

ASSISTANT = "assistant\n"


@dataclass(frozen=True)
class ChatTokens:
    """Ids that give a prompt its structure."""

    im_start: int
    im_end: int
    image_pad: int


def groups_of_tokens(
    token_ids: Sequence[int], tokens: ChatTokens, decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, int]]:
    """(query, number of images) of every group, in prompt order.

    Args:
        token_ids: a prompt with one placeholder per image.
        tokens: structural ids.
        decode: ids to text.
    """
    starts = [i for i, token in enumerate(token_ids) if token == tokens.im_start]
    bounds = [0, *starts, len(token_ids)]
    groups: list[tuple[str, int]] = []
    query: str | None = None
    for begin, end in pairwise(bounds):
        turn = token_ids[begin:end]
        count = sum(token == tokens.image_pad for token in turn)
        if count:
            groups += [(query, count)] if query is not None else [("", 1)] * count
        if begin < end:
            query = _query(turn, tokens, decode)
    return groups


def _query(turn: Sequence[int], tokens: ChatTokens, decode: Callable[[Sequence[int]], str]) -> str | None:
    """Query of a turn that is a zoom request of the assistant."""
    if turn[0] != tokens.im_start:
        return None
    body = list(turn[1:])
    if tokens.im_end in body:
        body = body[: body.index(tokens.im_end)]
    text = decode(body)
    if not text.startswith(ASSISTANT):
        return None
    action = parse_turn(text.removeprefix(ASSISTANT))
    return action.query if isinstance(action, ToolCall) else None


def one_placeholder_each(token_ids: Sequence[int], image_pad: int, n_images: int) -> tuple[list[int], list[int] | None]:
    """Bring a prompt to one placeholder per image.

    A chat template writes one placeholder per image; an episode's stream holds one per image *token*, in one run per
    image.

    Returns:
        The prompt with one placeholder per image, and the run lengths if it came with one per token.

    Raises:
        PlaceholderError: neither form fits the number of images.
    """
    ids = list(token_ids)
    count = ids.count(image_pad)
    if count == n_images:
        return ids, None
    starts = [i for i, token in enumerate(ids) if token == image_pad and (i == 0 or ids[i - 1] != image_pad)]
    if len(starts) != n_images or count < n_images:
        raise PlaceholderError(
            f"the prompt has {count} <|image_pad|> tokens in {len(starts)} places, {n_images} images came with it; "
            "give one placeholder per image (or one run per image), and no such token in user text"
        )
    lengths, out, previous = [], [], 0
    for start in starts:
        end = start
        while end < len(ids) and ids[end] == image_pad:
            end += 1
        lengths.append(end - start)
        out += [*ids[previous:start], image_pad]
        previous = end
    return out + ids[previous:], lengths
