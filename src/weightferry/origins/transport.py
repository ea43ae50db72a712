"""HTTP requests over connections that threads share: time limits, redirects, proxies, and bodies in large pieces."""

from __future__ import annotations

import base64
import contextlib
import http.client
import logging
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError, ReadTimeoutError, SSLError

from weightferry._version import __version__
from weightferry.errors import BadRequest, OriginError, redact
from weightferry.origins.base import Silent, TransientOriginError, Unreachable
from weightferry.origins.network import create_ssl_context, proxy_for
from weightferry.settings import Settings

USER_AGENT = f"weightferry/{__version__}"

_PIECE = 1 << 18
"""Least bytes of a piece of a body, and the most of one read from a socket. Measured with four plain connections to
nginx on the same machine: 1.0 CPU s/GB; with reads of 64 KiB 1.3. TLS gives at most 16 KiB at a time."""
_PIECE_SECONDS = 0.2
"""A piece is handed out after this time though it is small, so that progress on a slow connection is seen."""
_IDLE_SECONDS = 30.0
"""A connection that was not used for longer is not used again: NAT routers drop idle connections without notice."""
_POOL_SIZE = 256
"""Idle connections that are kept for each server; more than a leader has readers."""
_MAX_REDIRECTS = 20
_MAX_TEXT = 1 << 16


class _Redacting(logging.Filter):
    """Removes secrets from log records of HTTP libraries, which log the URL of every request."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


# The loggers of httpcore log the headers of every response at DEBUG; the Location of a redirect has a signature.
# huggingface_hub uses requests with urllib3 (0.x), httpx (1.x) or httpx2 (2.x).
_LOGGERS = (
    *("urllib3.connection", "urllib3.connectionpool", "urllib3.poolmanager", "urllib3.response", "urllib3.util.retry"),
    *("httpx", "httpcore.http11", "httpcore.http2", "httpx2", "httpcore2.http11", "httpcore2.http2"),
    "huggingface_hub.utils._http",
)
for _name in _LOGGERS:
    logging.getLogger(_name).addFilter(_Redacting())


@dataclass(frozen=True)
class Timeouts:
    """The time limits of a request.

    Attributes
    ----------
    connect
        Seconds for a connection, with its TLS handshake.
    read
        Seconds between two reads. The time of the whole body has no limit.
    """

    connect: float
    read: float

    @classmethod
    def of(cls, settings: Settings) -> Timeouts:
        """Return the limits of the settings; a silent origin is noticed early, so that a retry fits before the end."""
        return cls(settings.connect_timeout, min(settings.read_timeout, settings.stall_timeout / 3))


@dataclass(frozen=True)
class Response:
    """The response to a request, before its body is read.

    Attributes
    ----------
    status
        Status code.
    headers
        Found in upper and lower case.
    url
        URL that sent it, after redirects. May contain a signature, so it is never shown.
    body
        The bytes as they are sent, neither decoded nor decompressed, in pieces. Raises `Silent` or another
        `TransientOriginError` after the bytes that arrived.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    url: str = field(repr=False)
    body: Iterator[bytes] = field(repr=False)

    @property
    def redirect(self) -> str:
        """The URL that the server redirects to; empty if it does not redirect."""
        location = self.headers.get("Location", "") if self.status in (301, 302, 303, 307, 308) else ""
        with contextlib.suppress(UnicodeError):
            # A server should send only ASCII characters. Some send UTF-8, which http.client takes for Latin-1.
            location = location.encode("latin-1").decode()
        try:
            return urljoin(self.url, location) if location else ""
        except ValueError:  # not a valid URL, which the next request says
            return location

    def start_of_body(self) -> bytes:
        """Read the body, of a long one the start; a connection whose body was read to its end can be used again."""
        text = bytearray()
        for piece in self.body:
            text += piece
            if len(text) >= _MAX_TEXT:
                break
        return bytes(text)


class HttpClient:
    """Sends requests over connections that it keeps. Safe to use from several threads.

    The environment variables name proxies and certificates; see `weightferry.origins.network`.
    """

    def __init__(self, settings: Settings) -> None:
        self._timeouts = Timeouts.of(settings)
        self._lock = threading.Lock()
        self._pools: dict[tuple[str, str], urllib3.PoolManager] | None = {}

    @contextmanager
    def stream(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        subject: str,
        follow_redirects: bool = True,
    ) -> Iterator[Response]:
        """Send a request and yield the response before its body is read, for any status.

        The Authorization header, and the user and password of the URL, are not sent to another server after a redirect.

        Raises
        ------
        Unreachable
            No connection: the name, the network, the proxy or the certificate is wrong, or it takes too long.
        Silent
            No byte arrives within the read timeout; also while the body is read.
        TransientOriginError
            The connection breaks; also while the body is read, and if that ends before Content-Length.
        OriginError
            The URL is not valid, or there are too many redirects.
        BadRequest
            A variable of the environment names no certificates.
        """
        sent = {"User-Agent": USER_AGENT, **(headers or {})}
        previous = url
        for _ in range(_MAX_REDIRECTS):
            _check_url(url, subject)
            if not same_server(previous, url):
                sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
            if auth := _basic_auth(url):
                sent["Authorization"] = auth
            with self._exchange(method, _without_password(url), sent, subject) as response:
                target = response.redirect if follow_redirects else ""
                if not target:
                    yield response
                    return
                response.start_of_body()
            previous, url = url, target
        raise OriginError(f"the server answered with {_MAX_REDIRECTS} redirects", subject=subject)

    def close(self) -> None:
        """Close the connections; nothing can be sent afterwards."""
        with self._lock:
            pools, self._pools = self._pools, None
        for pool in (pools or {}).values():
            pool.clear()

    @contextmanager
    def _exchange(self, method: str, url: str, headers: dict[str, str], subject: str) -> Iterator[Response]:
        host, proxy = urlsplit(url).netloc, proxy_for(url)
        try:
            raw = self._pool(url, proxy).urlopen(
                method,
                url,
                headers=headers,
                timeout=urllib3.Timeout(connect=self._timeouts.connect, read=self._timeouts.read),
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
        except HTTPError as error:
            where = f"{host} through the proxy {_host(proxy)}" if proxy else host
            raise _translate(error, where, self._timeouts, subject) from error
        try:
            yield Response(raw.status, raw.headers, url, read_body(raw, host, self._timeouts, subject))
        finally:
            _release(raw)

    def _pool(self, url: str, proxy: str) -> urllib3.PoolManager:
        """Return the connections to servers of this scheme that use this proxy."""
        scheme = urlsplit(url).scheme
        with self._lock:
            if self._pools is None:
                raise RuntimeError("the client is closed")
            if (scheme, proxy) not in self._pools:
                self._pools[scheme, proxy] = _create_pool(scheme, proxy)
            return self._pools[scheme, proxy]


def same_server(url: str, target: str) -> bool:
    """Return whether a redirect stays on its server, or only upgrades to https: then it may get the token."""
    try:
        (scheme, host, port), (new_scheme, new_host, new_port) = _server(url), _server(target)
    except ValueError:  # not a valid URL
        return False
    upgraded = (scheme, port, new_scheme, new_port) == ("http", 80, "https", 443)
    return host == new_host and (upgraded or (scheme, port) == (new_scheme, new_port))


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def read_body(raw: Any, host: str, limits: Timeouts, subject: str) -> Iterator[bytes]:
    """Yield the body of a response of urllib3; see `Response.body`."""
    ended = False
    while not ended:
        parts: list[bytes] = []
        size, until, failed = 0, time.monotonic() + _PIECE_SECONDS, None
        try:
            while size < _PIECE and time.monotonic() < until:
                # One read from the socket: a longer one would lose the bytes before a timeout.
                part = raw.read1(_PIECE, decode_content=False)
                if not part:
                    ended = True
                    break
                parts.append(part)
                size += len(part)
        except HTTPError as error:
            failed = error
        if parts:
            yield parts[0] if len(parts) == 1 else b"".join(parts)
        if failed is not None:
            raise _translate(failed, host, limits, subject) from failed


def _release(raw: urllib3.BaseHTTPResponse) -> None:
    """Keep the connection if the body has been read, or close it."""
    if getattr(raw, "length_remaining", None) == 0:
        raw.drain_conn()  # reads nothing, but a response to HEAD is at its end only then
    raw.close()
    raw.release_conn()


def _translate(error: HTTPError, host: str, limits: Timeouts, subject: str) -> OriginError:
    if isinstance(error, _NoConnection):
        return Unreachable(redact(f"cannot connect to {host}: {error}"), subject=subject)
    if isinstance(error, ReadTimeoutError):
        return Silent(f"{host} sent nothing for {limits.read:g} s", subject=subject)
    cause = error.args[-1] if error.args and isinstance(error.args[-1], Exception) else error
    text = redact(f"{type(cause).__name__}: {cause}")
    if isinstance(error, ProtocolError | SSLError):
        return TransientOriginError(f"the connection to {host} broke: {text}", subject=subject)
    return OriginError(f"cannot send a request to {host}: {text}", subject=subject)


class _NoConnection(HTTPError):
    """A connection could not be made."""


class _HeadReader:
    """Reads the head of a response, and remembers whether it came to the empty line at its end."""

    def __init__(self, file: Any) -> None:
        self._file, self.complete, self.close = file, False, file.close

    def readline(self, limit: int) -> bytes:
        line: bytes = self._file.readline(limit)
        self.complete = line in (b"\r\n", b"\n")
        return line


class _Response(http.client.HTTPResponse):
    """A response whose head is complete. The base class takes the head for complete when the connection ends."""

    def begin(self) -> None:
        body, self.fp = self.fp, _HeadReader(self.fp)  # type: ignore[assignment]
        head: Any = self.fp
        try:
            super().begin()
        finally:
            if self.fp is head:
                self.fp = body
        if not head.complete:
            raise http.client.RemoteDisconnected("the server closed the connection before the end of the head")


class _Connection:
    """Added to the connection classes of urllib3. Tells a connection that cannot be made from one that breaks."""

    response_class = _Response
    timeout: Any
    _last_use = 0.0

    def connect(self) -> None:
        try:
            super().connect()  # type: ignore[misc]
        except (HTTPError, http.client.HTTPException, OSError) as error:
            raise _NoConnection(_reason(error, self.timeout)) from error

    def getresponse(self) -> Any:
        self._last_use = time.monotonic()
        return super().getresponse()  # type: ignore[misc]

    @property
    def is_connected(self) -> bool:
        return time.monotonic() - self._last_use < _IDLE_SECONDS and bool(super().is_connected)  # type: ignore[misc]


def _reason(error: BaseException, timeout: object) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, TimeoutError | urllib3.exceptions.ConnectTimeoutError):
        return f"no answer within {timeout} s"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{cause}. If this network has its own certificate authority, set SSL_CERT_FILE to its certificate"
    return str(cause)


def _create_pool(scheme: str, proxy: str) -> urllib3.PoolManager:
    options: dict[str, Any] = {"num_pools": 64, "maxsize": _POOL_SIZE}
    tls = create_ssl_context() if "https" in (scheme, urlsplit(proxy).scheme) else None
    if scheme == "https":
        options["ssl_context"] = tls
    pool: urllib3.PoolManager
    if proxy.startswith("socks"):
        pool = _socks_module().SOCKSProxyManager(proxy, **options)
    elif proxy:
        auth = _basic_auth(proxy)
        proxy_headers = {"Proxy-Authorization": auth} if auth else None
        pool = urllib3.ProxyManager(proxy, proxy_headers=proxy_headers, proxy_ssl_context=tls, **options)
    else:
        pool = urllib3.PoolManager(**options)
    pool.pool_classes_by_scheme = {name: _with_errors(kind) for name, kind in pool.pool_classes_by_scheme.items()}
    return pool


def _socks_module() -> Any:
    try:
        import_module("socks")
        return import_module("urllib3.contrib.socks")
    except ImportError as error:
        raise BadRequest("the proxy of this host is a SOCKS proxy, which needs PySocks: pip install PySocks") from error


def _with_errors(pool_class: Any) -> Any:
    connection = type("Connection", (_Connection, pool_class.ConnectionCls), {})
    return type(pool_class.__name__, (pool_class,), {"ConnectionCls": connection})


def _check_url(url: str, subject: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port or the address is no number
        valid = False
    if not valid:
        raise OriginError(f"not a valid http or https URL: {redact(url)!r}", subject=subject)


def _without_password(url: str) -> str:
    return urlsplit(url)._replace(netloc=_host(url)).geturl()


def _basic_auth(url: str) -> str:
    """Return the value of an Authorization header for the user and password of a URL; empty if it has none."""
    user_info, at, _ = urlsplit(url).netloc.rpartition("@")
    user, _, password = user_info.partition(":")
    return f"Basic {base64.b64encode(f'{unquote(user)}:{unquote(password)}'.encode()).decode()}" if at else ""


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]
