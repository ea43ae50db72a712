"""The Origin protocol, what its errors mean to a retry, and which module serves which scheme."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

from weightferry.errors import BadRequest, Failure, OriginError
from weightferry.manifest import Pinned
from weightferry.settings import Settings
from weightferry.sources import Source

CHUNK = 1 << 20
"""Bytes read at a time where an origin lets us choose."""


class Origin(Protocol):
    """Where bytes come from.

    An implementation classifies its errors: `TransientOriginError` may be tried again, every other
    `weightferry.errors.CollectError` is final. It never retries by itself.
    """

    def __init__(self, settings: Settings) -> None: ...

    def resolve(self, source: Source, paths: Sequence[str]) -> Pinned:
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

    def reach(self, pinned: Pinned, path: str) -> None:
        """Ask, without its content, whether this process may read a file: one request, no second try.

        Raises
        ------
        Unreachable
            There is no way to the origin from here.
        SourceNotFound, AccessDenied, OriginError
        """
        ...

    def read(
        self, pinned: Pinned, path: str, start: int = 0, stop: int | None = None
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


class Silent(TransientOriginError):
    """The origin sends nothing more, and the connection was given up."""


class Unreachable(TransientOriginError):
    """There is no way to the origin at this moment: no such name, nobody listens, no answer to a connection."""


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


def closest(wanted: str, there: Sequence[str]) -> str:
    """Make the hint for a misspelt name: the closest ones that exist."""
    from difflib import get_close_matches

    near = get_close_matches(wanted, there, n=3)
    return f"; closest there: {', '.join(near)}" if near else ""


def reject_climbing(path: str, subject: str) -> BadRequest:
    """Make the error for an origin that lists a path outside of itself."""
    return BadRequest(f"the origin lists {path!r}, which climbs out of the source: refused", subject=subject)
