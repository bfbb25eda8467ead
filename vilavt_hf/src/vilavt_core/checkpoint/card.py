"""The model card of a checkpoint: what it was made of and how, out of its ``provenance.json``; scores and commands.

The hub shows a folder's ``README.md``. What is ours in it stands between two comments, and is written anew whenever the
checkpoint is; what people wrote around it stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, VilavtError
from ..failures import printable, quoted_error
from ..json_text import parse_json
from ..markdown import markdown_table, plain
from ..outputs import whole_file
from ..pages import render_text
from ..settings import SETTINGS, describe_preset, is_hub_id, preset_of
from .build_info import PROVENANCE, fingerprint, public_name
from .layout import ADAPTER_CONFIG

CARD = "README.md"
BEGIN, END = "<!-- vilavt: how this checkpoint was made -->", "<!-- vilavt: end -->"
UNKNOWN = "not recorded"
_KINDS = {
    "convert": "checkpoint, converted",
    "init": "checkpoint, not trained yet",
    "merge": "checkpoint, after reinforcement learning",
    "merge-lora": "checkpoint, an adapter merged into it",
    "sft": "checkpoint, fine-tuned",
}
_FIGURES = {"loss": "loss", "tokens_right": "tokens right", "answers_right": "answers right"}
"""What a validation of `vilavt sft` measures, and its name on the card."""


@dataclass(frozen=True)
class Score:
    """One line of the card's table of scores."""

    benchmark: str
    measure: str
    value: str
    questions: int | None
    """How many; None: not counted."""
    command: str
    """That made it."""


def write_card(folder: str | os.PathLike, scores: Sequence[Score] = ()) -> Path:
    """Write a checkpoint's ``README.md``, or bring our part of the one that is there up to date.

    Args:
        folder: a checkpoint or an adapter, with its ``provenance.json``.
        scores: measured elsewhere; those of a run's own validation are in its provenance.

    Raises:
        CheckpointError: the provenance, or a README that is there, cannot be read.
    """
    path = Path(folder) / CARD
    text = card_text(folder, scores)
    with whole_file(path) as file:
        file.write(text.encode())
    return path


def card_text(folder: str | os.PathLike, scores: Sequence[Score] = ()) -> str:
    """What `write_card` would write."""
    folder = Path(folder)
    new = _generated(folder, scores)
    try:
        old = (folder / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return new
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CARD}: cannot be read: {quoted_error(error)}; put it right, or take it away"
        ) from None
    ours = new[new.index(BEGIN) :].rstrip("\n")
    if BEGIN not in old:  # of people, or of another program
        return f"{old.rstrip()}\n\n{ours}\n"
    before, _, rest = old.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise CheckpointError(f"{folder / CARD} has {BEGIN} but no {END} after it; put one of them right")
    written = re.sub(r"\A---\n.*?\n---\n", "", before, flags=re.DOTALL).strip()  # by people, above our part
    head = before.rstrip() if written else new[: new.index(BEGIN)].rstrip()
    return f"{head}\n\n{ours}{after.rstrip()}\n"


def scores_of_report(path: str | os.PathLike) -> list[Score]:
    """The scores in a ``scores.json`` that ``vilavt score --out`` wrote: of each setting the first figure.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        report = parse_json(Path(path).read_text(encoding="utf-8-sig"))
        command = public_command(str(report["command"]))
        return [
            Score(
                benchmark=str(setting["benchmark"] or "no benchmark named"),
                measure=f"{setting['scorer']}, %",
                value=f"{100 * setting['figures'][0]['score']:.2f}",
                questions=int(setting["figures"][0]["questions"]),
                command=command,
            )
            for setting in report["settings"]
        ]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no scores.json with the command that made it ({quoted_error(error)}); write one with "
            "`vilavt score RESULTS --out FOLDER`"
        ) from None


def public_command(command: str) -> str:
    """A command line as others may read it: in one line, absolute paths shortened to their last name."""
    line = printable(command).replace("<!--", "<! --")  # it must not end our part of the card
    return re.sub(r"(?<![\w.~:/])~?/(?:[^\s'\"=/]+/)*([^\s'\"=/]*)", lambda path: path[1] or "/", line)


def _generated(folder: Path, scores: Sequence[Score]) -> str:
    steps = list(_steps(folder))
    details = _details(steps[0])
    adapter = (folder / ADAPTER_CONFIG).is_file()
    kind = "adapter (LoRA)" if adapter else _KINDS.get(str(details.get("made_by")), "checkpoint")
    base = next((name for step in steps if (name := _base(step))), None)
    facts = {
        "base": plain(printable(public_name(base))) if base else UNKNOWN,
        "data": plain(", ".join(_data(steps)) or UNKNOWN),
        "preset": plain(_preset(folder)),
    }
    if not adapter:
        facts["fingerprint"] = f"`{fingerprint(folder)}`"
    for name in ("step", "epoch"):
        if isinstance(details.get(name), int | float):
            facts[name] = f"{details[name]:g}"
    rows = [*_validation(steps[0]), *scores]
    table = [
        (
            plain(printable(row.benchmark)),
            plain(row.measure),
            row.value,
            "" if row.questions is None else f"{row.questions:,}",
        )
        for row in rows
    ]
    return render_text(
        "model_card.md",
        library="peft" if adapter else "transformers",
        base_model=base if base and is_hub_id(base) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
        begin=BEGIN,
        end=END,
        kind=kind,
        adapter=adapter,
        facts=markdown_table(("", ""), list(facts.items())),
        steps=[_shown(step) for step in reversed(steps)],
        scores=markdown_table(("benchmark", "measure", "score", "questions"), table) if rows else "",
        score_commands=list(dict.fromkeys(score.command for score in rows)),
    )


def _steps(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The provenance of a checkpoint, and of what it was made from as far as it is recorded, newest first."""
    path = folder / PROVENANCE
    try:
        step = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {quoted_error(error)}; a model card is made of it: `vilavt convert`, `init`, "
            "`sft` and `vilavt-rl merge` write one"
        ) from None
    if not isinstance(step, Mapping):
        raise CheckpointError(f"{path} is not a JSON object; a model card is made of it")
    while isinstance(step, Mapping):
        yield step
        step = _details(step).get("source_provenance")


def _details(step: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a step says of itself; nothing, if that is in no shape that we write."""
    found = step.get("details")
    return found if isinstance(found, Mapping) else {}


def _configured(step: Mapping[str, Any], section: str, key: str) -> Any:
    """A value of the configuration of a run of `vilavt sft`; None: it is another kind of step."""
    config = _details(step).get("config")
    values = config.get(section) if isinstance(config, Mapping) else None
    return values.get(key) if isinstance(values, Mapping) else None


def _base(step: Mapping[str, Any]) -> str | None:
    details = _details(step)
    found = details.get("base") or (details.get("source") if details.get("made_by") == "convert" else None)
    return found if isinstance(found, str) and found else None


def _data(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Data sets that any of the steps was trained on."""
    for step in steps:
        used = _configured(step, "data", "use") or _details(step).get("data")
        if isinstance(used, list):
            yield from (printable(public_name(str(name))) for name in used)


def _preset(folder: Path) -> str:
    try:
        return describe_preset(preset_of(folder)).removeprefix("preset ")
    except VilavtError:  # whoever runs it is told what is wrong with the file
        return f"{SETTINGS} cannot be read"


def _validation(step: Mapping[str, Any]) -> list[Score]:
    """What the run that made it has measured on its own validation data."""
    found = _details(step).get("validation")
    if not isinstance(found, Mapping):
        return []
    questions = found.get("questions")
    command = public_command(str(step.get("command") or UNKNOWN))
    return [
        Score(
            "the run's validation data",
            name,
            f"{found[key]:g}",
            questions if key == "answers_right" and isinstance(questions, int) else None,
            command,
        )
        for key, name in _FIGURES.items()
        if isinstance(found.get(key), int | float)
    ]


def _shown(step: Mapping[str, Any]) -> dict[str, str]:
    packages = step.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    deciding = [name for name in ("vilavt-hf", "torch", "transformers") if name in packages]
    versions = ", ".join(f"{name} {packages[name]}" for name in deciding)
    return {
        "made_by": printable(str(_details(step).get("made_by", UNKNOWN))).replace("`", "'"),
        "created": plain(printable(str(step.get("created", UNKNOWN)))),
        "versions": plain(printable(versions or UNKNOWN)),
        "command": public_command(str(step.get("command") or UNKNOWN)),
    }
