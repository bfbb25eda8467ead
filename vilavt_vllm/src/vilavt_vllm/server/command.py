"""``vilavt-serve CHECKPOINT``: vLLM's OpenAI server with the loop inside."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata

from .. import CHAT_TEMPLATE
from ..errors import UnsupportedError


def parser() -> argparse.ArgumentParser:
    """Our own flags; the rest is vLLM's."""
    from .options import flags

    out = argparse.ArgumentParser(
        prog="vilavt-serve",
        description="vLLM's OpenAI server for a ViLaVT, with the zoom loop inside /v1/chat/completions.",
        epilog="All flags of vLLM's server are accepted too (--port, --api-key, --tensor-parallel-size, "
        "--allowed-media-domains, …): vilavt-serve --vllm-help lists them.",
    )
    out.add_argument("model", nargs="?", help="checkpoint folder or hub id")
    out.add_argument("--vllm-help", action="store_true", help="show vLLM's flags and leave")
    for flag in flags():
        out.add_argument(
            flag.option,
            type=flag.kind,
            default=flag.default,
            metavar="NAME" if flag.kind is str else "N",
            help=flag.help + ("" if flag.default is None else f" (default: {flag.default})"),
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

    from .options import options_of

    if not any(argument.startswith("--chat-template") and argument[15:16] in ("", "=") for argument in rest):
        rest += ["--chat-template", str(CHAT_TEMPLATE)]  # on the raw route, forged tokens are refused with it only
    compat.serve(["--help"] if ours.vllm_help else ["--model", ours.model, *rest], options_of(vars(ours)))


if __name__ == "__main__":
    main(sys.argv[1:])
