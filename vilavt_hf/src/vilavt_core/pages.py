"""Self-contained HTML pages out of templates. Whatever a template shows is escaped, unless a template wrote it; other
text out of templates.

``templates/page.html`` is what every page extends: style, and a policy by which browsers load nothing from elsewhere
and run no script but the one that the page came with.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
"""Those that all packages share."""

Place = Literal["inside", "beside"]
"""Where a page has its images: in itself, as ``data:`` URLs, or in files of its own folder."""


def render(
    template: str, folder: Path | None = None, *, script: str = "", pictures_at: Place = "inside", **values: Any
) -> Markup:
    """Fill a template in.

    Args:
        template: its file name.
        folder: where it is, besides `TEMPLATES`, which it may extend and include.
        script: file name of the only script that the page may run, put into it; empty: it runs none.
        pictures_at: where the page may have its images.
        values: what it shows. Text is escaped; only what `render` has returned stands as it is.

    Returns:
        HTML that can be written as UTF-8.
    """
    from markupsafe import Markup

    environment = _environment(folder)
    source = environment.loader.get_source(environment, script)[0] if script and environment.loader else ""
    head = {"policy": policy(source, pictures_at), "script": Markup(source)}  # our own file  # nosec B704
    text = environment.get_template(template).render(head | values)
    # A result file can hold lone surrogates, which cannot be written as UTF-8.
    return Markup(text.encode("utf-8", "replace").decode())  # the template has escaped its values  # nosec B704


def policy(script: str, pictures_at: Place) -> str:
    """The Content-Security-Policy of a page: nothing from elsewhere, and only this script, known by its hash."""
    allowed = ["default-src 'none'", "style-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'"]
    allowed.append("img-src data:" if pictures_at == "inside" else "img-src 'self' file: data:")
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed.append(f"script-src 'sha256-{digest}'")
    return "; ".join(allowed)


def render_text(template: str, **values: Any) -> str:
    """Fill a template of `TEMPLATES` in that is no HTML: nothing is escaped, the caller makes values harmless."""
    return _environment(None, escape=False).get_template(template).render(values)


@lru_cache
def _environment(folder: Path | None, escape: bool = True) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folders = [TEMPLATES] if folder is None else [folder, TEMPLATES]
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=escape,  # off for text that is no HTML  # nosec B701
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
