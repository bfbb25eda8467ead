"""The only module that knows how the distributions of ``vlmeval`` differ: a checkout, ms-vlmeval, nvidia-vlmeval.

All three own the module name, so this package depends on none of them.
"""

from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from .errors import VlmevalMissing

INSTALL = "pip install ms-vlmeval, or git clone https://github.com/open-compass/VLMEvalKit and pip install -e it"


def package() -> Path:
    """Folder of the ``vlmeval`` that an import would find; it is not executed.

    Raises:
        VlmevalMissing: there is none.
    """
    spec = find_spec("vlmeval")
    if spec is None or not spec.submodule_search_locations:
        raise VlmevalMissing(f"no vlmeval in this environment; {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def runner() -> Path:
    """``run.py``: inside the package (ms-vlmeval, nvidia-vlmeval), or beside it (a checkout).

    Raises:
        VlmevalMissing: there is none.
    """
    folder = package()
    for candidate in (folder / "run.py", folder.parent / "run.py"):
        if candidate.is_file():
            return candidate
    raise VlmevalMissing(
        f"{folder} has no run.py, neither inside nor beside it: VLMEvalKit's own installation leaves it out; "
        "run from a checkout, or install with pip install -e"
    )


def distribution_found() -> str:
    """Name, version and folder of what is installed; a checkout on the path has no name.

    Raises:
        VlmevalMissing: there is none.
    """
    folder = package()
    names = packages_distributions().get("vlmeval", [])
    return f"{', '.join(f'{name} {version(name)}' for name in names) or 'a checkout'} in {folder}"
