"""One GET of a file or of a range of it, and what its answer means; shared by plain http and the Hub."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from weightferry.errors import AccessDenied, CollectError, OriginError, SourceChanged, SourceNotFound, redact
from weightferry.origins.base import Busy, RangeIgnored, Silent, TransientOriginError, Unreachable
from weightferry.origins.transport import httpx

# 408 and 425 ask for another try by their definition, 429 by RFC 6585; 5xx are the server's own troubles, of which
# 501 and 505 will not pass.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_BUSY = {429, 503, 529}
IDENTITY = {"Accept-Encoding": "identity"}
"""Bytes as they are: a range of compressed bytes is no range of the file."""


@dataclass(frozen=True)
class RangeRequest:
    """What a GET asks for.

    Attributes
    ----------
    url
        May hold a signature: never shown.
    subject
        The file, for error texts.
    start, stop
        Bytes, `stop` exclusive; None: to the end.
    headers
        Sent along.
    size
        Of the whole file, in bytes, as it was promised; None: not known.
    version
        What `version_of` said when the file was pinned; empty: not known.
    """

    url: str = field(repr=False)
    subject: str
    start: int = 0
    stop: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    size: int | None = None
    version: str = ""

    @property
    def is_partial(self) -> bool:
        """Whether less than the whole is asked for."""
        return self.start > 0 or self.stop is not None

    @property
    def request_headers(self) -> dict[str, str]:
        """The headers of the request."""
        request_headers = {**self.headers, **IDENTITY}
        if self.is_partial:
            request_headers["Range"] = f"bytes={self.start}-" + ("" if self.stop is None else str(self.stop - 1))
            if self.version.startswith('"'):  # RFC 9110 wants a strong ETag here
                request_headers["If-Range"] = self.version
        return request_headers

    def check(self, response: Any) -> None:
        """Raise unless the answer is these bytes of this file; see `get_range`."""
        status, headers = response.status_code, response.headers
        self._same_file(status, headers)
        raise_for_status(response, self.subject)
        if self.is_partial and status != 206:
            raise RangeIgnored(self.subject)
        if self.is_partial and not headers.get("Content-Range", "").startswith(f"bytes {self.start}-"):
            raise OriginError(
                f"asked for {self.request_headers['Range']}, got {headers.get('Content-Range')!r}", subject=self.subject
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise OriginError("the server compresses a body that was asked for as it is", subject=self.subject)

    def _same_file(self, status: int, headers: Mapping[str, str]) -> None:
        """Raise when the file is not the one that was pinned, whatever way the server has to say so."""
        beyond_its_end = status == 416 and self.size is not None and self.start < self.size
        if status == 412 or beyond_its_end:
            raise self._changed(f"HTTP {status}")
        if status not in (200, 206):
            return
        seen, size = version_of(headers), total_size(headers, status)
        if self.version and seen and seen != self.version:
            raise self._changed(f"{self.version} became {seen}")
        if self.size is not None and size is not None and size != self.size:
            raise self._changed(f"{self.size} bytes became {size}")

    def _changed(self, how: str) -> SourceChanged:
        return SourceChanged(f"changed at the origin during the transfer ({how})", subject=self.subject)


@contextmanager
def get_range(client: Any, wanted: RangeRequest, **options: Any) -> Iterator[Any]:
    """Open a GET and yield the response, its body not yet read.

    Raises
    ------
    RangeIgnored
        The whole file came where a part of it was asked for.
    SourceChanged
        By its version or size, or by what the server says, it is another file than the one that was pinned.
    TransientOriginError, SourceNotFound, AccessDenied, OriginError
        By status; also out of the body's iteration, while this context is open.
    """
    with (
        translate_http_errors(wanted.subject),
        client.stream("GET", wanted.url, headers=wanted.request_headers, **options) as response,
    ):
        wanted.check(response)
        yield response


@contextmanager
def translate_http_errors(subject: str) -> Iterator[None]:
    """Turn the HTTP library's errors into ours."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        kind = next((ours for theirs, ours in _KINDS if isinstance(error, theirs)), OriginError)
        raise kind(redact(f"{type(error).__name__}: {error}"), subject=subject) from error


_KINDS: tuple[tuple[Any, type[OriginError]], ...] = (
    ((httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError), Unreachable),
    (httpx.ReadTimeout, Silent),
    (httpx.TransportError, TransientOriginError),
)


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
        kind = Busy if status in _BUSY else TransientOriginError
        return kind(text, subject=subject, retry_after=_retry_after(headers))
    return OriginError(text, subject=subject)


def version_of(headers: Mapping[str, str]) -> str:
    """What tells one state of a file from another."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def total_size(headers: Mapping[str, str], status: int) -> int | None:
    """Bytes of the whole file, as far as the answer to a GET or HEAD tells."""
    if status in (206, 416):
        total = headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdigit() else None
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() and not headers.get("Content-Encoding") else None


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
