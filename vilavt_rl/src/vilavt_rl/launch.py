"""Starting verl's own trainer with one of our recipes."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from vilavt_core.shipped import find_recipe, recipe_names
from vilavt_core.spelling import did_you_mean
from vilavt_core.yaml_config import get_key, read_keys

from .compat import require_verl
from .errors import HostError
from .preflight import HYDRA_OPTIONS, check_checkpoint, check_verl, refuse_options

RECIPES = Path(__file__).with_name("recipes")
"""Those that come with the package; `vilavt-rl recipe` prints them."""
_PATH_KEY = re.compile(r"(^|[._])(path|dir|file|files)$")
"""Keys of verl's configuration that hold paths end so. Values of others, as a project's name, may be names of folders
too and stay as they are."""
OPTIONS = ("--show", "--help")
"""Of `vilavt-rl verl`."""
AGENT_LOOP = "actor_rollout_ref.rollout.agent.agent_loop_config_path"
MODEL = "actor_rollout_ref.model.path"
EXTENSION = "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls"
OUR_EXTENSION = "vilavt_rl.verl.vllm_worker.VilavtWorkerExtension"


def verl_command(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command that runs a recipe, and the environment variables it needs beside the present ones.

    The command is verl's entry point with Hydra's arguments; nothing of ours runs in between. Files and folders that
    overrides name, and the agent loop's configuration, become absolute: Ray's workers may have another working
    directory. With ``rollout.name=vllm`` and no ``worker_extension_cls`` of your own, ours is named: with it a weight
    update that vLLM refuses ends the run.

    Args:
        recipe: a YAML file that Hydra can compose, or the name of one in `RECIPES`, as ``tiny_cpu``.
        overrides: Hydra's ``key=value``.

    Raises:
        HostError: no such recipe, an unknown option, or verl cannot be used.
    """
    refuse_options(overrides, OPTIONS, HYDRA_OPTIONS)
    found = find_recipe(recipe, RECIPES)
    if found is None:
        known = recipe_names(RECIPES)
        raise HostError(
            f"{recipe}: no such recipe; it must be a file, or one of {', '.join(known)}{did_you_mean(recipe, known)}"
        )
    recipe = found.absolute()
    require_verl()
    config = read_keys(recipe, HostError)
    given = [_absolute(override) for override in overrides]
    if _set(given, AGENT_LOOP) is None:
        loop = get_key(config, AGENT_LOOP)
        if loop is not None and not Path(loop).is_absolute():
            places = [recipe.parent / loop, Path(loop).absolute(), RECIPES / loop]
            given.append(f"{AGENT_LOOP}={next((place for place in places if place.is_file()), places[1])}")
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    engine = _set(given, "actor_rollout_ref.rollout.name") or get_key(config, "actor_rollout_ref.rollout.name")
    if engine == "vllm" and (_set(given, EXTENSION) or get_key(config, EXTENSION)) is None:
        given.append(f"++{EXTENSION}={OUR_EXTENSION}")
    if (_set(given, "trainer.device") or get_key(config, "trainer.device")) == "cpu":
        environment["VERL_PLATFORM"] = "cpu"
        # A cluster that is already running got its environment before: tell its workers too.
        given.append("+ray_kwargs.ray_init.runtime_env.env_vars={VERL_PLATFORM: cpu}")
    command = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        f"--config-path={recipe.parent}",
        f"--config-name={recipe.stem}",
        *given,
    ]
    return command, environment


def run_verl(recipe: str | Path, overrides: Sequence[str] = ()) -> None:
    """Replace this process by the trainer, once everything that the run names is found to be in order.

    Raises:
        HostError: as `verl_command`; an unknown option or key, a checkpoint or a file that cannot be used.
        RowError: the data cannot be used.
    """
    command, environment = verl_command(recipe, overrides)
    if (checkpoint := _checkpoint(recipe, command)) is not None:
        check_checkpoint(MODEL, checkpoint)
    options = [part for part in command if part.startswith(("--config-path=", "--config-name="))]
    given = command[command.index(options[-1]) + 1 :]
    os.environ.update(environment)  # composing imports verl, which reads it
    found = find_recipe(recipe, RECIPES)
    assert found is not None
    if not any(part.startswith("-") for part in given):  # Hydra's own options only show the configuration
        with warnings.catch_warnings():  # what verl misses as it is imported, the run says itself
            warnings.simplefilter("ignore")
            check_verl(found.absolute(), given)
    os.execve(command[0], command, {**os.environ, **environment})


def _checkpoint(recipe: str | Path, command: Sequence[str]) -> str | None:
    """What the run trains: the last override of it, else what the recipe says; None if only Hydra can tell."""
    found = find_recipe(recipe, RECIPES)
    named = _set(command, MODEL) or (None if found is None else get_key(read_keys(found, HostError), MODEL))
    return named.strip("'\"") if isinstance(named, str) and not re.search(r"\$\{|\?\?\?", named) else None


def _absolute(override: str) -> str:
    """The override with its existing files and folders made absolute, if its key takes paths; Hydra's quotes and lists
    are understood."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, found, text = override.partition("=")
    if not found or not _PATH_KEY.search(key):
        return override
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        value = text  # perhaps a file whose name needs quotes
    names = value if isinstance(value, list) else [value]
    if not any(isinstance(name, str) and name and Path(name).exists() for name in names):
        return override
    places = [_quoted(str(Path(name).absolute()) if Path(name).exists() else name) for name in map(str, names)]
    return f"{key}=[{','.join(places)}]" if isinstance(value, list) else f"{key}={places[0]}"


def _quoted(path: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return path if re.fullmatch(r"[\w/.:+-]+", path) else QuotedString(path, Quote.single).with_quotes()


def _set(overrides: Sequence[str], key: str) -> str | None:
    """The value that overrides give a key; the last wins."""
    values = [value for name, _, value in (o.partition("=") for o in overrides) if name.lstrip("+") == key]
    return values[-1] if values else None
