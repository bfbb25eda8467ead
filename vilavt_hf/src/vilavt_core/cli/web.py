"""``vilavt web``: the web app, on this machine unless it is told otherwise."""

from __future__ import annotations

import ipaddress
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import EngineError
from . import model_options as options

USERS = "VILAVT_WEB_AUTH"
"""Environment variable with ``USER:PASSWORD``."""


def web(
    model: options.Model,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to serve on; any but this machine's own needs --auth.")
    ] = "127.0.0.1",
    auth: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=f"Ask for a name and a password: one USER:PASSWORD a line; or set {USERS}."),
    ] = None,
    examples: Annotated[bool, typer.Option(help="Offer the shipped scenes.")] = True,
    preset: options.Preset = None,
    max_turns: options.MaxTurns = None,
    max_new_tokens: options.MaxNewTokens = None,
    max_pixels: options.MaxPixels = None,
    temperature: options.Temperature = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    attention: options.Attention = None,
    device_map: options.DeviceMap = None,
    quantize: options.Quantize = None,
    base: options.Base = None,
) -> None:
    """Open a page in which images are dropped and asked about. It is never shared through somebody else's server.

    Ctrl-C ends it.
    """
    users = _users(auth, os.environ.get(USERS))
    if not users and not _is_loopback(host):
        raise EngineError(f"--host {host} lets everybody who reaches this machine ask; add --auth FILE")
    if find_spec("gradio") is None:  # before the model is loaded, not after it
        raise EngineError('the web app needs gradio: pip install "vilavt-hf[web]"')

    opened = options.open_model(
        model,
        preset=preset,
        limits=options.limits_of(max_turns, max_new_tokens, max_pixels),
        temperature=temperature,
        device=device,
        dtype=dtype,
        attention=attention,
        device_map=device_map,
        quantize=quantize,
        base=base,
    )
    from ..web.app import Access, serve_page

    page = serve_page(model, opened, Access(host, port, users), examples=examples)
    typer.echo(f"{page.local_url}  (Ctrl-C ends it)")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def _users(file: str | None, variable: str | None) -> tuple[tuple[str, str], ...]:
    """Names and passwords.

    Raises:
        EngineError: the file cannot be read, or a line is no ``USER:PASSWORD``; passwords are not repeated.
    """
    if file is None:
        lines, where = ([variable], USERS) if variable else ([], "")
    else:
        try:
            lines, where = Path(file).read_text(encoding="utf-8").splitlines(), file
        except FileNotFoundError:
            hint = "; a password on the command line could be read by every user of this machine" if ":" in file else ""
            name = file.partition(":")[0] if ":" in file else file
            raise EngineError(
                f"--auth {name}: there is no such file; write USER:PASSWORD into one, or set {USERS}{hint}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(f"--auth {file}: cannot be read: {error}") from None
    users = []
    for number, line in enumerate(lines, 1):
        name, colon, password = line.strip().partition(":")
        if not line.strip():
            continue
        if not (name and colon and password):
            raise EngineError(f"{where}, line {number}: it must be USER:PASSWORD, both not empty")
        users.append((name, password))
    if file is not None and not users:
        raise EngineError(f"--auth {file}: it has no USER:PASSWORD; an empty file lets nobody in")
    return tuple(users)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
