import errno
import http.server
import ipaddress
import re
import socket
import threading
import time

import pytest
from hostile_pictures import CORPUS, MEGABYTE, PIXELS, webp, whole
from measuring import measured
from PIL import Image

from vilavt_core import download, images
from vilavt_core.download import UrlPolicy, is_public, shown_url
from vilavt_core.errors import ImageError
from vilavt_core.images import HELD_BYTES, ImageLimits, decoding_cost, image_size, load_image

LOCAL = UrlPolicy(private_hosts=True, timeout=5, total_timeout=1)


def test_the_corpus_is_large_and_names_each_file_once():
    assert len({one.name for one in CORPUS}) == len(CORPUS) >= 150


@pytest.mark.parametrize("hostile", CORPUS, ids=lambda one: one.name)
def test_a_hostile_picture_comes_to_its_end(hostile):
    data = hostile.make()
    for read in (decoding_cost, load_image):
        found, seconds, grown = measured(lambda read=read: read(data))
        if hostile.refused is not None:
            assert isinstance(found, ImageError)
            assert re.search(hostile.refused, str(found))
        elif isinstance(found, Exception):
            assert isinstance(found, ImageError)
        assert seconds < hostile.seconds
        assert grown < hostile.megabytes * MEGABYTE + 2 * len(data)
        if isinstance(found, Exception):
            assert str(found).isprintable()
            assert len(str(found)) < 600
            assert " at 0x" not in str(found)


@pytest.mark.parametrize("name", whole())
def test_decoding_takes_no_more_memory_than_the_header_says(name):
    data = whole()[name]()
    cost = decoding_cost(data)
    assert cost.pixels == PIXELS
    found, _, grown = measured(lambda: load_image(data, ImageLimits()))
    assert isinstance(found, Image.Image)
    assert grown <= cost.peak + 24 * MEGABYTE  # of bands, which do not grow with the picture
    assert cost.held == HELD_BYTES * PIXELS
    assert grown > cost.held / 2  # else the measurement saw nothing
    assert image_size(data) in (found.size, found.size[::-1])


def test_a_header_costs_nothing_whatever_it_promises():
    data = webp(10_000, 10_000)
    cost, seconds, grown = measured(lambda: decoding_cost(data))
    assert len(data) < 34
    assert (cost.pixels, cost.held) == (100_000_000, 400_000_000)
    assert cost.peak >= 1_600_000_000
    assert seconds < 20
    assert grown < 20 * MEGABYTE


@pytest.mark.parametrize("unit", ["%41", "%2B", "%2b", "+ ", "A\n", "A"])
def test_a_data_url_takes_a_few_times_its_own_memory_however_it_is_written(unit):
    url = "data:image/png;base64," + unit * 5_000_000
    found, seconds, grown = measured(lambda: load_image(url))
    assert isinstance(found, ImageError)
    assert seconds < 30
    assert grown < 5 * len(url) + 10 * MEGABYTE
    assert len(str(found)) < 600


@pytest.mark.parametrize("error", [MemoryError("none left"), OSError(errno.EMFILE, "Too many open files")])
def test_what_the_machine_lacks_is_not_called_damage(error, monkeypatch, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")

    def fail(*_, **__):
        raise error

    for owner, name in ((images, "to_rgb"), (images.Image, "open"), (images.Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(type(error)) as caught:
                load_image(tmp_path / "a.png")
            assert not isinstance(caught.value, ImageError)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "239.255.255.250"),
        *("240.0.0.1", "255.255.255.255", "192.0.2.1", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8"),
        *("fe80::1", "fc00::1", "ff02::1", "ff0e::1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1"),
        *("2002:7f00:1::1", "2002:808:808::1", "2001::1", "2001:db8::1", "4000::1"),
    ],
)
def test_an_address_that_may_lead_inside_is_not_public(address, monkeypatch):
    assert not is_public(ipaddress.ip_address(address))
    monkeypatch.setattr(download.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    with pytest.raises(ImageError, match="not a public address"):
        load_image("https://example.org/a.png", allow_urls=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_an_ordinary_address_is_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    """A name that is looked up anew for the connection may mean another address by then."""
    asked, reached = [], []

    def look_up(host, port, **_):
        asked.append(host)
        return [(0, 0, 0, "", ("8.8.8.8" if len(asked) == 1 else "127.0.0.1", port))]

    def connect(address, timeout):
        reached.append(address)
        raise OSError("no network in tests")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(download.socket, "create_connection", connect)
    for url, port in (("http://example.org/a.png", 80), ("https://example.org:8443/a.png", 8443)):
        asked.clear()
        reached.clear()
        with pytest.raises(ImageError, match="no network in tests"):
            load_image(url, allow_urls=True)
        assert (asked, reached) == (["example.org"], [("8.8.8.8", port)])


@pytest.fixture
def dripping():
    """The URL of a server that sends a byte every tenth of a second: `/head` of its header, else of its body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = b"HTTP/1.0 200 OK\r\nX-Long: " if self.path == "/head" else b"HTTP/1.0 200 OK\r\n\r\n"
            self.wfile.write(start)
            for _ in range(100):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
                time.sleep(0.1)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/head", "/body"])
def test_a_download_has_a_deadline_as_a_whole(path, dripping, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    found, seconds, _ = measured(lambda: load_image(dripping + path, allow_urls=True, url_policy=LOCAL))
    assert isinstance(found, ImageError)
    assert "within 1 seconds" in str(found)
    assert 0.9 < seconds < 30


def test_a_host_that_never_answers_a_secure_greeting_has_a_deadline(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"https://127.0.0.1:{server.getsockname()[1]}/a.png"
        found, seconds, _ = measured(lambda: load_image(url, allow_urls=True, url_policy=LOCAL))
    assert isinstance(found, ImageError)
    assert seconds < 30


def test_no_error_tells_a_password_or_a_signature():
    url = "https://user:secret@example.org/a.png?X-Signature=secret"
    assert shown_url(url) == "https://example.org/a.png?…"
    with pytest.raises(ImageError, match=r"https://example\.org/a\.png") as caught:
        load_image(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "x" * 1_000_000,
        "http://" + "x" * 1_000_000,
        "data:" + "x" * 1_000_000,
        "x" * 1_000_000 + "://host",
        "\x1b[2J\x1b]0;title\7.png",
        b"\x1b[2J" * 100_000,
        {"\x1b[2J" * 100: 1},
    ],
)
def test_an_error_quotes_little_and_nothing_that_a_terminal_acts_upon(source):
    found, seconds, _ = measured(lambda: load_image(source))
    assert isinstance(found, ImageError)
    assert len(str(found)) < 600
    assert str(found).isprintable()
    assert seconds < 30
