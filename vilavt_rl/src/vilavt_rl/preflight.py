"""What would end a run in verl or EasyR1 after minutes, found before Ray starts: options, keys, files, checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from importlib import import_module, util
from pathlib import Path
from typing import Any

from vilavt_core.checkpoint import require_vilavt
from vilavt_core.errors import CheckpointError, VilavtError
from vilavt_core.settings import is_hub_id, read_chat_settings
from vilavt_core.spelling import did_you_mean

from .data import read_rows
from .errors import HostError, RowError
from .rewards import RewardSettings
from .run_settings import run_settings

LOOP_KEYS = ("name", "_target_", "preset", "limits", "reward", "trace_every", "inference")
"""Of our agent loop's configuration."""
ENGINE = "actor_rollout_ref.rollout.name"
OUR_LOOP = "vilavt_rl.verl.agent_loop.VilavtAgentLoop"
FREE_SECTIONS = frozenset({"ray_kwargs.ray_init"})
"""Sections of verl's configuration that are arguments of someone else's function."""
OUR_KEYS = frozenset({"data.agent_loop_config_path"})
"""Keys of verl's configuration that only we read."""
HYDRA_OPTIONS = ("--cfg", "-c", "--info", "-i", "--resolve", "--package", "-p")
"""Of verl's entry point, which print the configuration instead of training."""


def refuse_options(arguments: Sequence[str], known: Sequence[str], allowed: Sequence[str] = ()) -> None:
    """Refuse options among overrides.

    Args:
        arguments: of the command line, behind what our own command has taken.
        known: our own options, which come before.
        allowed: options of the trainer.

    Raises:
        HostError: an option that nobody knows.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in allowed:
            raise HostError(f"{argument}: there is no such option, overrides are key=value{did_you_mean(name, known)}")


# ---------------------------------------------------------------------------------------------------- files


def check_rows(key: str, files: str | Sequence[str] | None, *, ours: bool = True) -> None:
    """Make sure that the data files of a run are there, and that their rows can be trained on.

    Args:
        key: names them in errors.
        files: one, or several; those with a scheme, as ``hdfs://``, are left to the trainer.
        ours: whether our dataset reads them; otherwise only that they are there.

    Raises:
        RowError: one is not there, or a row lacks something.
    """
    local = [name for name in ([files] if isinstance(files, str) else list(files or ())) if "://" not in name]
    if not local and not files:
        raise RowError(f"{key} is not set; name a .jsonl, .json or .parquet file")
    paths = [Path(name).expanduser() for name in local]
    for path in paths:
        if not path.is_file():
            raise RowError(f"{key}: {path}: no such file; set {key}=FILE")
    if paths and ours:
        try:
            read_rows(paths)
        except VilavtError as error:
            raise RowError(f"{key}: {error}") from None


def check_checkpoint(key: str, path: str | None) -> None:
    """Make sure that the checkpoint of a run is a whole ViLaVT, from its headers; a hub id is left to the trainer.

    Raises:
        HostError: there is none, or it is another model or incomplete; names the key and the remedy.
    """
    if not path:
        raise HostError(f"{key} is not set; name the folder of a ViLaVT checkpoint")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if "://" in path or is_hub_id(path):
            return
        raise HostError(f"{key}: {path}: no such folder, and no hub id (owner/name); set {key}=FOLDER")
    try:
        require_vilavt(folder)
    except CheckpointError as error:
        raise HostError(f"{key}: {error}") from None


def check_output(key: str, folder: str | None) -> None:
    """Make sure that a run can write its folder.

    Raises:
        HostError: it cannot; names the key.
    """
    if not folder or "://" in folder:
        return
    path = Path(folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise HostError(f"{key}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise HostError(f"{key}: {there} cannot be written to")


def check_episodes(where: str, settings: Mapping[str, Any], checkpoint: str) -> None:
    """Make sure that episodes can run as a configuration says, in training and later.

    Args:
        where: names the configuration in errors.
        settings: ``preset``, ``limits`` and ``inference`` of it.
        checkpoint: of the run.

    Raises:
        HostError: an unknown preset or limit, or a value that cannot be one.
    """
    try:
        base = read_chat_settings(checkpoint) if Path(checkpoint).is_dir() else None
        run_settings(base, settings).apply()
        run_settings(base, {**settings, "inference": None}).apply()
    except (VilavtError, TypeError) as error:
        raise HostError(f"{where}: {error}") from None


# ---------------------------------------------------------------------------------------------------- verl


def check_verl(recipe: Path, overrides: Sequence[str]) -> None:
    """Compose a run's configuration as verl will, and check everything that it names.

    Args:
        recipe: YAML file.
        overrides: Hydra's, as verl gets them.

    Raises:
        HostError: an unknown key or a value that cannot be; names the key, and the one that was probably meant.
        RowError: the data cannot be used.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = _composed(recipe, [one for one in overrides if not one.startswith("-")])
    stock = _stock(recipe)
    if stock is not None:
        _refuse_unknown_keys(recipe, config, stock, _added(overrides))
    get = OmegaConf.select
    try:
        if ENGINE in OmegaConf.missing_keys(config):
            raise HostError(f"{ENGINE} has no value; give one as {ENGINE}=vllm")
        model = get(config, "actor_rollout_ref.model.path")
        loop = get(config, "actor_rollout_ref.rollout.agent.agent_loop_config_path")
        data = get(config, "data") or {}
        files = {f"data.{name}": _plain(data.get(name)) for name in ("train_files", "val_files")}
        ours = "vilavt" in str(get(config, "data.custom_cls.path") or "")
        output = get(config, "trainer.default_local_dir")
    except OmegaConfBaseException as error:
        raise HostError(f"{recipe}: {_first_line(error)}") from None
    check_checkpoint("actor_rollout_ref.model.path", model)
    for key, names in files.items():
        check_rows(key, names, ours=ours)
    if loop is not None:
        check_agent_loop(Path(loop), model)
    check_output("trainer.default_local_dir", output)


def check_agent_loop(path: Path, checkpoint: str) -> None:
    """Check the file that configures our agent loop.

    Args:
        path: of the file.
        checkpoint: of the run.

    Raises:
        HostError: it is not there, or has a key or a value that cannot be.
    """
    import yaml

    key = "actor_rollout_ref.rollout.agent.agent_loop_config_path"
    try:
        loops = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(f"{key}: {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HostError(f"{path}: not YAML: {error}") from None
    if not isinstance(loops, list) or not all(isinstance(loop, dict) for loop in loops):
        raise HostError(f"{path}: it must be a list of agent loops; see `vilavt-rl recipe agent_loop`")
    for loop in loops:
        if loop.get("_target_") != OUR_LOOP:
            continue
        for unknown in sorted(set(map(str, loop)) - set(LOOP_KEYS)):
            raise HostError(f"{path}: {unknown} is no key of our agent loop{did_you_mean(unknown, LOOP_KEYS)}")
        check_episodes(str(path), loop, checkpoint)
        reward, known = loop.get("reward"), [field.name for field in dataclasses.fields(RewardSettings)]
        for unknown in sorted(set(reward or {}) - set(known)):
            raise HostError(f"{path}: reward.{unknown} is no key of a reward{did_you_mean(unknown, known)}")
        try:
            RewardSettings(**(reward or {}))
        except (VilavtError, TypeError) as error:
            raise HostError(f"{path}: reward: {error}") from None


def _compose(folder: Path, name: str, overrides: Sequence[str]) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(folder), version_base=None):
        return compose(name, overrides=list(overrides))


def _composed(recipe: Path, overrides: Sequence[str]) -> Any:
    """The configuration that verl's trainer gets."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException:
            raise HostError(
                f"{override!r} is not key=value as Hydra reads it; put quotes around a value with special characters"
            ) from None
    try:
        return _compose(recipe.parent, recipe.stem, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        try:
            plain = _compose(recipe.parent, recipe.stem, ())
        except (HydraException, OmegaConfBaseException):
            raise HostError(f"{recipe}: {_first_line(error)}") from None
        for one in parsed:
            if (
                not (one.is_add() or one.is_force_add())
                and (hint := _unknown(plain, str(one.key_or_group))) is not None
            ):
                raise HostError(
                    f"{one.key_or_group} is not in the configuration{hint} To add a key write +{one.input_line}"
                ) from None
        raise HostError(f"{recipe}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _unknown(config: Any, key: str) -> str | None:
    """What was probably meant by a key that is not in a configuration; None: it is there."""
    from omegaconf import OmegaConf

    node, way = config, list[str]()
    for part in key.split("."):
        if not OmegaConf.is_dict(node) or part not in node:
            known = list(node) if OmegaConf.is_dict(node) else []
            return did_you_mean(key, [".".join([*way, str(name)]) for name in known])
        node = node._get_node(part)
        way.append(part)
    return None


def _added(overrides: Sequence[str]) -> frozenset[str]:
    """Keys that overrides add on purpose, with ``+``."""
    return frozenset(one.partition("=")[0].lstrip("+") for one in overrides if one.startswith("+"))


def _stock(recipe: Path) -> Any:
    """verl's own configuration, which the recipe changes; None: the recipe builds on none of verl's."""
    import yaml

    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    defaults = values.get("defaults", []) if isinstance(values, dict) else []
    places = util.find_spec("verl")
    folder = Path(next(iter(places.submodule_search_locations or ()))) / "trainer" / "config" if places else Path()
    name = next((one for one in defaults if isinstance(one, str) and (folder / f"{one}.yaml").is_file()), None)
    return None if name is None else _compose(folder, name, ())


def _refuse_unknown_keys(recipe: Path, config: Any, stock: Any, added: frozenset[str]) -> None:
    from omegaconf import OmegaConf

    def walk(mine: Any, theirs: Any, way: str) -> None:
        shown = {str(name) for name in theirs}  # `in` would leave out what has no value yet
        if not shown:
            return  # handed on as it is, to an engine say
        for name in map(str, mine):
            key = f"{way}{name}"
            if name not in shown:
                if key == "hydra" or key in OUR_KEYS:
                    continue
                target = theirs.get("_target_")
                fields = _fields(target) if isinstance(target, str) else frozenset[str]()
                if name in fields or (not fields and _is_added(key, added)):
                    continue  # a section that becomes an object takes its fields and nothing else
                known = shown | fields
                remedy = "" if fields else f"; if verl reads it all the same, write +{key}=VALUE on the command line"
                raise HostError(f"{recipe}: {key} is no key of verl's configuration{did_you_mean(name, known)}{remedy}")
            inner, other = mine._get_node(name), theirs._get_node(name)
            both = all(OmegaConf.is_dict(node) and not node._is_none() for node in (inner, other))
            if both and key not in FREE_SECTIONS:
                walk(inner, other, f"{key}.")
            elif not both:
                _refuse_other_kind(key, inner, other)

    walk(config, stock, "")


def _refuse_other_kind(key: str, mine: Any, theirs: Any) -> None:
    """Refuse a value where verl has a section, and text where it has a number."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(mine) or mine._is_none() or mine._is_interpolation() or theirs._is_none():
        return
    value = mine._value()
    if OmegaConf.is_dict(theirs):
        raise HostError(f"{key} is {value!r}, but verl has a section of keys there")
    number = not OmegaConf.is_config(theirs) and type(theirs._value()) in (int, float)
    if number and not isinstance(value, int | float):
        raise HostError(f"{key} is {value!r}, it must be a number, as {theirs._value()}")


def _is_added(key: str, added: frozenset[str]) -> bool:
    return any(key == one or one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in added)


def _fields(target: str) -> frozenset[str]:
    """Fields of the class that a section of verl's configuration becomes; it has more than the section shows."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return frozenset()
    return (
        frozenset(field.name for field in dataclasses.fields(found)) if dataclasses.is_dataclass(found) else frozenset()
    )


def _plain(files: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(files) if OmegaConf.is_config(files) else files
