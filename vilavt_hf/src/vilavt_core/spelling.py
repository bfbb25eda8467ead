"""What somebody meant who wrote a name that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST = 100
"""Characters of a name that is likened to others, which would take seconds of a megabyte."""


def did_you_mean(written: object, known: Iterable[object]) -> str:
    """``; did you mean 'late'?`` for the known name that is written most alike, to end an error with; else nothing.

    Args:
        written: what was given.
        known: what there is.
    """
    if len(str(written)) > _LONGEST:
        return ""
    names = {_compared(name): str(name) for name in known}
    found = get_close_matches(_compared(written), names, n=1)
    return f"; did you mean {names[found[0]]!r}?" if found else ""


def _compared(name: object) -> str:
    """The letters that matter: dashes, which all options begin with, make none of them alike."""
    return str(name).lower().lstrip("-")


def meant(written: Iterable[object], known: Iterable[object]) -> str:
    """`did_you_mean` for the first of several names that has a likeness."""
    known = list(known)
    return next(filter(None, (did_you_mean(name, known) for name in written)), "")
