"""The web app and pages of conversations in a real browser: Debian's Chromium, or the one that Playwright brings."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from desks import ScriptedBackend
from playwright.sync_api import sync_playwright

from vilavt_core.web.app import Access, serve_page


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """Opens the app as a visitor of their own: `open_page(url, width=…, color_scheme=…)`.

    The page's console errors and requests are collected; both are looked at when the test ends.
    """
    contexts, errors, requests = [], [], []

    def opened(url: str, width: int = 1200, height: int = 900, **context):
        context = browser.new_context(viewport={"width": width, "height": height}, **context)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        page.locator("#question textarea").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []
    elsewhere = [url for url in requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert elsewhere == [], "the page asked another machine"


@pytest.fixture
def open_file(browser):
    """Opens a page that was written to disk: `open_file(path, width=…, color_scheme=…)`.

    When the test ends, no page may have had an error (of its script, of its policy, a picture that is not there), or
    asked for more than files.
    """
    contexts, errors, failed, requests = [], [], [], []

    def opened(path: Path, width: int = 1300, height: int = 900, **context):
        context = browser.new_context(viewport={"width": width, "height": height}, **context)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("requestfailed", lambda request: failed.append(f"{request.url}: {request.failure}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []
    assert [what for what in failed if "ERR_ABORTED" not in what] == []  # what a page that is left was still loading
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == [], "the page asked a network"


@pytest.fixture(scope="session")
def free_port():
    """Gives ports that nobody listens on."""

    def found() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return found


@pytest.fixture(scope="module")
def serve_app(free_port):
    """Serves the app over a backend: `serve_app(model, backend, **access)` gives its address."""
    pages = []

    def started(model, backend, **access):
        port = free_port()
        pages.append(serve_page(model, backend, Access(port=port, **access)))
        return f"http://127.0.0.1:{port}/"

    yield started
    for page in pages:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def scripted(serve_app):
    """The app over a backend that says what the test tells it to."""
    backend = ScriptedBackend()
    return SimpleNamespace(backend=backend, url=serve_app("scripted", backend))
