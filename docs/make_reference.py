"""Make the pages of the reference from the code: every command and option, every key of a YAML file, the server's API,
the public Python names.

    python docs/make_reference.py FOLDER

The site is built with them (`nox -s docs`); none is kept in the repository, so none can be out of date. Needs the four
packages, torch and transformers, neither vLLM nor a trainer.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel

from vilavt_core.cli import SUBCOMMANDS
from vilavt_core.cli import app as vilavt
from vilavt_core.data.registry import DataSource, Registry
from vilavt_core.data.schema import EpisodeRecord, EpisodeTurn, PublishedRecord
from vilavt_core.markdown import markdown_table
from vilavt_core.presets import Limits, Sampling
from vilavt_core.sft_config import SftConfig, describe
from vilavt_core.shipped import RECIPES as SFT_RECIPES
from vilavt_core.shipped import recipe_names, recipe_text
from vilavt_core.wire import SETTINGS_PATH
from vilavt_eval.definition import Benchmark
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_rl.cli import app as vilavt_rl
from vilavt_rl.launch import RECIPES
from vilavt_vllm.server.dialects import DIALECTS
from vilavt_vllm.server.options import flags
from vilavt_vlmeval.settings import PREFIX, AdapterSettings

PYTHON = {
    "vilavt_core": (
        "protocol regions images sources video presets settings prompts conversation episode driver results backends "
        "asking client dialogue trace viewer watching attention attention_figure scoring scoring.published checkpoint "
        "data sft_config shipped errors"
    ),
    "vilavt_eval": (
        "definition evaluation_preset questions runner scores comparison statistics ablation latency browser"
    ),
    "vilavt_hf": (
        "chat engine configuration_vilavt modeling_vilavt processing_vilavt positions attention_maps adapters "
        "quantization train.run train.trainer"
    ),
    "vilavt_vllm": "offline online processing limits support server.options server.fields",
    "vilavt_rl": "data rewards rollout policy merge replay curves verl.agent_loop easyr1.block",
    "vilavt_vlmeval": "vlm lmms adapter settings traces",
}
"""Package -> its modules with public names, in the order of the page."""


def pages() -> dict[str, str]:
    """Path below the site's root -> Markdown, or JSON."""
    out = {f"reference/python/{package}.md": python_page(package) for package in PYTHON}
    return out | {
        "reference/commands.md": commands_page(),
        "reference/keys.md": keys_page(),
        "reference/server.md": server_page(),
        "reference/openapi.json": json.dumps(openapi(), indent=1, ensure_ascii=False),
    }


# Commands


def commands_page() -> str:
    """Every command with its arguments and options."""
    parts = ["# Commands\n\nEvery command, argument and option, read from the code. `--help` says the same.\n"]
    for root, app in (("vilavt", vilavt), ("vilavt-rl", vilavt_rl)):
        for words, command in commands(root, app):
            parts.append(f"## {' '.join(words)}\n\n{_paragraphs(command.help or '')}\n\n{_parameters(command)}\n")
    parts.append(
        f"## vilavt-serve\n\nOur flags; vLLM's own are accepted too (`vilavt-serve --vllm-help`).\n\n{_flags()}\n"
    )
    return "\n".join(parts)


def commands(root: str, app: typer.Typer) -> Iterator[tuple[list[str], Any]]:
    """(words that call it, command) of every command of an application, depth first; groups are left out."""
    found = typer.main.get_command(app)
    if root == "vilavt":
        for name in SUBCOMMANDS:
            yield from _below([root, name], SUBCOMMANDS[name].load(name))
    else:
        yield from _below([root], found)


def _below(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, inner in command.commands.items():
        yield from _below([*words, name], inner)


def _parameters(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        names = [f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts)]
        if parameter.param_type_name == "argument":
            names = [f"`{parameter.name.upper()}`"]
        text = _cell(getattr(parameter, "help", None) or "")
        choices = _choices(parameter.type_descriptor.annotation)
        if any(one not in text for one in choices):
            text += f" One of {', '.join(f'`{one}`' for one in choices)}."
        rows.append([", ".join(names), _default(parameter), text])
    return markdown_table(["option", "default", ""], rows) if rows else "It takes no options."


def _choices(annotation: Any) -> list[str]:
    """The values that a type has, if they can be counted: of an enumeration, or of literals."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(one.value) for one in annotation]
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    return [one for inner in get_args(annotation) for one in _choices(inner)]


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or callable(value) or value in ((), []):
        return ""
    values = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(f"`{one.value if isinstance(one, Enum) else one}`" for one in values)


def _flags() -> str:
    rows = [["`MODEL`", "required", "checkpoint folder or hub id"]]
    rows += [[f"`{f.option}`", "" if f.default is None else f"`{f.default}`", _cell(f.help)] for f in flags()]
    return markdown_table(["flag", "default", ""], rows)


# Keys of YAML files


def keys_page() -> str:
    """Every key of a file that is written by hand."""
    limits = markdown_table(["key", "default", ""], [*_fields(Limits)])
    sampling = markdown_table(["key", "default", ""], [*_fields(Sampling)])
    parts = [
        "# Keys of files\n\nEvery key of a YAML or JSON file that you write, read from its schema. An unknown key is "
        "an error that names the key that was probably meant.",
        f"## Training run\n\n`vilavt sft FILE.yaml` ([how](../sft.md)); `section.key=value` on the command line.\n\n"
        f"{_keys(SftConfig)}",
        f"Recipes that come with the package:\n\n{_recipes(SFT_RECIPES)}",
        f"## Data sets\n\nThe file that `data.registry` names ([how](../data.md#registry)). Of the file:\n\n"
        f"{_keys(Registry)}\n\nOf each entry of `datasets`:\n\n{_keys(DataSource)}",
        f"## Training records\n\nOne record a line ([how](../data.md)). Published:\n\n{_keys(PublishedRecord)}\n\n"
        f"Episode:\n\n{_keys(EpisodeRecord)}\n\nA turn of an episode:\n\n{_keys(EpisodeTurn)}",
        f"## Limits and sampling\n\nFields of `limits` and `sampling` wherever a file or a command takes them.\n\n"
        f"{limits}\n\n{sampling}",
        f"## Evaluation preset\n\n`vilavt eval --preset FILE.yaml` ([how](../evaluation.md#presets)).\n\n"
        f"{_keys(EvaluationPreset)}",
        f"## Benchmark\n\n`vilavt eval FILE.yaml`, `vilavt score --benchmark FILE.yaml` "
        f"([how](../scoring.md#benchmarks)). `base` names a benchmark that the file starts from.\n\n{_keys(Benchmark)}",
        "## GRPO\n\nWhat verl reads is the recipe; keys that it does not list are verl's "
        "([how](../verl.md)). The agent loop's own file:\n\n"
        "::: vilavt_rl.verl.agent_loop.VilavtAgentLoop\n    options: {heading_level: 3, members: []}\n\n"
        "::: vilavt_rl.rewards.RewardSettings\n    options: {heading_level: 3}\n\n"
        "The block `vilavt` of an EasyR1 configuration ([how](../easyr1.md)):\n\n"
        f"::: vilavt_rl.easyr1.block.Settings\n    options: {{heading_level: 3, members: []}}\n\n"
        f"{_recipes(RECIPES)}",
        f"## VLMEvalKit and lmms-eval\n\nIn a `--config` file, or `{PREFIX}KEY` in the environment "
        f"([how](../packages/vilavt_vlmeval.md#settings)).\n\n{_keys(AdapterSettings)}",
    ]
    return "\n\n".join(parts) + "\n"


def _keys(schema: type[BaseModel]) -> str:
    rows = [
        [f"`{key}`", default if default == "required" else f"`{default}`", _cell(text)]
        for key, default, text in describe(schema)
    ]
    return markdown_table(["key", "default", ""], rows)


def _fields(settings: type) -> Iterator[list[str]]:
    for f in fields(settings):
        default = "required" if f.default is MISSING else f"`{f.default}`"
        yield [f"`{f.name}`", default, _cell(f.metadata["help"])]


def _recipes(folder: Path) -> str:
    """Folded, each under its name."""
    return "\n\n".join(
        f'??? example "{name}"\n\n' + textwrap.indent(f"```yaml\n{recipe_text(name, folder).rstrip()}\n```", "    ")
        for name in recipe_names(folder)
    )


# Server


def server_page() -> str:
    """The routes of `vilavt-serve` that are ours."""
    shapes: dict[str, Any] = {}
    parts_of: dict[str, Any] = {}
    for path, dialect in DIALECTS.items():
        shapes[f"POST {path}"] = schema = dialect.request.model_json_schema()
        parts_of |= schema.get("$defs", {})
    parts = [
        "# Server API\n\nThe routes of `vilavt-serve` that are ours, as [OpenAPI](openapi.json). What a response "
        "holds, which fields of the protocols are refused and which are ignored, and vLLM's own routes: "
        "[vilavt-vllm](../packages/vilavt_vllm.md#serve). A running server has all its routes at `/docs`."
    ]
    for name, one in {**shapes, **parts_of}.items():
        required = one.get("required", ())
        rows = [
            [f"`{key}`", _kind(value), "required" if key in required else "", _cell(value.get("description", ""))]
            for key, value in one.get("properties", {}).items()
        ]
        parts.append(
            f"## {name}\n\n{_paragraphs(one.get('description', ''))}\n\n"
            + markdown_table(["field", "type", "", ""], rows)
        )
    parts.append(
        f"## GET /v1{SETTINGS_PATH}\n\nWhat answers depend on besides the question: model, preset, limits, sampling, "
        "prompts, seed, fingerprint, versions, and the checkpoint's note for people."
    )
    return "\n\n".join(parts) + "\n"


def openapi() -> dict[str, Any]:
    """The routes as an OpenAPI document."""
    errors = {
        "400": {"description": "the request cannot be honoured; the message names the field and the remedy"},
        "401": {"description": "the server has a key and the request has none, or another"},
        "503": {"description": "the server is full or is being stopped; Retry-After says when to ask again"},
    }
    ok = {"description": "an answer of the protocol with the field `vilavt`; server-sent events if `stream` is true"}
    parts: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, dialect in DIALECTS.items():
        name = dialect.request.__name__
        schema = dialect.request.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= schema.pop("$defs", {}) | {name: schema}
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        asked = {
            "summary": "Answer a question about images",
            "requestBody": {"required": True, "content": body},
            "responses": {"200": ok, **errors},
        }
        paths[path] = {"post": asked}
    settings = {
        "summary": "Tell what answers depend on",
        "responses": {"200": {"description": "model, provenance, note"}, "401": errors["401"]},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "vilavt-serve", "version": version("vilavt-vllm")},
        "paths": {**paths, f"/v1{SETTINGS_PATH}": {"get": settings}},
        "components": {
            "schemas": parts,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _kind(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return value["$ref"].rpartition("/")[2]
    for several in ("anyOf", "oneOf"):
        if several in value:
            kinds = [kind for one in value[several] if (kind := _kind(one)) not in ("", "null")]
            return " or ".join(dict.fromkeys(kinds))
    if value.get("type") == "array":
        return f"list of {_kind(value.get('items', {})) or 'anything'}"
    return str(value.get("type", ""))


# Python


def python_page(package: str) -> str:
    """The public names of a package, for mkdocstrings."""
    parts = [f"# {package}\n\nWhat each module is for: [architecture](../../architecture.md#{package}).\n"]
    parts += [f"## {package}.{module}\n\n::: {package}.{module}\n" for module in PYTHON[package].split()]
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _paragraphs(text: str) -> str:
    return text.strip().replace("\b", "").replace("\f", "").replace("<", "&lt;")


def main(folder: Path) -> None:
    """Write all pages."""
    for name, text in pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
