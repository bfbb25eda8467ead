"""Self-contained HTML pages out of templates. Whatever a template shows is escaped, unless a template wrote it.

``templates/page.html`` is what every page extends: style, and a policy by which browsers load nothing from elsewhere.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
"""Those that all packages share."""


def render(template: str, folder: Path | None = None, **values: Any) -> Markup:
    """Fill a template in.

    Args:
        template: its file name.
        folder: where it is, besides `TEMPLATES`, which it may extend and include.
        values: what it shows. Text is escaped; only what `render` has returned stands as it is.

    Returns:
        HTML that can be written as UTF-8.
    """
    from markupsafe import Markup

    text = _environment(folder).get_template(template).render(values)
    # A result file can hold lone surrogates, which cannot be written as UTF-8.
    return Markup(text.encode("utf-8", "replace").decode())


@lru_cache
def _environment(folder: Path | None) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folders = [TEMPLATES] if folder is None else [folder, TEMPLATES]
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
