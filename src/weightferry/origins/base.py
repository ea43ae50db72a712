"""The Origin protocol, what its errors mean to a retry, and which module serves which scheme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

from weightferry.errors import BadRequest, Failure, OriginError
from weightferry.manifest import PinnedSource
from weightferry.settings import Settings
from weightferry.sources import Source

CHUNK_SIZE = 1 << 20
"""Bytes read at a time where an origin lets us choose."""


class Origin(Protocol):
    """Where bytes come from.

    An implementation classifies its errors: `TransientOriginError` may be tried again, every other
    `weightferry.errors.CollectError` is final. It never retries by itself. Several threads may use one at once; whoever
    made it closes it (`contextlib.closing`).
    """

    def __init__(self, settings: Settings) -> None: ...

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """Ask the metadata API what `paths` below `source.root` are now.

        Parameters
        ----------
        source
            Its own `path` is not looked at.
        paths
            Files or folders below the root; an empty one stands for the root itself. When the root turns out to be
            one file, the returned source has its parent as root and the file as path.

        Raises
        ------
        SourceNotFound, AccessDenied, OriginError
        """
        ...

    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """Open bytes `start` to `stop` (exclusive; None: to the end) of one file.

        Raises
        ------
        RangeIgnored
            `start` or `stop` was asked for, and the origin sends the whole file: read again from 0.
        SourceChanged
            The file is no longer the one that was pinned.
        SourceNotFound, AccessDenied, OriginError
        """
        ...

    def check_access(self, source: Source) -> None:
        """Ask whether this process can reach the origin and may read there: one cheap question, no second try.

        It is over within `Settings.connect_timeout` and `Settings.read_timeout`. With a `source.path` the question is
        about that file. Without one an answer of any kind will do where the origin, as plain http, knows only files.

        Raises
        ------
        Unreachable
            Nobody there, as seen from here.
        SourceNotFound, AccessDenied, OriginError
        """
        ...

    def close(self) -> None:
        """Give connections back. Nothing is read through it afterwards; closing again does nothing."""
        ...


class TransientOriginError(OriginError):
    """The origin may well answer next time.

    Attributes
    ----------
    retry_after : float or None
        Seconds that the origin asks for.
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
    """Nobody there: no such name, connection refused, or none within the connect time-out."""


class Silent(TransientOriginError):
    """The origin was reached, and then no byte came within the read time-out."""


class Busy(TransientOriginError):
    """The origin was reached, and has too much to do: fewer requests at a time may be answered."""


class RangeIgnored(Exception):
    """The origin answered a request for a range with the whole file."""


_MODULES = {
    "hf": "weightferry.origins.hub:HubOrigin",
    "http": "weightferry.origins.http:HttpOrigin",
    "https": "weightferry.origins.http:HttpOrigin",
    "file": "weightferry.origins.filesystem:FilesystemOrigin",
}
_OTHERS = "weightferry.origins.fsspec:FsspecOrigin"


def origin_for(scheme: str, settings: Settings) -> Origin:
    """Make the origin that serves `scheme`; whatever has no module of its own is left to fsspec.

    Raises
    ------
    BadRequest
        Nothing serves this scheme, or what serves it is not installed; the message says what to install.
    """
    module, _, name = _MODULES.get(scheme, _OTHERS).partition(":")
    made: Origin = getattr(import_module(module), name)(settings)
    return made


def is_below(name: str, path: str) -> bool:
    """Whether a file is what `path` names, or lies below it; an empty path names the root."""
    return path in ("", name) or name.startswith(f"{path}/")


def suggest_similar(wanted: str, there: Sequence[str]) -> str:
    """Make the hint for a misspelt name: the closest ones that exist."""
    from difflib import get_close_matches

    near = get_close_matches(wanted, there, n=3)
    return f"; closest there: {', '.join(near)}" if near else ""


def path_outside_source(path: str, subject: str) -> BadRequest:
    """Make the error for an origin that lists a path outside of itself."""
    return BadRequest(f"the origin lists {path!r}, which climbs out of the source: refused", subject=subject)
