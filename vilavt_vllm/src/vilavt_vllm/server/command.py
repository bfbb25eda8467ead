"""``vilavt-serve CHECKPOINT``: vLLM's OpenAI server with the loop inside."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from importlib import metadata

from .. import CHAT_TEMPLATE
from ..errors import UnsupportedError

OURS = {
    "preset": "how episodes run (vilavt_core.presets); default: what the checkpoint asks for",
    "prompts": "prompt set, a name or a folder; default: the checkpoint's own",
    "seed": "of requests that sample and bring none",
    "max_turns": "assistant turns of a question",
    "max_images": "images of a conversation, crops included",
    "max_new_tokens_per_turn": "tokens the model may sample in a turn",
    "max_pixels": "pixels of an image as the encoder sees it",
    "max_image_bytes": "bytes of a picture as sent",
    "max_image_pixels": "pixels of a picture as sent, checked before it is decoded",
    "max_body_bytes": "bytes of a request",
    "max_episodes": "questions answered at the same time; more get 503",
    "max_conversations": "finished questions kept, with their pictures, so that follow-ups continue them",
    "max_conversation_bytes": "bytes of decoded pictures that those may hold",
}
"""Field of `ServerOptions` -> help text."""


def parser() -> argparse.ArgumentParser:
    """Our own flags; the rest is vLLM's."""
    from .endpoint import ServerOptions

    out = argparse.ArgumentParser(
        prog="vilavt-serve",
        description="vLLM's OpenAI server for a ViLaVT, with the zoom loop inside /v1/chat/completions.",
        epilog="All flags of vLLM's server are accepted too (--port, --api-key, --tensor-parallel-size, "
        "--allowed-media-domains, …): vilavt-serve --vllm-help lists them.",
    )
    out.add_argument("model", nargs="?", help="checkpoint folder or hub id")
    out.add_argument("--vllm-help", action="store_true", help="show vLLM's flags and leave")
    kinds = {"preset": str, "prompts": str, "max_pixels": float}
    for field in fields(ServerOptions):
        default = "" if field.default is None else f" (default: {field.default})"
        out.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kinds.get(field.name, int),
            default=field.default,
            metavar="N" if field.name not in ("preset", "prompts") else "NAME",
            help=OURS[field.name] + default,
        )
    return out


def allow_plugins() -> None:
    """Put our plug-ins on vLLM's list, without taking others off it.

    An endpoint plug-in is loaded only if ``VLLM_PLUGINS`` names it; but once that is set, it is the whole list.
    """
    listed = os.environ.get("VLLM_PLUGINS")
    if listed is None:
        entries = (entry for found in metadata.distributions() for entry in found.entry_points)
        names = [e.name for e in entries if e.group.startswith("vllm.") and e.group != "vllm.endpoint_plugins"]
    else:
        names = listed.split(",")
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "vilavt", "vilavt_loop"]))


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    from .. import compat

    try:
        compat.require_server()
    except UnsupportedError as error:
        raise SystemExit(f"vilavt-serve: {error}") from None
    own = parser()
    ours, rest = own.parse_known_args(arguments)
    if ours.model is None and not ours.vllm_help:
        own.error("name a checkpoint: vilavt-serve CHECKPOINT")
    allow_plugins()

    from .endpoint import ServerOptions

    if not any(argument.startswith("--chat-template") and argument[15:16] in ("", "=") for argument in rest):
        rest += ["--chat-template", str(CHAT_TEMPLATE)]  # on the raw route, forged tokens are refused with it only
    options = ServerOptions(**{field.name: getattr(ours, field.name) for field in fields(ServerOptions)})
    compat.serve(["--help"] if ours.vllm_help else ["--model", ours.model, *rest], options)


if __name__ == "__main__":
    main(sys.argv[1:])
