"""The `vilavt` command. A subcommand's module is imported when the subcommand is called, not before: `vilavt --help`
and whatever needs no model start without torch and transformers.
"""

import io
import logging
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from ..ending import ending, start_logging
from .running import Commands, version_option


@dataclass(frozen=True)
class Subcommand:
    """A subcommand that was not imported yet."""

    place: str
    """``module:name`` of its function, or of the `typer.Typer` of a group."""
    help: str
    """First line of its help."""

    def load(self, name: str) -> Any:
        """The command itself."""
        module, _, attribute = self.place.partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command: Any = typer.main.get_command(found)
        else:
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            alone.command(name)(found)
            command = typer.main.get_command(alone)
        command.name = name
        return command


SUBCOMMANDS = {
    "ask": Subcommand(
        "vilavt_core.cli.chat:ask", "Ask a checkpoint or a server about images and videos, and watch it zoom."
    ),
    "chat": Subcommand(
        "vilavt_core.cli.talk:chat", "Talk with a checkpoint or a server about images, in the terminal."
    ),
    "web": Subcommand("vilavt_core.cli.web:web", "Open a page in which images are dropped and asked about."),
    "demo": Subcommand(
        "vilavt_core.cli.chat:demo",
        "Watch a real, tiny ViLaVT answer questions that it was not trained on.",
    ),
    "attention": Subcommand(
        "vilavt_hf.cli.attention:attention",
        "Draw where regions look inside the vision encoder, and what the query changes.",
    ),
    "eval": Subcommand(
        "vilavt_eval.cli.eval:evaluate",
        "Ask a checkpoint or a server the questions of benchmarks, and score the answers.",
    ),
    "eval-latency": Subcommand(
        "vilavt_eval.cli.eval:latency",
        "Measure seconds per turn and answer, what they go into, and how much work is reused.",
    ),
    "score": Subcommand(
        "vilavt_eval.cli.score:score_command",
        "Score result files; files that differ in their seed only are averaged.",
    ),
    "view": Subcommand(
        "vilavt_eval.cli.view:view",
        "Show recorded conversations as a folder of pages with an index.",
    ),
    "inspect": Subcommand(
        "vilavt_core.cli.checkpoint:inspect",
        "Say what a checkpoint is, how it conditions vision on queries, and what it lacks.",
    ),
    "convert": Subcommand(
        "vilavt_core.cli.checkpoint:convert",
        "Turn an SFT-format checkpoint into the RL/vLLM format.",
    ),
    "init": Subcommand(
        "vilavt_core.cli.checkpoint:init",
        "Make a new ViLaVT from a Qwen2.5-VL and a Qwen3-Embedding checkpoint.",
    ),
    "push": Subcommand(
        "vilavt_core.cli.push:push", "Upload a checkpoint with its model card to the hub, as one commit."
    ),
    "prompts": Subcommand(
        "vilavt_core.cli.prompts:prompts_app",
        "Prompt sets: show one, or import one from a checkout of the published system.",
    ),
    "data": Subcommand("vilavt_core.cli.data:data_app", "Training data: check it, count it, unpack its archives."),
    "sft": Subcommand("vilavt_core.cli.sft:sft", "Fine-tune a checkpoint on conversations."),
    "curve": Subcommand(
        "vilavt_core.cli.curve:curve",
        "Draw loss, right answers, learning rate and gradient norm of one run of `vilavt sft` or several.",
    ),
    "recipe": Subcommand("vilavt_core.cli.recipe:recipe", "Print a recipe of `vilavt sft`, to copy and edit."),
    "merge-lora": Subcommand(
        "vilavt_core.cli.sft:merge_lora",
        "Add an adapter to the weights it was trained on and write a complete checkpoint.",
    ),
    "tiny": Subcommand(
        "vilavt_hf.cli.tiny:tiny_app",
        "The tiny example model: build it, evaluate it, draw its scenes.",
    ),
    "doctor": Subcommand(
        "vilavt_core.cli.doctor:doctor",
        "Check this installation; exit code 1 if something has to be done.",
    ),
    "version": Subcommand("vilavt_core.cli.doctor:version", "Print the versions that decide a result."),
}
"""By name, in the order of the help page."""


class _Subcommands(Commands):
    """Lists subcommands by their help lines alone, and imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = SUBCOMMANDS.get(cmd_name)
        return None if found is None else TyperCommand(cmd_name, help=found.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, None if command is None else SUBCOMMANDS[str(command.name)].load(str(command.name)), rest


app = typer.Typer(
    name="vilavt",
    cls=_Subcommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="ViLaVT: a vision-language model whose vision encoder can be asked.",
)


@app.callback()
def _options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what the libraries do; show tracebacks."),
    version: bool = version_option("vilavt", "vilavt-hf"),
) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that it cannot show must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    start_logging(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Entry point."""
    with ending("vilavt"):
        app(prog_name="vilavt")  # whatever started it, as `python -m`
