"""What people read says the words of docs/writing.md: help texts, messages, docstrings, comments and pages. Words that
nothing is named after are in docs/words.txt, which codespell reads.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = {
    "image": r"pictures?",
    "published, or say whose": r"theirs|upstream(?! checkout| projects)",
    "crop": r"zoomed images?",
    "call": r"requests? for a zoom",
    "resist": r"talked into",
    "precedence, highest first": r"what holds when",
}
"""What to write -> instead of what, as a pattern."""
WORDS = re.compile("|".join(rf"\b({pattern})\b" for pattern in BANNED.values()), re.IGNORECASE)
INSTEAD = tuple(BANNED)  # of each group
PAGES = (
    "*.md",
    "docs/*.md",
    "vilavt_*/README.md",
    "deploy/*.[jmy]*",
    "vilavt_*/src/**/*.html",
    "vilavt_*/src/**/*.yaml",
)
CODE = ("*.py", "benchmarks/*.py", "docs/*.py", "tools/*.py", "vilavt_*/src/**/*.py", "vilavt_*/src/**/*.js")
APART = {
    "docs/writing.md": "it lists these words",
    "docs/tiny.md": "questions of the tiny model's tasks, in the words that it was trained with",
    "vilavt_hf/src/vilavt_hf/tiny": "those tasks",
    "vilavt_rl/src/vilavt_rl/tiny.py": "those tasks",
}
NAMES = re.compile(
    r"``[^`]+``|`[^`]+`"  # code
    r"|<[^<>]*?>(?=.)"  # tags; their titles are found by `TITLE`
    r"|\{%.*?%\}|\{\{.*?\}\}"  # templates
    r"|--[\w-]+"  # options
    r"|(?<![\w.-])[\w.-]*/[\w./-]*"  # paths
    r"|\b(?:[^\W_]+[.=(]\w[\w.]*|[^\W_]*_\w*)"  # Python
    r"|^[ \t]+\w+: ",  # arguments of a docstring
    re.MULTILINE,
)
TITLE = re.compile(r'(?:title|alt|aria-label|placeholder)="([^"]*)"')


def without_names(text: str) -> str:
    """A text less the names in it, which stay as they are; lines are kept."""
    titles = " ".join(TITLE.findall(text))
    return NAMES.sub(lambda found: "\n" * found[0].count("\n"), text) + titles


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """What a file says to people, and the line of each."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            # of one word: a key, not a sentence
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\s", node.value):
                yield node.lineno, node.value
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    elif path.suffix == ".js":
        yield 1, "\n".join(line.partition("//")[2] for line in source.splitlines())
    else:
        code = False
        for number, line in enumerate(source.splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            # of code in a page what it says beside: comments
            yield number, line.partition("# ")[2] if code else line


def found(path: Path) -> list[str]:
    """Each place where a file says a word that it should not."""
    if not WORDS.search(path.read_text(encoding="utf-8")):  # most files
        return []
    return [
        f"{path}:{number}: {match[0]!r} of {text.strip()[:80]!r}; write: {INSTEAD[match.lastindex - 1]}"
        for number, text in prose(path)
        for match in WORDS.finditer(without_names(text))
    ]


def files() -> Iterator[Path]:
    for pattern in PAGES + CODE:
        for path in ROOT.glob(pattern):
            name = path.relative_to(ROOT).as_posix()
            if not any(name == apart or name.startswith(f"{apart}/") for apart in APART):
                yield path


def test_the_words_of_the_guide_are_used():
    wrong = [line for path in files() for line in found(path)]
    assert not wrong, "\n".join(wrong)


def test_what_is_apart_is_there():
    assert [name for name in APART if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.py", 'raise E(f"{path}: the picture is {x}")', [1]),
        ("a.py", 'def f():\n    """Draw.\n\n    Args:\n        one: a picture.\n    """', [2]),
        ("a.py", "x = 1  # Theirs is two", [1]),
        ("a.py", 'app.command(help="Show " "Pictures of it")', [1]),
        ("a.py", 'picture = {"picture": f"{picture}.png", "a": "see --picture, `picture` or pictures/a.png"}', []),
        ("a.py", 'def f(picture):\n    """Draw.\n\n    Args:\n        picture: an image.\n    """', []),
        ("a.html", '<p title="a picture">{{ picture }}</p>', [1]),
        ("a.html", "<p>{{ x }} pictures</p>", [1]),
        ("a.html", '<p class="picture">{% if picture %}{{ picture }}{% endif %}</p>', []),
        ("a.md", "Text.\n\nOf a picture and an upstream checkout.", [3]),
        ("a.md", "```python\npicture = f(picture)  # their picture\n```", [2]),
        ("a.yaml", "title: many pictures\nfolder: pictures/one", [1]),
    ],
)
def test_sentences_are_read_and_names_are_not(tmp_path, name, text, lines):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [int(line.split(":")[1]) for line in found(tmp_path / name)] == lines
