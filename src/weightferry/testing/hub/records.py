"""What a Hub server was asked and what it sent."""

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
    """One request and what became of it.

    Attributes
    ----------
    side
        Which of the two addresses was asked: ``hub``, or ``cdn`` where the links to LFS files lead.
    method
        ``GET``, ``HEAD`` or ``POST``.
    path
        Decoded, without the query.
    kind
        What the request was for, by its method and path and not by its outcome. ``metadata``: an answer about
        repositories and files (everything under ``/api`` but content, and every HEAD). ``content``: a GET of a file's
        bytes. ``redirect``: a GET of ``/resolve/``, which costs the Hub a request and yields no byte of the file: it
        only points to where the content is. ``other``: paths that the server does not know.
    file
        The file in question as ``org/name/path``, with ``datasets/`` or ``spaces/`` before it; empty if none.
    status
        Of the answer; 0 as long as there is none, and for ever if the connection ended without one.
    body_bytes
        Bytes of the answer's body handed to the kernel, without headers and chunk framing. Exact once the client has
        read the body; up to 1 MiB ahead of the truth while the body is on its way. Bytes in flight to a client that
        hung up are counted.
    range
        The Range header, None without.
    had_authorization
        Whether an Authorization header came along.
    user_agent
        The User-Agent header.
    started
        When the request was read, by `time.monotonic` (seconds).
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
        """Bytes of the file in `body_bytes`: all of them, or none where the answer is an error or a redirect."""
        return self.body_bytes if self.kind == "content" and self.status in (200, 206) else 0


class OpenRecord:
    """A record that is still being written; the thread of its connection is the only writer."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self.status = 0
        self.body_bytes = 0

    def record(self) -> RequestRecord:
        """Return it as it is now."""
        return replace(self._record, status=self.status, body_bytes=self.body_bytes)


class RequestLog:
    """All lines since the last `clear`, in the order in which the requests came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: list[OpenRecord] = []

    def begin(self, record: RequestRecord) -> OpenRecord:
        """Open the line of a request."""
        line = OpenRecord(record)
        with self._lock:
            self._lines.append(line)
        return line

    def records(self) -> list[RequestRecord]:
        """Return every record as it is now."""
        with self._lock:
            return [line.record() for line in self._lines]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._lines = []


def summary(records: Iterable[RequestRecord]) -> dict[str, Any]:
    """Count, for readers in other processes: the JSON of ``/-/stats``."""
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
