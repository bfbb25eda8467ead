"""Everything a checkpoint needs beside weights and configuration: processor, tokenizers, chat template, prompts."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .layout import read_json
from .writing import place_file, write_json

PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
QUERY_TOKENIZER = "query_tokenizer"
PROMPTS = "prompts"

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "vilavt_chat.json",
    *_TOKENIZER,
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
_FOLDERS = (QUERY_TOKENIZER, PROMPTS, "additional_chat_templates")
_STOCK_PROCESSORS = ("Qwen2_5_VLProcessor", "Qwen2VLProcessor")


@dataclass(frozen=True)
class Missing:
    """A part that no source had, and how to add it."""

    name: str
    remedy: str


@dataclass(frozen=True)
class Companions:
    """What was brought along, and what is missing."""

    brought: tuple[str, ...]
    missing: tuple[Missing, ...] = field(default=())


def bring_companions(
    target: Path,
    sources: Sequence[Path],
    query_tokenizer_sources: Sequence[Path] = (),
) -> Companions:
    """Copy the companion files into `target`, each from the first folder of `sources` that has it.

    Files of one thing come from one folder: the tokenizer's (one version writes files that another leaves out and
    still reads), the chat template, and the image processor's settings, wherever its version has put them.

    The query tokenizer comes from a ``query_tokenizer/`` folder in `sources`, else from the tokenizer files of the
    first folder in `query_tokenizer_sources` that has them. Nothing is fetched from anywhere.
    """
    brought = []
    tokenizers = [folder for folder in sources if has_tokenizer(folder)][:1] or list(sources)
    templates = [folder for folder in sources if _has_chat_template(folder)][:1]
    images = [folder for folder in sources if _has_image_processor(folder)][:1]
    for name in _FILES:
        folders = templates if name in _TEMPLATES else tokenizers if name in _TOKENIZER else sources
        folders = images if name == IMAGE_PROCESSOR else folders
        source = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if source is not None:
            place_file(source, target / name, link=False)
            brought.append(name)
    _drop_nested(target / PROCESSOR)
    if images and (nested := _nested(images[0] / PROCESSOR)) is not None:
        write_json(target / IMAGE_PROCESSOR, nested)
        brought.append(IMAGE_PROCESSOR)
    for name in _FOLDERS:
        source = next((folder / name for folder in sources if (folder / name).is_dir()), None)
        if source is not None:
            shutil.copytree(source, target / name)
            brought.append(f"{name}/")
    if f"{QUERY_TOKENIZER}/" not in brought:
        source = next((folder for folder in query_tokenizer_sources if has_tokenizer(folder)), None)
        if source is not None:
            copy_tokenizer(source, target / QUERY_TOKENIZER)
            brought.append(f"{QUERY_TOKENIZER}/")
    make_portable(target)
    _name_our_processor(target)
    return Companions(tuple(dict.fromkeys(brought)), tuple(missing_companions(target)))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer files.

    Raises:
        CheckpointError: there is no tokenizer.
    """
    if not has_tokenizer(source):
        raise CheckpointError(f"{source} has no tokenizer.json (nor vocab.json with merges.txt)")
    target.mkdir()
    for name in _TOKENIZER:
        if (source / name).is_file():
            place_file(source / name, target / name, link=False)


def missing_companions(folder: Path) -> list[Missing]:
    """The parts that chat, training and serving need and `folder` lacks."""
    missing = []
    if not (folder / "generation_config.json").is_file():
        missing.append(
            Missing("generation_config.json", "copy it from the base model; greedy defaults are used without")
        )
    if not has_tokenizer(folder):
        missing.append(Missing("tokenizer.json", "pass --processor with the folder of the base model"))
    elif not _has_chat_template(folder):
        missing.append(Missing("chat template", "pass --processor with the folder of the base model"))
    if not (folder / "preprocessor_config.json").is_file():
        missing.append(Missing("preprocessor_config.json", "pass --processor with the folder of the base model"))
    if not has_tokenizer(folder / QUERY_TOKENIZER):
        missing.append(
            Missing(
                f"{QUERY_TOKENIZER}/",
                "pass --query-encoder with the folder of the query encoder (Qwen3-Embedding), or copy its tokenizer "
                f"files into {QUERY_TOKENIZER}/; queries cannot be tokenised without",
            )
        )
    return missing


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def make_portable(folder: Path) -> None:
    """Let transformers 4.57 read processor and tokenizers that 5.x wrote, and the other way round, in place.

    5.x nests the image processor in ``processor_config.json``, where 4.57 does not look, and prefers that to
    ``preprocessor_config.json``, which is left as the only place; gives its pixel bounds as ``size``, which 4.57
    ignores; and has new names for two settings of a tokenizer.
    """
    path, own = folder / PROCESSOR, folder / IMAGE_PROCESSOR
    nested = _nested(path)
    if nested is not None:
        write_json(own, nested)
        _drop_nested(path)
    if own.is_file():
        _spell_out_pixel_bounds(own)
    for tokenizer in (folder, folder / QUERY_TOKENIZER):
        if (tokenizer / "tokenizer_config.json").is_file():
            _name_old_tokenizer_settings(tokenizer / "tokenizer_config.json")


def _nested(path: Path) -> dict[str, Any] | None:
    found = read_json(path).get("image_processor") if path.is_file() else None
    return found if isinstance(found, dict) else None


def _has_image_processor(folder: Path) -> bool:
    return (folder / IMAGE_PROCESSOR).is_file() or _nested(folder / PROCESSOR) is not None


def image_processor_size(folder: Path) -> dict[str, int | None]:
    """``shortest_edge`` and ``longest_edge`` of a checkpoint's image processor, in pixels of area; None: unsaid.

    Raises:
        CheckpointError: a bound that is no positive whole number.
    """
    own = folder / IMAGE_PROCESSOR
    config = read_json(own) if own.is_file() else _nested(folder / PROCESSOR) or {}
    size = config.get("size")
    size = size if isinstance(size, dict) else {}
    out: dict[str, int | None] = {}
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        value = size.get(edge) if config.get(name) is None else config[name]
        if value is not None and (type(value) is not int or value <= 0):
            raise CheckpointError(f"{folder}: the image processor's {name} is {value!r}, expected a positive number")
        out[edge] = value
    return out


def _drop_nested(path: Path) -> None:
    if _nested(path) is not None:
        write_json(path, {name: value for name, value in read_json(path).items() if name != "image_processor"})


def _spell_out_pixel_bounds(path: Path) -> None:
    config = read_json(path)
    size = config.get("size")
    size = size if isinstance(size, dict) else {}
    bounds = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    # In files that have both, every version takes min_pixels and max_pixels.
    missing = {name: value for name, value in bounds.items() if value is not None and config.get(name) is None}
    if missing:
        write_json(path, {**config, **missing})


def _name_old_tokenizer_settings(path: Path) -> None:
    config = read_json(path)
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if changed != config:
        write_json(path, changed)


def _name_our_processor(folder: Path) -> None:
    """AutoProcessor goes by ``processor_class``, and a stock one would drop the queries."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        value = read_json(path)
        if value.get("processor_class") in _STOCK_PROCESSORS:
            write_json(path, {**value, "processor_class": "VilavtProcessor"})
