"""The log of requests to a Hub server, and of the bytes that it sent."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["metadata", "redirect", "content", "other"]
Side = Literal["hub", "cdn"]


@dataclass(frozen=True)
class RequestRecord:
    """One request and its response.

    Attributes
    ----------
    side
        Which of the two addresses got the request: ``hub``, or ``cdn``, the target of the signed URLs.
    method
        ``GET``, ``HEAD`` or ``POST``.
    path
        Decoded, without the query.
    kind
        The purpose of the request, by its method and path, not by its response. ``metadata``: information about
        repositories and files (everything below ``/api`` except content, and every HEAD). ``content``: a GET of the
        bytes of a file. ``redirect``: a GET of ``/resolve/``, which costs the Hub a request and returns a location
        instead of bytes. ``other``: a path that the server does not know.
    file
        The requested file as ``org/name/path``, with ``datasets/`` or ``spaces/`` before it; empty if none.
    status
        Status of the response; 0 before the response, and if the connection ended without one.
    body_bytes
        Bytes of the body passed to the kernel, without headers and chunk framing. Exact when the client has read the
        body; up to 1 MiB too high while the server sends the body. It includes bytes in flight to a client that closed
        the connection.
    range
        The Range header; None if there is none.
    had_authorization
        Whether the request had an Authorization header.
    user_agent
        The User-Agent header.
    started
        The time when the server read the request, by `time.monotonic` (seconds).
    """

    side: Side
    method: str
    path: str
    kind: Kind
    file: str = ""
    status: int = 0
    body_bytes: int = 0
    range: str | None = None
    had_authorization: bool = False
    user_agent: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file in `body_bytes`: all of them, or 0 for an error or a redirect."""
        return self.body_bytes if self.kind == "content" and self.status in (200, 206) else 0


class OpenRecord:
    """The record of a request in progress; only the thread of its connection writes it."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self.status = 0
        self.body_bytes = 0

    def snapshot(self) -> RequestRecord:
        """Return the current state of the record."""
        return replace(self._record, status=self.status, body_bytes=self.body_bytes)


class RequestLog:
    """All records since the last `clear`, in the order of the requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[OpenRecord] = []

    def begin(self, record: RequestRecord) -> OpenRecord:
        """Add the record of a new request."""
        opened = OpenRecord(record)
        with self._lock:
            self._records.append(opened)
        return opened

    def records(self) -> list[RequestRecord]:
        """Return the current state of every record."""
        with self._lock:
            return [record.snapshot() for record in self._records]

    def clear(self) -> None:
        """Remove all records."""
        with self._lock:
            self._records = []


def summary(records: Iterable[RequestRecord]) -> dict[str, Any]:
    """Return the counters of ``/-/stats``, for clients in other processes."""
    kinds: Counter[str] = Counter({"metadata": 0, "redirect": 0, "content": 0, "other": 0})
    statuses: Counter[str] = Counter()
    files: Counter[str] = Counter()
    tokens_at_cdn = 0
    for record in records:
        kinds[record.kind] += 1
        statuses[str(record.status)] += 1
        tokens_at_cdn += record.side == "cdn" and record.had_authorization
        if record.file_bytes:
            files[record.file] += record.file_bytes
    return {
        "requests": dict(kinds),
        "statuses": dict(sorted(statuses.items())),
        "content_bytes": sum(files.values()),
        "content_bytes_by_file": dict(sorted(files.items())),
        "authorization_at_cdn": tokens_at_cdn,
    }
