"""The HTTP library of all origins, and the clients that they create with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any
from urllib.request import getproxies

from huggingface_hub.errors import HfHubHTTPError

from weightferry.errors import redact
from weightferry.settings import Settings

# huggingface_hub uses httpx (1.x) or httpx2 (2.x). We use the same library, so that the process has only one, and so
# that the errors of its sessions have the classes that we catch.
_LIBRARY = next(kind.__module__ for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx"))
httpx: Any = import_module(_LIBRARY.partition(".")[0])
httpcore: Any = import_module(httpx.__name__.replace("httpx", "httpcore"))

_READ_SIZE = 1 << 18
"""Bytes of one read from a plain socket. With the library's own 64 KiB, four connections on one machine lose a third of
their speed (1.07 GB/s; 256 KiB: 1.6, 1 MiB: 1.5)."""


class _Redacting(logging.Filter):
    """Removes secrets from log records of the HTTP library, which logs the signed URL of every request at INFO."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


# The loggers of httpcore log the headers of every response at DEBUG; the Location of a redirect has a signature.
for _name in (httpx.__name__, f"{httpcore.__name__}.http11", f"{httpcore.__name__}.http2"):
    logging.getLogger(_name).addFilter(_Redacting())


def timeouts(settings: Settings) -> Any:
    """Return the timeouts of a request: seconds for the connection, and between two reads of the body.

    The time of the whole body has no limit. There is no timeout for a place in the connection pool: the number of
    reading threads decides the number of connections.
    """
    read = min(settings.read_timeout, settings.stall_timeout / 3)  # so that a retry comes before `stall_timeout`
    return httpx.Timeout(read, connect=settings.connect_timeout, pool=None)


def new_client(settings: Settings) -> Any:
    """Create an HTTP client for any number of threads. The caller closes it."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # A client with a custom transport ignores the proxy variables of the environment.
    transport = None if getproxies().keys() - {"no"} else LargeReadTransport(limits)
    return httpx.Client(
        verify=_ssl_context(), transport=transport, limits=limits, follow_redirects=True, timeout=timeouts(settings)
    )


@cache
def _ssl_context() -> Any:
    """Return the TLS settings of all clients: each creation of them parses all CA certificates, for 15 ms of CPU."""
    return httpx.create_ssl_context()


class LargeReadTransport(httpx.BaseTransport):  # type: ignore[misc]
    """The connections of the HTTP library, with a larger read size for plain sockets."""

    def __init__(self, limits: Any) -> None:
        self._pool = httpcore.ConnectionPool(
            ssl_context=_ssl_context(),
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_LargeReadBackend(),
        )

    def handle_request(self, request: Any) -> Any:
        """Send a request; return the response before its body is read."""
        url = request.url
        lower_request = httpcore.Request(
            method=request.method,
            url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _raise_httpx_errors():
            response = self._pool.handle_request(lower_request)
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(response.stream), extensions=response.extensions
        )

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Body(httpx.SyncByteStream):  # type: ignore[misc]
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        with _raise_httpx_errors():
            yield from self._stream

    def close(self) -> None:
        self._stream.close()


@contextmanager
def _raise_httpx_errors() -> Iterator[None]:
    """Raise errors of httpcore as the httpx errors of the same name."""
    try:
        yield
    except (
        httpcore.TimeoutException,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.UnsupportedProtocol,
    ) as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error


class _LargeReadBackend(httpcore.SyncBackend):  # type: ignore[misc]
    def connect_tcp(self, *args: Any, **kwargs: Any) -> Any:
        return _LargeReadStream(super().connect_tcp(*args, **kwargs))


class _LargeReadStream(httpcore.NetworkStream):  # type: ignore[misc]
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._stream.read(max(max_bytes, _READ_SIZE), timeout)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **kwargs: Any) -> Any:
        # Unchanged: TLS returns one record of at most 16 KiB for each read, for any read size.
        return self._stream.start_tls(*args, **kwargs)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
