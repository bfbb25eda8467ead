"""Which fields of a request are honoured, which are refused, and which are accepted and reported: the rule, as tables.

1. A field that the loop honours is one of the protocol's request (`requests.ChatRequest`, `responses`, `messages`) and
   its parts. What is out of range is an error.
2. A field that would change the answer, and that the loop cannot honour, is refused by name, with what to do instead
   (the tables here). At a value that cannot change the answer it is accepted: null, an empty text, list or object, and
   its neutral values.
3. A field that looks like a misspelling of an honoured one is refused: taken for a hint, it would be lost.
4. Every other field is a hint or a note of the client. It is accepted and listed in the response, in
   ``vilavt.ignored``; at null it is as if it were not there.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vilavt_core.presets import Limits

LIKENESS = 0.85
"""From which on a name counts as a misspelling (`difflib`'s ratio)."""
MOST = 64
"""Fields of one object that are looked at: comparing names takes time."""

_RAW = "leave it out, or run the loop yourself against /v1/raw/chat/completions"
_MESSAGES = "put it into messages"
_FORMAT = "leave it out and ask for the format in the question"
_TOOLS = "leave it out: the loop carries out the model's own zooms and calls no functions"
_THINKS = "leave it out: the model always thinks before it zooms or answers"
_TOKENS = "say max_tokens for a turn, or max_completion_tokens for the whole answer"
_TURN_TOKENS = "or vilavt.max_new_tokens_per_turn for a turn"
_SAMPLES = "send the request several times, with different seeds"
NO_FILES = "this server keeps no files; send the image as a data URL, data:image/png;base64,…"


@dataclass(frozen=True)
class Refusal:
    """A field that would change the answer and cannot be honoured."""

    neutral: tuple[Any, ...] = ()
    """Values that cannot change it, beside null and what is empty."""
    instead: str = _RAW
    """What the client should do."""
    empty: bool = True
    """Whether an empty value means that nothing is asked for."""

    def accepts(self, value: Any) -> bool:
        """Whether the value cannot change the answer."""
        if value is None or (self.empty and _is_empty(value)):
            return True
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.neutral)


def _each(names: str, refusal: Refusal) -> dict[str, Refusal]:
    return dict.fromkeys(names.split(), refusal)


_TEMPLATE = {
    **_each("enable_thinking thinking", Refusal((True,), _THINKS)),
    **_each("add_generation_prompt", Refusal((True,))),
    **_each("continue_final_message add_vision_id tokenize", Refusal((False,))),
}

REQUEST: Mapping[str, Refusal] = {
    # how many answers, and which
    **_each("n best_of num_return_sequences", Refusal((1,), _SAMPLES)),
    **_each("use_beam_search", Refusal((False,), _SAMPLES)),
    **_each("num_beams", Refusal((1,), _SAMPLES)),
    **_each("length_penalty", Refusal((1,))),
    **_each("early_stopping", Refusal((False,))),
    # how tokens are drawn
    **_each("presence_penalty frequency_penalty", Refusal((0,), "say repetition_penalty, or leave it out")),
    **_each("min_p top_a epsilon_cutoff eta_cutoff smoothing_factor dry_multiplier xtc_probability", Refusal((0,))),
    **_each("typical_p tfs_z tfs", Refusal((1,))),
    **_each("mirostat mirostat_mode no_repeat_ngram_size", Refusal((0,))),
    **_each("dynamic_temperature", Refusal((False,))),
    **_each("do_sample", Refusal(instead="say temperature: 0 is greedy")),
    **_each("logit_bias logits_processors bad_words allowed_token_ids vllm_xargs repetition_detection", Refusal()),
    # where it ends
    **_each("stop stop_sequences stop_token_ids", Refusal()),
    **_each("ignore_eos", Refusal((False,))),
    **_each("min_tokens", Refusal((0,))),
    **_each("max_new_tokens max_length num_predict", Refusal(instead=_TOKENS)),
    **_each("thinking_token_budget thinking_budget", Refusal(instead=_TOKENS)),
    **_each("truncate_prompt_tokens", Refusal(instead="send less: nothing is cut off here")),
    # what it looks like
    **_each("response_format", Refusal(({"type": "text"},), _FORMAT)),
    **_each("format structured_outputs grammar json_schema", Refusal(instead=_FORMAT)),
    **_each("guided_json guided_regex guided_choice guided_grammar", Refusal(instead=_FORMAT)),
    **_each("skip_special_tokens detokenize", Refusal((True,))),
    **_each("modalities", Refusal((["text"],), "leave it out: the answer is text")),
    **_each("audio", Refusal(instead="leave it out: the answer is text")),
    # what comes with it
    **_each("logprobs", Refusal((False,))),
    **_each("top_logprobs", Refusal((0,))),
    **_each("prompt_logprobs logprob_token_ids", Refusal()),
    **_each("return_token_ids return_token_offsets return_prompt_text", Refusal((False,))),
    **_each("echo", Refusal((False,))),
    # functions
    **_each("tools functions", Refusal(instead=_TOOLS)),
    **_each("tool_choice function_call", Refusal(("none", "auto"), _TOOLS)),
    **_each("web_search_options", Refusal(instead=_TOOLS, empty=False)),
    # the prompt
    **_each("prompt input inputs", Refusal(instead=_MESSAGES)),
    **_each("system instructions", Refusal(instead=f"{_MESSAGES}, with the role system")),
    **_each(
        "image images image_url video videos video_url audios",
        Refusal(instead='put images into a message, as parts {"type": "image_url", …}'),
    ),
    **_each("documents", Refusal(instead="put their text into the question")),
    **_each("chat_template", Refusal()),
    **_each("chat_template_kwargs", Refusal()),
    **_TEMPLATE,
    **_each("add_special_tokens", Refusal((False,))),
    # images
    **_each(
        "min_pixels",
        Refusal(instead="say min_pixels and max_pixels beside image_url, or vilavt.max_pixels for all"),
    ),
    # the engine
    **_each("lora_request adapter adapter_id", Refusal(instead="name the model in the field model")),
    **_each("cache_salt kv_transfer_params ec_transfer_params", Refusal()),
    **_each("routed_experts_prompt_start", Refusal((0,))),
    # fields that belong elsewhere
    **_each("extra_body extra_headers extra_query", Refusal(instead="put its keys beside the other fields")),
    **_each("options", Refusal(instead="put its keys beside the other fields")),
    **{
        name: Refusal(instead=f'put it into the field vilavt: {{"{name}": …}}')
        for name in (*Limits.per_request(), "state")
    },
}
"""Of a chat completion. What is not here, and is no field of `requests.ChatRequest`, is a hint: ``user``,
``metadata``, ``reasoning_effort``, ``prompt_cache_key``, …"""

_TOKEN_FIELDS = "max_tokens max_completion_tokens max_output_tokens max_new_tokens max_length num_predict"
_THINKING_TOKENS = "thinking_token_budget thinking_budget"
_IMAGE_FIELDS = "image images image_url video videos video_url audios"

RESPONSES_REQUEST: Mapping[str, Refusal] = {
    **REQUEST,
    # what the server would have to keep
    **_each(
        "previous_response_id conversation",
        Refusal(
            instead="send the earlier input and output back in input, and vilavt.state to continue the same tokens"
        ),
    ),
    **_each("store", Refusal((False,), "leave it out: answers are not kept; vilavt.state holds the conversation")),
    **_each("background", Refusal((False,), "leave it out, and keep the connection open")),
    # what comes with it
    **_each("include", Refusal(instead="leave it out: thoughts and zooms come with every answer")),
    # where it ends
    **_each(
        f"{_TOKEN_FIELDS} {_THINKING_TOKENS}",
        Refusal(instead=f"say max_output_tokens for the whole answer, {_TURN_TOKENS}"),
    ),
    **_each("truncation", Refusal(("disabled",), "send less: nothing is cut off here")),
    **_each("context_management", Refusal(instead="send less: nothing is left out here")),
    **_each("max_tool_calls", Refusal(instead="say vilavt.max_turns: a zoom is a turn")),
    # the prompt
    **_each("messages prompt inputs", Refusal(instead="put it into input")),
    **_each("system", Refusal(instead="put it into instructions")),
    **_each(
        _IMAGE_FIELDS,
        Refusal(instead='put images into a message of input, as parts {"type": "input_image", "image_url": …}'),
    ),
    **_each("documents", Refusal(instead="put their text into input")),
}
"""Of a request of the Responses API."""

RESPONSES_TEXT: Mapping[str, Refusal] = _each("format", Refusal(({"type": "text"},), _FORMAT))
"""Of its ``text``."""

MESSAGES_REQUEST: Mapping[str, Refusal] = {
    **REQUEST,
    # where it ends
    **_each(
        f"{_TOKEN_FIELDS} {_THINKING_TOKENS}",
        Refusal(instead=f"say max_tokens: here of the whole answer, {_TURN_TOKENS}"),
    ),
    **_each(
        "thinking",
        Refusal(
            ({"type": "adaptive"},),
            f"{_THINKS}; say max_tokens for thoughts, zooms and answer together, {_TURN_TOKENS}",
        ),
    ),
    **_each("context_management", Refusal(instead="send less: nothing is left out here")),
    # what it looks like
    **_each("output_format", Refusal(instead=_FORMAT)),
    # functions
    **_each("tool_choice", Refusal(({"type": "auto"}, {"type": "none"}), _TOOLS)),
    **_each("mcp_servers container", Refusal(instead=_TOOLS)),
    # the prompt
    **_each("prompt input inputs", Refusal(instead=_MESSAGES)),
    **_each("instructions", Refusal(instead="put it into system")),
    **_each(
        _IMAGE_FIELDS,
        Refusal(instead='put images into a message, as blocks {"type": "image", "source": …}'),
    ),
}
"""Of a request of the Messages API. Hints are ``metadata``, ``service_tier``, ``cache_control``, …"""

OUTPUT_CONFIG: Mapping[str, Refusal] = {
    **_each("format", Refusal(instead=_FORMAT)),
    **_each("task_budget", Refusal(instead="say max_tokens")),
}
"""Of its ``output_config``."""

MESSAGE: Mapping[str, Refusal] = {
    **_each("tool_calls function_call tool_call_id", Refusal(instead=_TOOLS)),
    **_each("audio", Refusal(instead="send its transcript as content")),
    **_each("refusal", Refusal(instead="send it as content")),
    **_each("prefix partial", Refusal((False,), "leave it out: an answer cannot be begun for the model")),
    **_each("image images image_url video videos", Refusal(instead="put images into content, as parts")),
}
"""Of a message."""

_OTHER_PART = Refusal(instead="make it a part of its own")
TEXT_PART: Mapping[str, Refusal] = _each("image image_url video video_url audio_url input_audio file", _OTHER_PART)
"""Of a part of a message that is text."""

IMAGE_PART: Mapping[str, Refusal] = {
    **_each("text video video_url image", _OTHER_PART),
    **_each("file_id", Refusal(instead=NO_FILES)),
    **_each(
        "resized_height resized_width",
        Refusal(instead="send the image at that size, or bound its area with min_pixels and max_pixels"),
    ),
}
"""Of a part that is an image, and of its ``image_url``."""

IMAGE_BLOCK: Mapping[str, Refusal] = {
    **IMAGE_PART,
    **_each("image_url url data", Refusal(instead='put it into source: {"type": "url", "url": …}')),
    **_each("transformations", Refusal(instead="say min_pixels and max_pixels beside source")),
}
"""Of a block of the Messages API that is an image, and of its ``source``."""

_CUT = "cut the video, and send the stretch that is asked about"
VIDEO_PART: Mapping[str, Refusal] = {
    **IMAGE_PART,
    **_each("image_url", _OTHER_PART),
    **_each("video_start video_end start_time end_time", Refusal(instead=_CUT)),
    **_each("min_frames max_frames total_pixels", Refusal(instead="say num_frames or fps, and max_pixels of a frame")),
    **_each("do_sample_frames", Refusal((True,), "send frames that are sampled already as a list")),
    **_each("backend video_backend frame_recovery", Refusal()),
}
"""Of a part that is a video, and of its ``video_url``."""

PROCESSOR_KWARGS: Mapping[str, Refusal] = {
    **{name: refusal for name, refusal in VIDEO_PART.items() if name not in IMAGE_PART},
    **_each(
        "min_pixels max_pixels size",
        Refusal(instead="say min_pixels and max_pixels beside image_url, or vilavt.max_pixels for all"),
    ),
}
"""Of ``mm_processor_kwargs``, and of ``media_io_kwargs.video``."""

MEDIA_KWARGS: Mapping[str, Refusal] = _each("image audio", Refusal())
"""Of ``media_io_kwargs``."""

_SILENT: Mapping[str, tuple[Any, ...]] = {
    "detail": ("auto",),
    "continuous_usage_stats": (False,),
    "annotations": ([],),
    "logprobs": ([],),
}
"""Hints at a value that asks for what happens anyway, or that we sent ourselves: accepted, and not listed."""


def unused(
    place: str, extra: Mapping[str, Any] | None, refused: Mapping[str, Refusal], known: Collection[str]
) -> Iterator[tuple[str, str | None]]:
    """Every further field of an object that is not left out: its place, and why it is refused; None: it is ignored.

    Args:
        place: of the object, e.g. ``messages[0]``; empty: the request itself.
        extra: its fields that are not honoured.
        refused: those that would change the answer.
        known: those that are honoured.
    """
    if len(extra or ()) > MOST:
        yield place, f"{place or 'the request'} has {len(extra or ())} further fields, at most {MOST} are looked at"
        return
    known = tuple(known)
    for name, value in (extra or {}).items():
        where = f"{place}.{short(name)}" if place else short(name)
        if name in refused:
            if not refused[name].accepts(_without_neutral(name, value)):
                shown = short(json.dumps(value, ensure_ascii=False, default=str))
                reason = "is not supported here, where the server runs the model's zoom loop"
                yield where, f"{where}={shown} {reason}; {refused[name].instead}"
        elif value is None or value in _SILENT.get(name, ()):
            continue
        elif (near := _near(name[:100], known)) is not None:
            yield where, f"{where}: there is no such field; did you mean {near}?"
        else:
            yield where, None


def short(text: str) -> str:
    """As it is, or its beginning: a client's words in a message."""
    return text if len(text) <= 60 else text[:57] + "..."


@lru_cache(maxsize=1024)
def _near(name: str, known: tuple[str, ...]) -> str | None:
    written = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # maxTokens is max_tokens
    return next(iter(difflib.get_close_matches(written, known, 1, LIKENESS)), None)


def _is_empty(value: Any) -> bool:
    if isinstance(value, str | list | dict) and not value:
        return True
    return isinstance(value, list) and all(one is None or one == "" for one in value)


def _without_neutral(name: str, value: Any) -> Any:
    """Of the arguments for a chat template, those that would change something."""
    if name != "chat_template_kwargs" or not isinstance(value, dict):
        return value
    return {key: one for key, one in value.items() if key not in _TEMPLATE or not _TEMPLATE[key].accepts(one)}
