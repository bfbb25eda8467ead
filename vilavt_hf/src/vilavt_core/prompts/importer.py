"""Read a prompt set out of a user's own checkout of the published system.

The released checkpoint was trained on that wording, and it is not ours to ship. The files are parsed with
`ast`, never executed or imported. Constants are recognised by the names the published files use, and otherwise
by what they must contain.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PromptError
from . import PromptSet

KNOWN_FILES = (
    "verl/utils/dataset_multimodal.py",
    "verl/utils/vilavt_utils.py",
    "vllm_eval/infer_vilavt_vllm.py",
    "vllm_eval/utils.py",
    "eval/utils.py",
    "eval/vilavt_rl.py",
    "VLMEvalKit/vlmeval/vlm/vilavt/utils.py",
)
"""Where the published repository keeps its prompts. If none exists, every Python file of the checkout is looked at."""
TOOLKIT_FOLDER = "VLMEvalKit"
"""Files below it hold the toolkit's own question block, which becomes ``user_reduced``."""
MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_FILES = 5000

_NAMES = {
    "system": ("REASONING_SYSTEM_PROMPT", "REASONING_SYS_PROMPT", "SYSTEM_PROMPT"),
    "original": ("IMAGE_INDEX_PROMPT",),
    "original_sized": ("IMAGE_INDEX_PROMPT_V1",),
    "crop": ("IMAGE_INDEX_PROMPT_V2",),
    "images_one": ("IMAGE_QUESTION_PROMPT",),
    "images_many": ("VIDEO_QUESTION_PROMPT",),
    "images_many_unsized": ("MULTI_IMAGE_QUESTION_PROMPT",),
    "user": ("USER_PROMPT",),
    "continue": ("RESPONSE_PROMPT",),
    "final": ("RESPONSE_PROMPT_FINAL",),
    "fallback_system": ("SIMPLE_SYS_PROMPT",),
    "fallback_user": ("generate_prompt_simple_qa",),
    "user_raw": ("_prepare_content_multi_image",),
}
_FIELDS = {
    "index": "index",
    "current_image_idx": "index",
    "image_idx": "index",
    "idx": "index",
    "width": "width",
    "height": "height",
    "n_frames": "count",
    "n_images": "count",
    "n_frames_1": "last",
    "n_images_1": "last",
    "question": "question",
    "user_question": "question",
    "image_instruction": "images",
}
_REQUIRED = ("system", "original", "crop", "images_one", "images_many", "user", "continue", "final")
_OURS = ("bad_call", "no_action", "images_full", "follow_up", "user_no_zoom")
"""What the published system does not have, or whose text depends on its internals: taken from the built-in set."""


@dataclass(frozen=True)
class Candidate:
    """One text found in the checkout. ``template`` is the text in our notation."""

    name: str
    file: str
    line: int
    template: str
    fields: frozenset[str]
    formatted: bool

    @property
    def place(self) -> str:
        """``NAME (file:line)``."""
        return f"{self.name} ({self.file}:{self.line})"


@dataclass(frozen=True)
class ImportReport:
    """Where each template came from."""

    prompts: PromptSet
    found: dict[str, Candidate]
    from_default: tuple[str, ...]
    """Templates taken from the built-in set."""
    guessed: tuple[str, ...] = field(default=())
    """Templates recognised by content, not by name."""
    skipped_files: tuple[str, ...] = ()
    """Files that could not be parsed."""

    def lines(self) -> list[str]:
        """The report as text."""
        rows = [
            f"{name:20} {c.place}{' (recognised by content)' if name in self.guessed else ''}"
            for name, c in self.found.items()
        ]
        rows += [f"{name:20} built-in wording; not part of the checkout" for name in self.from_default]
        return rows + [f"not parsed: {name}" for name in self.skipped_files]


def import_prompts(checkout: str | Path, name: str = "imported") -> ImportReport:
    """Build a prompt set from a checkout of the published repository.

    Args:
        checkout: root folder of the checkout.
        name: name of the new set.

    Raises:
        PromptError: no such folder, no prompt found, a needed one missing, or two different texts under one name;
            lists the candidates.
    """
    root = Path(checkout)
    if not root.is_dir():
        raise PromptError(f"{root}: no such folder; give the root of a checkout")
    files = [root / name for name in KNOWN_FILES if (root / name).is_file()]
    if not files:
        files = sorted(path for path in root.rglob("*.py") if path.is_file())[:MAX_FILES]
    trees, skipped = {}, []
    for path in files:
        relative = path.relative_to(root).as_posix()
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
            trees[relative] = ast.parse(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            skipped.append(f"{relative}: {type(error).__name__}: {error}")
    formatted = {node.func.value.id for tree in trees.values() for node in ast.walk(tree) if _is_format_call(node)}  # type: ignore[attr-defined]
    candidates = [c for relative, tree in trees.items() for c in _candidates(relative, tree, formatted)]
    if not candidates:
        raise PromptError(
            f"{root}: no prompt texts in {len(files)} Python files; give the root of a checkout of the published "
            "repository"
        )
    found, guessed = {}, []
    for template in _NAMES:
        choice, by_name = _choose(template, candidates)
        if choice is not None:
            found[template] = choice
            if not by_name:
                guessed.append(template)
    toolkit = [c for c in candidates if c.name in _NAMES["user"] and c.file.startswith(TOOLKIT_FOLDER)]
    if toolkit:
        found["user_reduced"] = _only("user_reduced", toolkit)
    missing = [template for template in _REQUIRED if template not in found]
    if missing:
        listed = "; ".join(sorted({c.place for c in candidates}))
        expected = ", ".join(f"{t} (as {' or '.join(_NAMES[t])})" for t in missing)
        raise PromptError(f"{root}: cannot tell which text is {expected}; texts found: {listed}")
    default = PromptSet.load("default")
    texts = {template: _assemble(template, c.template) for template, c in found.items()}
    ours = [t for t in (*_OURS, "fallback_system", "fallback_user") if t not in texts]
    texts |= {t: default.templates[t] for t in ours}
    return ImportReport(PromptSet(name, texts), found, tuple(ours), tuple(guessed), tuple(skipped))


def _assemble(template: str, text: str) -> str:
    """In the published layout an image stands before its index line, and the bare question before the
    several-image block."""
    if template in ("original", "original_sized", "crop"):
        return "${image}" + text
    return "${question}" + text if template == "user_raw" else text


def _choose(template: str, candidates: list[Candidate]) -> tuple[Candidate | None, bool]:
    main = [c for c in candidates if not (c.file.startswith(TOOLKIT_FOLDER) and template == "user")]
    named = [c for c in main if c.name in _NAMES[template]]
    if named:
        return _only(template, named), True
    known = {name for names in _NAMES.values() for name in names}
    alike = [c for c in main if c.name not in known and _looks_like(template, c)]
    return (_only(template, alike), False) if alike else (None, False)


def _only(template: str, candidates: list[Candidate]) -> Candidate:
    if len({c.template for c in candidates}) > 1:
        listed = "; ".join(c.place for c in candidates)
        raise PromptError(
            f"{template}: {len({c.template for c in candidates})} different texts, one is needed: {listed}"
        )
    return candidates[0]


def _looks_like(template: str, c: Candidate) -> bool:
    tool, answer, fields = "<tool>" in c.template, "<answer>" in c.template, c.fields
    return {
        "system": tool and not answer and not fields,
        "original": fields == {"index"},
        "images_one": fields == {"width", "height"},
        "images_many": fields == {"count", "last", "width", "height"},
        "images_many_unsized": fields == {"count", "last"},
        "user": tool and answer and "question" in fields,
        "continue": tool and answer and not fields,
        "final": answer and not tool and not fields,
    }.get(template, False)


def _is_format_call(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "format"
        and isinstance(node.func.value, ast.Name)
    )


def _candidates(file: str, tree: ast.Module, formatted: set[str]) -> Iterator[Candidate]:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        text = _text_of(node.value) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None else None
        for target in targets:
            if text is not None and isinstance(target, ast.Name):
                yield from _constant(target.id, file, node.lineno, text, formatted)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in _NAMES["fallback_user"]:
            yield from _question_of(function, file)
        elif isinstance(function, ast.FunctionDef) and function.name in _NAMES["user_raw"]:
            yield from _block_of(function, file)


def _constant(name: str, file: str, line: int, text: str, formatted: set[str]) -> Iterator[Candidate]:
    """A text that is ``.format``-ted somewhere has fields and escaped braces; one that is not is taken literally,
    doubled braces too."""
    fields = _format_fields(text)
    if fields is not None and (name in formatted or (fields and fields <= set(_FIELDS))):
        if unknown := sorted(fields - set(_FIELDS)):
            if all(name not in names for names in _NAMES.values()):
                return
            raise PromptError(f"{name} ({file}:{line}): fields {unknown} are not known; known are {sorted(_FIELDS)}")
        yield Candidate(name, file, line, _translate(text), frozenset(_FIELDS[f] for f in fields), True)
    elif fields is not None or "<" in text:
        yield Candidate(name, file, line, text.replace("$", "$$"), frozenset(), False)


def _question_of(function: ast.FunctionDef, file: str) -> Iterator[Candidate]:
    """The f-string of the simple question function; its only value is the question."""
    for node in ast.walk(function):
        if not isinstance(node, ast.JoinedStr):
            continue
        names = {
            v.value.id if isinstance(v.value, ast.Name) else ""
            for v in node.values
            if isinstance(v, ast.FormattedValue)
        }
        if names and all(_FIELDS.get(n) == "question" for n in names):
            pieces = [
                str(v.value).replace("$", "$$") if isinstance(v, ast.Constant) else "${question}" for v in node.values
            ]
            yield Candidate(function.name, file, node.lineno, "".join(pieces), frozenset({"question"}), True)
            return


def _block_of(function: ast.FunctionDef, file: str) -> Iterator[Candidate]:
    """The one long text with both tags inside the function; never formatted."""
    docstring = ast.get_docstring(function, clean=False)
    for node in ast.walk(function):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != docstring:
            text = node.value
            if "<tool>" in text and "<answer>" in text:
                yield Candidate(function.name, file, node.lineno, text.replace("$", "$$"), frozenset(), False)


def _text_of(node: ast.expr) -> str | None:
    """The value of a string expression made of constants, ``+`` and argument-free ``strip`` calls; None for
    anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text_of(node.left), _text_of(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
        text = _text_of(node.func.value)
        methods = {"strip": str.strip, "lstrip": str.lstrip, "rstrip": str.rstrip}
        return None if text is None or node.func.attr not in methods else methods[node.func.attr](text)
    return None


def _format_fields(text: str) -> set[str] | None:
    """Names of the ``{}`` fields, or None if the text is no valid format string."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError:
        return None


def _translate(text: str) -> str:
    """A ``str.format`` text in our notation: ``{field}`` becomes ``${name}``, doubled braces become single."""
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(text):
        pieces.append(literal.replace("$", "$$"))
        if name is not None:
            pieces.append("${" + _FIELDS[name] + "}")
    return "".join(pieces)


__all__ = ["KNOWN_FILES", "Candidate", "ImportReport", "import_prompts"]
