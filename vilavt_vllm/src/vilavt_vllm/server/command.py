"""``vilavt-serve CHECKPOINT``: vLLM's OpenAI server with the loop inside."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vilavt_core.ending import ending
from vilavt_core.presets import get_preset
from vilavt_core.versions import version_of

from .. import CHAT_TEMPLATE
from ..checkpoints import require_servable
from ..errors import CommandError

if TYPE_CHECKING:
    from .options import ServerOptions


@dataclass(frozen=True)
class CommandLine:
    """What was typed, and what a file of flags holds."""

    checkpoint: str | None
    """Folder or hub id; None: only vLLM's flags are shown."""
    own: Mapping[str, Any]
    """Our flags, by `Flag.name`."""
    rest: list[str]
    """vLLM's flags."""


def parser() -> argparse.ArgumentParser:
    """Our own flags. What it does not know is vLLM's, the checkpoint among it: which words are values of flags, and
    which is the checkpoint, only vLLM's parser can tell.
    """
    from .options import flags

    out = argparse.ArgumentParser(
        prog="vilavt-serve",
        usage="vilavt-serve CHECKPOINT [flags]",
        description="vLLM's OpenAI server for a ViLaVT, with the zoom loop inside /v1/chat/completions, "
        "/v1/responses and /v1/messages. CHECKPOINT is a folder or a hub id; --model CHECKPOINT says the same, and so "
        "does the key model of --config.",
        epilog="All flags of vLLM's server are accepted too (--port, --api-key, --tensor-parallel-size, "
        "--allowed-media-domains, …): vilavt-serve --vllm-help lists them.",
        allow_abbrev=False,
    )
    out.add_argument("--version", action="version", version=f"vilavt-serve {version_of('vilavt-vllm')}")
    out.add_argument("--vllm-help", action="store_true", help="show vLLM's flags and leave")
    out.add_argument(
        "--config", metavar="FILE", help="YAML file of flags, ours and vLLM's; those of the command line win"
    )
    for flag in flags():
        out.add_argument(
            flag.option,
            type=flag.kind,
            default=flag.default,
            metavar="NAME" if flag.kind is str else "N",
            help=flag.help + ("" if flag.default is None else f" (default: {flag.default})"),
        )
    return out


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """The command line, with the file of flags that it names.

    Args:
        arguments: as typed.

    Raises:
        CommandError: no checkpoint, or two of them; a file that cannot be read.
        SystemExit: ``--help``, ``--version``, or a flag of ours with a wrong value.
    """
    own, arguments = parser(), list(map(_dashed, arguments))
    ours, typed = own.parse_known_args(arguments)
    if ours.vllm_help:
        return CommandLine(None, vars(ours), [])
    filed: list[str] = []
    if ours.config is not None:
        from .. import compat

        compat.require_server()
        defaults, filed = own.parse_known_args(list(map(_dashed, compat.flags_of_file(ours.config))))
        if defaults.config is not None:
            raise CommandError(f"{ours.config}: it names another file of flags, {defaults.config}; put them into one")
        ours, typed = own.parse_known_args(arguments, defaults)
    in_file, filed = _checkpoint_of(filed)
    checkpoint, typed = _checkpoint_of(typed)
    if checkpoint is None and typed:  # it may stand behind a flag: --port 8000 CHECKPOINT
        from .. import compat

        compat.require_server()
        checkpoint = compat.server_arguments([*filed, *typed], {}).model_tag
    checkpoint = checkpoint or in_file
    if checkpoint is None:
        raise CommandError("no checkpoint is named: vilavt-serve CHECKPOINT, a folder or a hub id")
    return CommandLine(checkpoint, vars(ours), [*filed, *typed])


def _dashed(argument: str) -> str:
    """A flag as it is written here: vLLM takes underscores in its own, too."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    head, dot, more = name.partition(".")  # behind a dot stand keys of a dictionary
    return "--" + head[2:].replace("_", "-") + dot + more + separator + value


def _checkpoint_of(flags: list[str]) -> tuple[str | None, list[str]]:
    """The checkpoint that stands in front of all flags, or as ``--model``, and the other flags.

    Raises:
        CommandError: both.
    """
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--model", nargs="?")
    found, rest = named.parse_known_args(flags)
    if not rest or rest[0].startswith("-"):
        return found.model, rest
    if found.model is not None:
        raise CommandError(f"two checkpoints are named, {rest[0]!r} and --model {found.model!r}; name one")
    return rest[0], rest[1:]


def engine_arguments(rest: list[str]) -> dict[str, str]:
    """Of vLLM's flags those that say what the checkpoint is, by the names of vLLM's engine arguments."""
    out = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--hf-overrides", "--load-format", "--revision"):
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
    line = read_command_line(sys.argv[1:] if arguments is None else arguments)
    given, options = ready(line)

    from .. import compat
    from .options import VLLM_DEFAULTS

    compat.serve(given, options, VLLM_DEFAULTS)


def ready(line: CommandLine) -> tuple[list[str], ServerOptions]:
    """Prepare this process for vLLM's server, once all that can be seen to be wrong before it starts was looked for.

    Args:
        line: see `read`.

    Returns:
        vLLM's command line, and our options.

    Raises:
        VilavtError: the checkpoint, the preset or this vLLM cannot be served.
    """
    from .options import options_of

    options = options_of(line.own)
    if options.preset is not None:
        get_preset(options.preset)
    if line.checkpoint is not None:
        require_servable(line.checkpoint, engine_arguments(line.rest))

    from .. import compat

    compat.require_server()
    allow_plugins()

    rest = line.rest
    if not any(argument.startswith("--chat-template") and argument[15:16] in ("", "=") for argument in rest):
        # on the raw route, forged tokens are refused with it only
        rest = [*rest, "--chat-template", str(CHAT_TEMPLATE)]
    return ["--help"] if line.checkpoint is None else ["--model", line.checkpoint, *rest], options


if __name__ == "__main__":
    main(sys.argv[1:])
