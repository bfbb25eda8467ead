"""Hooks of mkdocs: add the pages that `make_reference` makes and those that stand elsewhere in the repository, and turn
links to files of the repository into links of the site. On GitHub the same links work as they are.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
PLACES = {
    "vilavt_hf/README.md": "packages/vilavt_hf.md",
    "vilavt_vllm/README.md": "packages/vilavt_vllm.md",
    "vilavt_rl/README.md": "packages/vilavt_rl.md",
    "vilavt_vlmeval/README.md": "packages/vilavt_vlmeval.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
}
"""Pages of the repository outside docs/ -> where they are on the site."""
FILES = "files"
"""Folder of the site with the other files that pages link to, as they are."""
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
NAMED = re.compile(r"`docs/(\w+\.md)`")
"""How the packages' own pages name one of ours: they go to a package index, where a relative link leads nowhere."""


def site_place(path: str) -> str:
    """Where a file of the repository is on the site, from its path in the repository."""
    if path in PLACES:
        return PLACES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{FILES}/{path}"


def targets(page: str, text: str) -> set[str]:
    """Paths in the repository of the files that a page links to."""
    found = {_target(page, link) for _, link, _ in LINK.findall(text)}
    return {one for one in found if one is not None}


def _target(page: str, link: str) -> str | None:
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    return target if (ROOT / target).exists() else None


def rewritten(page: str, text: str) -> str:
    """A page's text with links that lead where its targets are on the site."""
    here = posixpath.dirname(site_place(page))

    def link(match: re.Match[str]) -> str:
        target = _target(page, match[2])
        if target is None:
            return match[0]
        _, mark, anchor = match[2].partition("#")
        place = site_place(target) + ("/index.md" if (ROOT / target).is_dir() else "")
        return f"{match[1]}{posixpath.relpath(place, here or '.')}{mark}{anchor}{match[3]}"

    return LINK.sub(link, text)


def listing(folder: str) -> str:
    """A page for a folder of the repository: its files."""
    names = sorted(path.name for path in (ROOT / folder).iterdir() if path.is_file())
    return "\n".join([f"# {folder}\n", *(f"- [{name}]({name})" for name in names)])


# What mkdocs calls


def on_config(config: Any) -> Any:
    """Make anchors of titles as GitHub does, so that a link to one works in both places."""
    from pymdownx.slugs import slugify

    config["mdx_configs"].setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files that are not in docs/."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(Path(__file__).parent))
    import make_reference

    for place, text in make_reference.pages().items():
        files.append(File.generated(config, place, content=text))
    for path, place in PLACES.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    pages = {f"docs/{file.src_uri}": file.content_string for file in files if file.src_uri.endswith(".md")}
    pages |= {path: (ROOT / path).read_text(encoding="utf-8") for path in PLACES}
    linked = {target for page, text in pages.items() for target in targets(page, text)}
    for target in sorted(linked):
        place = site_place(target)
        if not place.startswith(f"{FILES}/"):
            continue
        if (ROOT / target).is_dir():
            files.append(File.generated(config, f"{place}/index.md", content=listing(target)))
            inside = [path for path in sorted((ROOT / target).iterdir()) if path.is_file()]
        else:
            inside = [ROOT / target]
        for path in inside:
            name = f"{FILES}/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    place = page.file.src_uri
    if place.startswith(("reference/", f"{FILES}/")):
        return markdown
    path = next((path for path, one in PLACES.items() if one == place), f"docs/{place}")
    if place.startswith("packages/"):
        markdown = NAMED.sub(r"[\1](../docs/\1)", markdown)
    return rewritten(path, markdown)
