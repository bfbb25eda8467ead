"""``vilavt sft``: supervised fine-tuning; ``vilavt merge-lora``: an adapter back into its model."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..ending import resumable
from ..errors import TrainingError
from ..progress import waiting
from .allocator import keep_freed_memory
from .quiet import hide_bars
from .running import check_output_folders, choice

if TYPE_CHECKING:
    from ..sft_config import SftConfig


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
    from ..sft_config import SftConfig, describe

    if keys:
        for key, default, text in describe():
            typer.echo(f"{key} [{default}]\n    {text}")
        return
    if config is None:
        raise typer.BadParameter("name a YAML file, or pass --keys", param_hint="CONFIG")
    settings = SftConfig.load(config, overrides or ())
    check_run(settings)
    if settings.parallel.cpu:
        keep_freed_memory()
    with resumable(goes_on(settings)):
        hide_bars()
        with waiting("loading torch and transformers"):
            module = import_module("vilavt_hf.train.run")
        typer.echo(module.Run(settings).train().summary())


def check_run(config: "SftConfig") -> None:
    """What can be said of a run before torch is imported: its folder can be written, its checkpoint trained.

    Raises:
        CheckpointError: see `require_vilavt`.
        typer.BadParameter: nothing can be written to the folder.
    """
    from ..checkpoint import require_vilavt

    check_output_folders(**{"output.folder": config.output.folder})
    require_vilavt(config.model.path)


def goes_on(config: "SftConfig") -> str:
    """What becomes of a run that is stopped."""
    if config.output.resume == "never":
        return "output.resume is never: the same command starts anew"
    return f"the same command goes on from the last checkpoint in {config.output.folder}, if there is one"


def merge_lora(
    adapter: Annotated[Path, typer.Argument(help="Folder or hub id of the adapter.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    base: Annotated[
        str | None, typer.Option(help="Checkpoint that the adapter was trained on; default: the one it names.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
) -> None:
    """Add an adapter to the weights it was trained on and write a complete checkpoint."""
    from ..checkpoint import adapter_folder, require_vilavt
    from ..checkpoint.layout import ADAPTER_CONFIG
    from ..checkpoint.writing import check_destination

    choice(dtype, ("bf16", "fp32"), "--dtype")
    check_destination(destination)
    if adapter_folder(adapter) is None:
        raise TrainingError(f"{adapter}: no readable {ADAPTER_CONFIG}; name the folder or hub id of an adapter")
    if base is not None:
        require_vilavt(base)
    hide_bars()
    with waiting(f"merging {adapter.name}"):
        merged = import_module("vilavt_hf.train.lora").merge_adapter(adapter, destination, base=base, dtype=dtype)
    typer.echo(str(merged))
