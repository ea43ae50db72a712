"""A GET request for a file or a range of it, and the check of its response; used for plain http and the Hub."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from weightferry.errors import AccessDenied, CollectError, OriginError, SourceChanged, SourceNotFound, redact
from weightferry.origins.base import Busy, RangeIgnored, RateLimited, TransientOriginError
from weightferry.origins.transport import Response

# By definition a client may retry after 408 and 425, and after 429 by RFC 6585. 5xx are errors of the server; 501 and
# 505 are not in the set since they are permanent.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_BUSY = {429, 503, 529}
IDENTITY = {"Accept-Encoding": "identity"}
"""Asks for uncompressed bytes: a range of compressed bytes is not a range of the file."""


@dataclass(frozen=True)
class RangeRequest:
    """A GET request for a file or a range of it.

    Attributes
    ----------
    url
        May contain a signature, so it is never shown.
    subject
        Name of the file in error texts.
    start, stop
        Range in bytes; `stop` is exclusive. None: to the end.
    headers
        Additional headers.
    size
        Expected size of the whole file in bytes; None if unknown.
    version
        Result of `version_of` when the file was pinned; empty if unknown.
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
        """Whether the request is for a range and not for the whole file."""
        return self.start > 0 or self.stop is not None

    @property
    def request_headers(self) -> dict[str, str]:
        """All headers of the request."""
        headers = {**self.headers, **IDENTITY}
        if self.is_partial:
            headers["Range"] = f"bytes={self.start}-" + ("" if self.stop is None else str(self.stop - 1))
            if self.version.startswith('"'):  # RFC 9110 requires a strong ETag here
                headers["If-Range"] = self.version
        return headers

    def check(self, response: Response) -> None:
        """Raise unless the response has the requested bytes of the pinned file; see `get_range` for the errors."""
        status, headers = response.status, response.headers
        self._check_unchanged(status, headers)
        raise_for_status(response, self.subject)
        if self.is_partial and status != 206:
            raise RangeIgnored(self.subject)
        if self.is_partial and not headers.get("Content-Range", "").startswith(f"bytes {self.start}-"):
            raise OriginError(
                f"the server answered the request for {self.request_headers['Range']} with "
                f"Content-Range {headers.get('Content-Range')!r}",
                subject=self.subject,
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise OriginError("the server compressed the body, against Accept-Encoding: identity", subject=self.subject)

    def _check_unchanged(self, status: int, headers: Mapping[str, str]) -> None:
        """Raise `SourceChanged` if the status, the version or the size shows another file than the pinned one."""
        range_beyond_end = status == 416 and self.size is not None and self.start < self.size
        if status == 412 or range_beyond_end:
            raise self._changed(f"HTTP {status}")
        if status not in (200, 206):
            return
        version, size = version_of(headers), total_size(headers, status)
        if self.version and version and version != self.version:
            raise self._changed(f"{self.version} became {version}")
        if self.size is not None and size is not None and size != self.size:
            raise self._changed(f"{self.size} bytes became {size}")

    def _changed(self, change: str) -> SourceChanged:
        return SourceChanged(
            f"changed at the origin during the transfer: {change}. Start the transfer again", subject=self.subject
        )


class Client(Protocol):
    """Sends requests; `HttpClient` and the clients of the Hub do."""

    def stream(self, method: str, url: str, *, headers: Mapping[str, str], subject: str) -> Any:
        """See `HttpClient.stream`."""


@contextmanager
def get_range(client: Client, request: RangeRequest) -> Iterator[Response]:
    """Send a GET and yield the response before its body is read.

    Raises
    ------
    RangeIgnored
        The server sends the whole file instead of the requested range.
    SourceChanged
        The version, the size or the status shows that the file is not the pinned one.
    TransientOriginError, SourceNotFound, AccessDenied, OriginError
        By the status; also while the body is read.
    """
    headers = request.request_headers
    with client.stream("GET", request.url, headers=headers, subject=request.subject) as response:
        request.check(response)
        yield response


def raise_for_status(response: Response, subject: str) -> None:
    """Raise the error of a status of 300 or more."""
    if response.status >= 300:
        raise status_error(response.status, response.headers, subject)


def status_error(status: int, headers: Mapping[str, str], subject: str, detail: str = "") -> CollectError:
    """Return the error for an HTTP status; `detail` is the explanation of the server."""
    text = f"HTTP {status}" + (f": {redact(detail)}" if detail else "")
    if status in (401, 403):
        return AccessDenied(text, subject=subject)
    if status in (404, 410):
        return SourceNotFound(text, subject=subject)
    if status in _TRANSIENT:
        kind = RateLimited if status == 429 else Busy if status in _BUSY else TransientOriginError
        return kind(text, subject=subject, retry_after=_retry_after(headers))
    return OriginError(text, subject=subject)


def version_of(headers: Mapping[str, str]) -> str:
    """Return the validator of a file's version: its ETag, else its modification time; empty if there is neither."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def total_size(headers: Mapping[str, str], status: int) -> int | None:
    """Return the bytes of the whole file, if the response to a GET or HEAD tells."""
    if status in (206, 416):
        total = headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdigit() else None
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() and not headers.get("Content-Encoding") else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of ``Retry-After`` (RFC 9110), else of the Hub's ``RateLimit: "api";r=0;t=55``."""
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
