"""``vilavt-serve CHECKPOINT``: vLLM's OpenAI server with the loop inside."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from typing import TYPE_CHECKING

from vilavt_core.ending import ending
from vilavt_core.presets import get_preset
from vilavt_core.versions import version_of

from .. import CHAT_TEMPLATE
from ..checkpoints import require_servable

if TYPE_CHECKING:
    from .options import ServerOptions


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
    out.add_argument("--version", action="version", version=f"vilavt-serve {version_of('vilavt-vllm')}")
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


def engine_arguments(rest: list[str]) -> dict[str, str]:
    """Of vLLM's flags those that say what the checkpoint is, by the names of vLLM's engine arguments."""
    out = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--hf-overrides", "--hf_overrides", "--load-format", "--load_format", "--revision"):
        out.add_argument(name, nargs="?")
    return {name: value for name, value in vars(out.parse_known_args(rest)[0]).items() if value is not None}


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
    with ending("vilavt-serve"):
        _serve(arguments)


def _serve(arguments: list[str] | None) -> None:
    own = parser()
    ours, rest = own.parse_known_args(arguments)
    if ours.model is None and not ours.vllm_help:
        own.error("name a checkpoint: vilavt-serve CHECKPOINT")
    given, options = ready(ours, rest)

    from .. import compat
    from .options import VLLM_DEFAULTS

    compat.serve(["--help"] if ours.vllm_help else given, options, VLLM_DEFAULTS)


def ready(ours: argparse.Namespace, rest: list[str]) -> tuple[list[str], ServerOptions]:
    """Prepare this process for vLLM's server, once all that can be seen to be wrong before it starts was looked for.

    Args:
        ours: flags that `parser` has read.
        rest: vLLM's.

    Returns:
        vLLM's command line, and our options.

    Raises:
        VilavtError: the checkpoint, the preset or this vLLM cannot be served.
    """
    from .options import options_of

    options = options_of(vars(ours))
    if options.preset is not None:
        get_preset(options.preset)
    if not ours.vllm_help:
        require_servable(ours.model, engine_arguments(rest))

    from .. import compat

    compat.require_server()
    allow_plugins()

    if not any(argument.startswith("--chat-template") and argument[15:16] in ("", "=") for argument in rest):
        rest = [
            *rest,
            "--chat-template",
            str(CHAT_TEMPLATE),
        ]  # on the raw route, forged tokens are refused with it only
    return ["--model", ours.model, *rest], options


if __name__ == "__main__":
    main(sys.argv[1:])
