"""``vilavt sft``: supervised fine-tuning; ``vilavt merge-lora``: an adapter back into its model."""

from pathlib import Path
from typing import Annotated

import typer

from .allocator import keep_freed_memory


def sft(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file, or a recipe: vilavt_7b_sft, vilavt_tiny_sft.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key with its default, and stop.")] = False,
) -> None:
    """Fine-tune a checkpoint on conversations.

    On several GPUs: torchrun --nproc-per-node 8 -m vilavt_hf.train CONFIG.yaml [section.key=value …]
    """
    from vilavt_core.sft_config import SftConfig, describe

    if keys:
        for key, default, text in describe():
            typer.echo(f"{key} [{default}]\n    {text}")
        return
    if config is None:
        raise typer.BadParameter("name a YAML file, or pass --keys", param_hint="CONFIG")
    settings = SftConfig.load(config, overrides or ())
    if settings.parallel.cpu:
        keep_freed_memory()
    from ..train.run import Run

    typer.echo(Run(settings).train().summary())


def merge_lora(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    base: Annotated[str | None, typer.Option(help="What it was trained on; default: as the adapter says.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
) -> None:
    """Add an adapter to the weights it was trained on and write a complete checkpoint."""
    if dtype not in ("bf16", "fp32"):
        raise typer.BadParameter(f"{dtype!r}: choose bf16 or fp32", param_hint="--dtype")
    from ..train.lora import merge_adapter

    typer.echo(str(merge_adapter(adapter, destination, base=base, dtype=dtype)))
