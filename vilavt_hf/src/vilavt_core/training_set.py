"""The data set that a run's configuration or a command line names, with the tokenizer and prompts of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from .checkpoint.companions import PROMPTS, has_tokenizer
from .checkpoint.hub import checkpoint_folder
from .checkpoint.layout import CONFIG, no_checkpoint
from .conversation import Tokenizer
from .data.dataset import SftDataset
from .data.rendering import Renderer, RenderSettings
from .errors import CheckpointError
from .prompts import PromptSet
from .settings import preset_of
from .sft_config import SftConfig, find_sources
from .tokenizer import FileTokenizer


def make_renderer(
    model: str | Path, settings: RenderSettings, preset: str | None = None, tokenizer: Tokenizer | None = None
) -> Renderer:
    """What turns records into the token streams of a checkpoint.

    Args:
        model: folder or hub id.
        settings: how records become tokens.
        preset: how episode records run; None: what the checkpoint asks for.
        tokenizer: the checkpoint's, if it is loaded already.
    """
    folder = checkpoint_folder(model)
    if tokenizer is None and not has_tokenizer(folder) and not (folder / CONFIG).is_file():
        raise CheckpointError(no_checkpoint(folder))
    own = folder / PROMPTS
    prompts = PromptSet.load(own if own.is_dir() else "default")
    return Renderer(tokenizer or FileTokenizer(folder), prompts, settings, preset_of(folder, preset))


def make_dataset(
    config: SftConfig,
    base: Path | None = None,
    tokenizer: Tokenizer | None = None,
    names: Sequence[str] | None = None,
) -> SftDataset:
    """The data set of a run.

    Args:
        config: of the run.
        base: `checkpoint_folder` of its model, if it is known already.
        tokenizer: the model's, if it is loaded already.
        names: of data sets; None: those it trains on.

    Raises:
        DataError: a data set is not there.
    """
    data = config.data
    settings = RenderSettings(
        data.max_pixels, data.min_pixels, data.labels, data.system, data.image_rules, data.frames, data.fps
    )
    return SftDataset(
        find_sources(data, names),
        make_renderer(base or config.model.path, settings, data.preset, tokenizer),
        max_length=data.max_length,
        over_long=data.over_long,
        seed=config.seed,
    )
