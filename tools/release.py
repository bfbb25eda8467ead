"""What a release must agree on, and the hashes of what it consists of. `nox -s release` runs both.

python tools/release.py check          version, tag and changelog agree; without a tag it is a dry run
python tools/release.py sums FOLDER    writes FOLDER/SHA256SUMS, in the format of `sha256sum -c`
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUMS = "SHA256SUMS"


def tags_here(root: Path = ROOT) -> list[str]:
    """Tags of the commit that is checked out."""
    command = ["git", "-C", str(root), "tag", "--points-at", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def disagreements(version: str, changelog: str, tags: list[str]) -> list[str]:
    """What keeps a commit from being released; nothing if all is well.

    Args:
        version: of ``VERSION``.
        changelog: text of ``CHANGELOG.md``.
        tags: of the commit; none for a dry run, in which what is unreleased may still have a heading of its own.
    """
    sections = dict(re.findall(r"^## (\S+)[^\n]*\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL))
    found = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        found.append(f"VERSION is {version!r}, expected numbers as 0.1.0 or 0.1.0rc1")
    if not sections.get(version, "").strip():
        found.append(f"CHANGELOG.md has no section '## {version}' with an entry; VERSION is {version}")
    releases = [tag for tag in tags if re.fullmatch(r"v\d.*", tag)]
    if releases and releases != [f"v{version}"]:
        found.append(f"the commit has the tags {', '.join(releases)}, VERSION is {version}; tag it v{version} alone")
    if releases and sections.get("Unreleased", "").strip():
        found.append(f"CHANGELOG.md has entries under '## Unreleased'; move them to '## {version}' before tagging")
    return found


def write_sums(folder: Path) -> Path:
    """Write the SHA-256 of every file of a folder into it."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return folder / SUMS


def _check() -> int:
    version = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
    tags = tags_here()
    found = disagreements(version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), tags)
    for problem in found:
        print(f"release: {problem}", file=sys.stderr)
    if not found and f"v{version}" in tags:
        print(f"release: {version}, tag v{version} and changelog agree")
    elif not found:
        print(f"release: dry run of {version}: this commit has no tag v{version}")
    return 1 if found else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check"]:
            sys.exit(_check())
        case ["sums", folder]:
            print(write_sums(Path(folder)))
        case _:
            sys.exit(__doc__)
