"""A file of the network under a policy: public hosts only, within a time and a size, from the address that was
checked."""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import ImageError
from .failures import quoted, quoted_error

_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")
_BLOCK = 64 * 1024


@dataclass(frozen=True)
class UrlPolicy:
    """What a URL may be, if URLs are allowed at all. Checked again at every redirect."""

    schemes: tuple[str, ...] = ("https", "http")
    private_hosts: bool = False
    """Whether hosts with a loopback, link-local, or otherwise non-public address may be asked."""
    timeout: float = 10.0
    """Seconds per network operation."""
    max_redirects: int = 3
    total_timeout: float = 60.0
    """Seconds for the whole file, redirects included."""


def shown_url(url: str) -> str:
    """A URL as errors call it: at most 200 characters, without a name, a password, or what stands behind a ``?`` (often
    a signature); of a data URL what it says to be, not what it holds."""
    if url[:5].lower() == "data:":
        kind = re.match(r"[\w.+/-]{0,60}(;[\w=-]{1,40}){0,3}(?=,)", url[5:])
        return quoted(f"{url[:5]}{kind[0] if kind else ''}{',' if kind else ''}…")
    scheme, mark, rest = url.partition("://")
    rest, asked, _ = rest.partition("?")
    host, slash, path = rest.partition("/")
    return quoted(f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}{asked and '?…'}")


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one host of the public internet. Ranges that stand for IPv4 addresses (mapped, compatible,
    NAT64, 6to4) are none: they may lead to a private one."""
    if address.is_multicast or not address.is_global:
        return False
    return address.version == 4 or (address in _PUBLIC_IPV6 and address not in _SIX_TO_FOUR)


def download(url: str, max_bytes: int, policy: UrlPolicy, label: str) -> bytes:
    """At most `max_bytes` + 1 bytes of a file.

    Raises:
        ImageError: the policy refuses it, it does not come in time, or it is announced as larger; names it.
    """
    visit = _Visit(policy, label)
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(visit),
        _Https(visit),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _CheckedRedirects(visit),
    ):
        opener.add_handler(handler)
    data = bytearray()
    try:
        visit.check(url)
        with visit.within_time():
            request = urllib.request.Request(url, headers={"User-Agent": "vilavt-hf", "Accept": "image/*"})
            with opener.open(request, timeout=policy.timeout) as response:
                announced = response.headers.get("Content-Length", "")
                if announced.isdecimal() and len(announced) < 20 and int(announced) > max_bytes:
                    raise ImageError(
                        f"{label}: {int(announced)} bytes, at most {max_bytes} are allowed; save it smaller or raise "
                        "ImageLimits.max_bytes"
                    )
                while len(data) <= max_bytes and (block := response.read1(_BLOCK)):
                    data += block
    except ImageError:
        raise
    except Exception as error:
        if visit.is_late():
            pass
        elif isinstance(error, urllib.error.HTTPError):
            reason = quoted(error.reason)
            raise ImageError(f"{label}: the server answered {error.code} {reason}; check the URL") from None
        else:
            raise ImageError(f"{label}: cannot be downloaded: {quoted_error(error)}") from None
    if visit.is_late():
        raise ImageError(
            f"{label}: {len(data)} bytes came within {policy.total_timeout:g} seconds and it was not whole; download "
            "it yourself, or raise UrlPolicy.total_timeout"
        ) from None
    return bytes(data[: max_bytes + 1])


class _Visit:
    """One download: what was checked, and how long it may take."""

    def __init__(self, policy: UrlPolicy, label: str) -> None:
        self.policy, self.label = policy, label
        self.addresses: dict[tuple[str, int], list[str]] = {}
        self._ends = time.monotonic() + policy.total_timeout
        self._socket: socket.socket | None = None
        self._late = False

    def is_late(self) -> bool:
        """Whether the time is over."""
        return self._late

    @contextmanager
    def within_time(self) -> Iterator[None]:
        """Cuts the connection when the time is over: no timeout of single operations sees a byte a second."""
        watch = threading.Timer(max(0.0, self._ends - time.monotonic()), self._cut)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    def _cut(self) -> None:
        self._late = True
        if (connection := self._socket) is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def check(self, url: str) -> None:
        """Scheme, host, and the addresses of the host, which are remembered: the connection goes to one of them."""
        policy, label = self.policy, self.label
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ImageError(f"{label}: not a valid URL: {quoted_error(error)}") from None
        scheme = parts.scheme.lower()
        if scheme not in policy.schemes:
            raise ImageError(
                f"{label}: the scheme {quoted(parts.scheme)!r} is not allowed, allowed are {', '.join(policy.schemes)}"
            )
        if not host:
            raise ImageError(f"{label}: the URL names no host")
        if policy.private_hosts:
            return
        port = port or (80 if scheme == "http" else 443)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ImageError(f"{label}: the host {quoted(host)!r} is unknown: {quoted_error(error)}") from None
        for entry in found:
            address = ipaddress.ip_address(str(entry[4][0]).partition("%")[0])
            if not is_public(address):
                raise ImageError(
                    f"{label}: the host {quoted(host)!r} is {address}, not a public address; set "
                    "UrlPolicy.private_hosts to allow it"
                )
        self.addresses[host, port] = [str(entry[4][0]) for entry in found]

    def connect(self, host: str, port: int, timeout: Any) -> socket.socket:
        """A connection to an address of the host that was checked. A host that was not is a proxy that the user has
        set, or private hosts are allowed."""
        problem: OSError | None = None
        for address in self.addresses.get((host.strip("[]").lower(), port), [host]):
            if self._late:
                break
            try:
                return self.watch(socket.create_connection((address, port), timeout))
            except OSError as error:
                problem = error
        raise problem or OSError("no address left to try")

    def watch(self, connection: socket.socket) -> socket.socket:
        """Cut this one when the time is over."""
        self._socket = connection
        return connection


class _Connection(http.client.HTTPConnection):
    def __init__(self, visit: _Visit, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self.visit = visit

    def connect(self) -> None:
        """To an address that was checked."""
        self.sock = self.visit.connect(self.host, self.port, self.timeout)
        if self._tunnel_host:  # type: ignore[attr-defined]
            self._tunnel()  # type: ignore[attr-defined]


class _SecureConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        """The same; the certificate is the host's."""
        super().connect()
        name = self._tunnel_host or self.host  # type: ignore[attr-defined]
        secure = ssl.create_default_context().wrap_socket(
            self.sock, server_hostname=name, do_handshake_on_connect=False
        )
        self.sock = self.visit.watch(secure)
        secure.do_handshake()


class _Http(urllib.request.HTTPHandler):
    def __init__(self, visit: _Visit) -> None:
        super().__init__()
        self._connection = partial(_Connection, visit)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, visit: _Visit) -> None:
        super().__init__()
        self._connection = partial(_SecureConnection, visit)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, visit: _Visit) -> None:
        self.visit, self.followed = visit, 0

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.followed += 1
        most = self.visit.policy.max_redirects
        if self.followed > most:
            raise ImageError(f"{self.visit.label}: more than {most} redirects; give the final URL")
        self.visit.check(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


__all__ = ["UrlPolicy", "download", "is_public", "shown_url"]
