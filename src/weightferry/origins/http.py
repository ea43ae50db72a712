"""Plain http(s) files, and the ranged GET that the Hub shares."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any
from urllib.parse import quote

from huggingface_hub.errors import HfHubHTTPError

from weightferry.errors import AccessDenied, CollectError, OriginError, SourceChanged, SourceNotFound, redact
from weightferry.manifest import File, Pinned, listing_commit
from weightferry.origins.base import RangeIgnored, Silent, TransientOriginError, Unreachable
from weightferry.settings import Settings
from weightferry.sources import Source

# huggingface_hub speaks through httpx (1.x) or httpx2 (2.x). We use the same one, so that the process has one HTTP
# library, and so that the errors of its sessions are caught by the right classes.
_LIBRARY = next(kind.__module__ for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx"))
httpx: Any = import_module(_LIBRARY.partition(".")[0])


class _Redacting(logging.Filter):
    """Hides secrets in what the HTTP library logs: at INFO, the URL of every request, with its signature."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


# The second ones log the headers of every response at DEBUG; a redirect's Location holds a signature.
_CORE = httpx.__name__.replace("httpx", "httpcore")
for _name in (httpx.__name__, f"{_CORE}.http11", f"{_CORE}.http2"):
    logging.getLogger(_name).addFilter(_Redacting())

# 408 and 425 ask for another try by their definition, 429 by RFC 6585; 5xx are the server's own troubles, of which
# 501 and 505 will not pass.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_IDENTITY = {"Accept-Encoding": "identity"}


def timeouts(settings: Settings) -> Any:
    """Seconds for each wait of a request; a body may take as long as it likes while it moves."""
    # Shorter than a stall: a connection is given up and made anew before the operation is.
    return httpx.Timeout(min(settings.read_timeout, settings.stall_timeout / 3), connect=settings.connect_timeout)


class HttpOrigin:
    """Files behind http(s) URLs. They are pinned by ETag, else by modification time and size."""

    def __init__(self, settings: Settings) -> None:
        self._client = httpx.Client(follow_redirects=True, timeout=timeouts(settings))

    def resolve(self, source: Source, paths: Sequence[str]) -> Pinned:
        """See `Origin.resolve`; one request a file, since http has no folders."""
        files = tuple(self._look(source, path) for path in paths)
        return Pinned(source, listing_commit(files), files)

    def _look(self, source: Source, path: str) -> File:
        response = self._head(source, path)
        ranges = response.headers.get("Accept-Ranges", "").lower() == "bytes" or response.status_code == 206
        if not ranges and response.request.method == "HEAD":
            # Not every server that sends ranges says so: the answer to a request for one tells, and the size too.
            response = self._first_byte(source, path)
            ranges = response.status_code == 206
        size = _total_size(response.headers, response.status_code)
        # Without any validator nothing says that a cached copy is still the file: this moment is then its version.
        version = _version(response.headers) or f"seen {time.time_ns()}"
        return File(path, size, version=version, ranges=ranges)

    def _head(self, source: Source, path: str) -> Any:
        """Ask for the headers of a file."""
        with translated(str(_named(source, path))):
            response = self._client.head(_url(source, path), headers=_IDENTITY)
            if response.status_code in (403, 405, 501):
                # Signed URLs are often signed for GET alone, and some servers know no HEAD.
                return self._first_byte(source, path)
            raise_for_status(response, str(_named(source, path)))
        return response

    def _first_byte(self, source: Source, path: str) -> Any:
        with (
            translated(str(_named(source, path))),
            self._client.stream("GET", _url(source, path), headers={**_IDENTITY, "Range": "bytes=0-0"}) as response,
        ):
            if response.status_code == 416:  # there is no first byte in an empty file
                return self._client.head(_url(source, path), headers=_IDENTITY)
            raise_for_status(response, str(_named(source, path)))
        return response

    def reach(self, pinned: Pinned, path: str) -> None:
        """See `Origin.reach`."""
        self._head(pinned.source, path)

    @contextmanager
    def read(self, pinned: Pinned, path: str, start: int = 0, stop: int | None = None) -> Iterator[Iterator[bytes]]:
        """See `Origin.read`."""
        source = pinned.source
        file = pinned.file(path)
        with get_range(self._client, _url(source, path), {}, str(_named(source, path)), start, stop) as response:
            seen = _version(response.headers)
            if seen and not file.version.startswith("seen ") and seen != file.version:
                raise SourceChanged(f"changed at the origin during the transfer ({file.version} became {seen})")
            yield response.iter_raw()


def _named(source: Source, path: str) -> Source:
    return Source(source.scheme, source.root, path, query=source.query)


def _url(source: Source, path: str) -> str:
    return f"{source.root}/{quote(path, safe='')}" + (f"?{source.query}" if source.query else "")


def _version(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _total_size(headers: Mapping[str, str], status: int) -> int | None:
    if status == 206:
        total = headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdigit() else None
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() and not headers.get("Content-Encoding") else None


@contextmanager
def get_range(
    client: Any, url: str, headers: Mapping[str, str], subject: str, start: int, stop: int | None, **options: Any
) -> Iterator[Any]:
    """Open a GET of bytes `start` to `stop` and yield the response, its body not yet read.

    Raises
    ------
    RangeIgnored
        The whole file came where a part of it was asked for.
    TransientOriginError, SourceNotFound, AccessDenied, OriginError
        By status; also out of the body's iteration, while this context is open.
    """
    asked = start > 0 or stop is not None
    last = "" if stop is None else str(stop - 1)
    sent = {**headers, **_IDENTITY, **({"Range": f"bytes={start}-{last}"} if asked else {})}
    with translated(subject), client.stream("GET", url, headers=sent, **options) as response:
        raise_for_status(response, subject)
        if asked and response.status_code != 206:
            raise RangeIgnored(subject)
        if asked and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OriginError(f"asked for {sent['Range']}, got {response.headers.get('Content-Range')!r}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise OriginError("the server compresses a body that was asked for as it is", subject=subject)
        yield response


@contextmanager
def translated(subject: str) -> Iterator[None]:
    """Turn the HTTP library's errors into ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(redact(f"{type(error).__name__}: {error}"), subject=subject) from error
    except httpx.ReadTimeout as error:
        raise Silent(redact(f"{type(error).__name__}: nothing came"), subject=subject) from error
    except httpx.TransportError as error:
        kind = type(error).__name__
        raise TransientOriginError(redact(f"{kind}: {error}"), subject=subject) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OriginError(redact(f"{type(error).__name__}: {error}"), subject=subject) from error


def raise_for_status(response: Any, subject: str) -> None:
    """Raise what a status means; 2xx means nothing."""
    if response.status_code >= 300:
        raise status_error(response.status_code, response.headers, subject)


def status_error(status: int, headers: Mapping[str, str], subject: str, said: str = "") -> CollectError:
    """Make the error for an HTTP status, with what the server `said` about it."""
    text = f"HTTP {status}" + (f": {redact(said)}" if said else "")
    if status in (401, 403):
        return AccessDenied(text, subject=subject)
    if status in (404, 410):
        return SourceNotFound(text, subject=subject)
    if status in _TRANSIENT:
        return TransientOriginError(text, subject=subject, retry_after=_retry_after(headers))
    return OriginError(text, subject=subject)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from ``Retry-After`` (RFC 9110), else from the Hub's ``RateLimit: "api";r=0;t=55``."""
    text = headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    if text:
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return None
    limit = re.search(r"\bt=(\d+)", headers.get("RateLimit", "")) if "r=0" in headers.get("RateLimit", "") else None
    return float(limit[1]) if limit else None
