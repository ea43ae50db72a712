"""The HTTP library that all of these modules use, and the clients they make from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from urllib.request import getproxies

from huggingface_hub.errors import HfHubHTTPError

from weightferry.errors import redact
from weightferry.settings import Settings

# huggingface_hub speaks through httpx (1.x) or httpx2 (2.x). We use the same one, so that the process has one HTTP
# library, and so that the errors of its sessions are caught by the right classes.
_LIBRARY = next(kind.__module__ for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx"))
httpx: Any = import_module(_LIBRARY.partition(".")[0])
core: Any = import_module(httpx.__name__.replace("httpx", "httpcore"))

_WIDTH = 1 << 18
"""Bytes asked of a plain socket at a time. The library's own 64 KiB cost a third of the speed of four connections on
one machine (1.07 GB/s; 256 KiB: 1.6, 1 MiB: 1.5)."""


class _Redacting(logging.Filter):
    """Hides secrets in what the HTTP library logs: at INFO, the URL of every request, with its signature."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


# The second ones log the headers of every response at DEBUG; a redirect's Location holds a signature.
for _name in (httpx.__name__, f"{core.__name__}.http11", f"{core.__name__}.http2"):
    logging.getLogger(_name).addFilter(_Redacting())


def timeouts(settings: Settings) -> Any:
    """Seconds for each wait of a request; a body may take as long as it likes while it moves.

    Nobody waits for a place in a pool: how many connections there are is decided by how many threads read.
    """
    silence = min(settings.read_timeout, settings.stall_timeout / 3)  # so that asking anew comes before giving up
    return httpx.Timeout(silence, connect=settings.connect_timeout, pool=None)


def new_client(settings: Settings) -> Any:
    """Make a client for plain reads by any number of threads; whoever makes it closes it."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # With a transport of its own a client does not look for proxies.
    transport = None if getproxies().keys() - {"no"} else WideTransport(limits)
    return httpx.Client(transport=transport, limits=limits, follow_redirects=True, timeout=timeouts(settings))


class WideTransport(httpx.BaseTransport):  # type: ignore[misc]
    """The library's own connections, but for the bytes that a plain socket is asked for at a time."""

    def __init__(self, limits: Any) -> None:
        self._pool = core.ConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_WideBackend(),
        )

    def handle_request(self, request: Any) -> Any:
        """Send a request and return the response, its body not yet read."""
        url = request.url
        asked = core.Request(
            method=request.method,
            url=core.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _renamed():
            answer = self._pool.handle_request(asked)
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Body(answer.stream), extensions=answer.extensions
        )

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()


class _Body(httpx.SyncByteStream):  # type: ignore[misc]
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        with _renamed():
            yield from self._stream

    def close(self) -> None:
        self._stream.close()


@contextmanager
def _renamed() -> Iterator[None]:
    """Raise the errors of the lower library as those of the upper one, which gave them the same names."""
    try:
        yield
    except (core.TimeoutException, core.NetworkError, core.ProtocolError, core.UnsupportedProtocol) as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error


class _WideBackend(core.SyncBackend):  # type: ignore[misc]
    def connect_tcp(self, *args: Any, **kwargs: Any) -> Any:
        return _WideStream(super().connect_tcp(*args, **kwargs))


class _WideStream(core.NetworkStream):  # type: ignore[misc]
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._stream.read(max(max_bytes, _WIDTH), timeout)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **kwargs: Any) -> Any:
        # As it is: TLS hands out one record of 16 KiB at a time, whatever it is asked for.
        return self._stream.start_tls(*args, **kwargs)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
