"""The `Origin` protocol, and the errors that a retry may cure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from weightferry.errors import BadRequest, Failure, OriginError
from weightferry.manifest import PinnedSource
from weightferry.settings import Settings
from weightferry.sources import Source

CHUNK_SIZE = 1 << 20
"""Bytes of one read, for origins that let the reader choose."""


class Origin(Protocol):
    """A place that files are read from.

    An implementation classifies its errors: the caller may retry after a `TransientOriginError`; every other
    `weightferry.errors.CollectError` is final. An implementation never retries by itself. Several threads can use one
    origin at the same time. The code that creates an origin closes it (`contextlib.closing`).
    """

    def __init__(self, settings: Settings) -> None: ...

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """Look up the current commit, and the size and checksum of each file in `paths`.

        Parameters
        ----------
        source
            The source; its `path` is ignored.
        paths
            Files or folders below the root. An empty path stands for the root itself. If the root is a single file, the
            returned source has the parent folder as root and the file as path.

        Raises
        ------
        SourceNotFound, AccessDenied, OriginError
        """
        ...

    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Open the bytes from `start` to `stop` (exclusive; None: to the end) of one file.

        Raises
        ------
        RangeIgnored
            The origin ignores `start` and `stop` and sends the whole file. Read the file again from 0.
        SourceChanged
            The file at the origin is not the pinned version.
        SourceNotFound, AccessDenied, OriginError
        """
        ...

    def check_access(self, source: Source) -> None:
        """Check with one cheap request that this process can connect to the origin and may read from it.

        The check does not retry. It ends within `Settings.connect_timeout` plus `Settings.read_timeout`. If
        `source.path` is set, the check is about that file. Without a path, an origin that knows only files, such as
        plain http, passes the check with any answer.

        Raises
        ------
        Unreachable
            This process cannot connect to the origin.
        SourceNotFound, AccessDenied, OriginError
        """
        ...

    def close(self) -> None:
        """Close all connections; nothing can be read afterwards. A second call does nothing."""
        ...


class TransientOriginError(OriginError):
    """A failed request that may succeed if it is retried.

    Attributes
    ----------
    retry_after : float or None
        Seconds that the origin asks the client to wait; None if it does not ask.
    """

    def __init__(
        self,
        message: str,
        *,
        subject: str = "",
        failures: dict[int, Failure] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, subject=subject, failures=failures)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"retry_after": self.retry_after})


class Unreachable(TransientOriginError):
    """No connection: the name does not resolve, the connection is refused, or it is not made within the timeout."""


class Silent(TransientOriginError):
    """The connection was made, but no byte arrived within the read timeout."""


class Busy(TransientOriginError):
    """The origin answered that it is overloaded; fewer requests at the same time may succeed."""


class RangeIgnored(Exception):
    """The origin answered a range request with the whole file."""


def is_below(name: str, path: str) -> bool:
    """Return whether the file `name` is `path` or lies below it; an empty path is the root."""
    return path in ("", name) or name.startswith(f"{path}/")


def suggest_similar(name: str, existing: Sequence[str]) -> str:
    """Return the most similar existing names as the end of an error text; empty if no name is similar."""
    from difflib import get_close_matches

    similar = get_close_matches(name, existing, n=3)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def path_outside_source(path: str, subject: str) -> BadRequest:
    """Return the error for an origin whose listing has a path outside of the source."""
    return BadRequest(
        f"the origin lists the path {path!r}, which is outside of the source; do not trust this source", subject=subject
    )
