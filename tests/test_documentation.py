"""Every page of the documentation is in the navigation, every link and anchor leads somewhere, the reference has every
command and key, and the figures of the method are drawn from this code. Needs no mkdocs; `nox -s docs` builds the site.
"""

import json
import re
import runpy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from markdown_it.token import Token
from page_examples import PAGES, ROOT, tokens

from vilavt_core.cli import SUBCOMMANDS
from vilavt_core.sft_config import describe

DOCS = ROOT / "docs"
HOOKS = runpy.run_path(str(DOCS / "site_hooks.py"))
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """The pages that are made from the code."""
    return runpy.run_path(str(DOCS / "make_reference.py"))["pages"]()


def leaves(nav: list | dict | str) -> Iterator[str]:
    """Pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for one in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(one)


def test_every_page_is_in_the_navigation_once(reference):
    listed = list(leaves(CONFIG["nav"]))
    made = [place for place in reference if place.endswith(".md")]
    pages = [*(path.name for path in DOCS.glob("*.md")), *HOOKS["PLACES"].values(), *made]
    assert sorted(listed) == sorted(pages), "name new pages in mkdocs.yml, and drop those that are gone"


def inline(page: Path) -> Iterator[Token]:
    """Links, images and text of a page, in order."""
    for token in tokens(page):
        yield token
        yield from token.children or ()


def anchors(page: Path) -> set[str]:
    """Of the titles of a page, as GitHub makes them."""
    found: list[str] = []
    every = tokens(page)
    for opened, title in pairwise(every):
        if opened.type == "heading_open":
            text = "".join(part.content for part in title.children or () if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_anchor_of_a_page_resolves(page):
    targets = [token.attrs.get("href") or token.attrs.get("src") for token in inline(page) if token.attrs]
    broken = []
    for target in (str(one) for one in targets if one):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_a_link_of_the_repository_is_turned_into_one_of_the_site():
    text = "[a](../vilavt_vllm/README.md#serve) [b](chat.md) [c](../deploy/nginx.conf) [d](https://x.org/y) [e](#here)"
    assert HOOKS["rewritten"]("docs/deploy.md", text) == (
        "[a](packages/vilavt_vllm.md#serve) [b](chat.md) [c](files/deploy/nginx.conf) [d](https://x.org/y) [e](#here)"
    )
    assert HOOKS["rewritten"]("SECURITY.md", "[a](docs/chat.md)") == "[a](../chat.md)"
    folder = HOOKS["rewritten"]("docs/scoring.md", "[a](../vilavt_hf/src/vilavt_eval/benchmarks)")
    assert folder == "[a](files/vilavt_hf/src/vilavt_eval/benchmarks/index.md)"


def test_the_reference_has_every_command_option_and_key(reference):
    commands, keys = reference["reference/commands.md"], reference["reference/keys.md"]
    for name in SUBCOMMANDS:
        assert f"## vilavt {name}" in commands
    for named in ("## vilavt tiny build", "## vilavt-rl merge", "## vilavt-serve", "`--max-turns`", "`--set`"):
        assert named in commands
    for key, _, _ in describe():
        assert f"| `{key}` |" in keys
    for key in ("types.NAME.metric", "datasets[].name", "limits", "max_inquiry_pixels"):
        assert f"| `{key}` |" in keys
    for named in ("vilavt_rl.rewards.RewardSettings", 'example "vilavt_tiny_sft"', 'example "agent_loop"'):
        assert named in keys


def test_the_reference_names_modules_that_exist(reference):
    for page in (text for place, text in reference.items() if place.startswith("reference/python/")):
        for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE):
            path = name.replace(".", "/")
            assert [*ROOT.glob(f"vilavt_*/src/{path}.py"), *ROOT.glob(f"vilavt_*/src/{path}/__init__.py")], name


def test_the_server_is_described_as_openapi(reference):
    document = json.loads(reference["reference/openapi.json"])
    schemas = document["components"]["schemas"]
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["$ref"].removeprefix("#/components/schemas/") in schemas
    named = set(re.findall(r'"#/components/schemas/(\w+)"', reference["reference/openapi.json"]))
    assert named <= set(schemas)
    assert {"messages", "temperature", "vilavt"} <= set(schemas["ChatRequest"]["properties"])
    assert {"input", "instructions", "vilavt"} <= set(schemas["ResponsesRequest"]["properties"])
    assert {"messages", "system", "max_tokens", "vilavt"} <= set(schemas["MessagesRequest"]["properties"])


def test_the_figures_of_the_method_are_drawn_from_this_code():
    for name, draw in runpy.run_path(str(DOCS / "make_method_figures.py"))["FIGURES"].items():
        assert (DOCS / name).read_text(encoding="utf-8") == draw(), "run python docs/make_method_figures.py"


def test_docstrings_have_no_roles_of_sphinx():
    """The site shows them as Markdown."""
    role = re.compile(r":(?:mod|class|func|meth|attr|data|exc|obj):`")
    sources = [path for path in ROOT.glob("vilavt_*/src/**/*.py") if role.search(path.read_text(encoding="utf-8"))]
    assert sources == []
