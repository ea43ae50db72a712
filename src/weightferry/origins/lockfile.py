"""Sources pinned in a file: what was resolved where there is a network is not asked again where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightferry.errors import BadRequest, SourceNotFound
from weightferry.hashing import Checksum
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.origins.base import Origin, is_below, origin_for, suggest_similar
from weightferry.settings import Settings
from weightferry.sources import Source

_VERSION = 1

Content = Callable[[PinnedSource, File], bytes | None]
"""Returns the bytes of a file that is there already."""


@dataclass(frozen=True)
class Lockfile:
    """What a lock file says.

    Attributes
    ----------
    path : Path
        Of the file, for errors.
    sources : tuple of Pinned
        With their commits, and sizes and checksums of their files.
    """

    path: Path
    sources: tuple[PinnedSource, ...]

    @classmethod
    def load(cls, path: Path) -> Lockfile:
        """Read it.

        Raises
        ------
        BadRequest
            It is not there, or no lock file of this version.
        """
        try:
            said = json.loads(path.read_text())
            if said["version"] != _VERSION:
                raise BadRequest(f"this lock file is of version {said['version']}, not {_VERSION}", subject=str(path))
            return cls(path, tuple(_pinned(one) for one in said["sources"]))
        except OSError as error:
            raise BadRequest(f"the lock file cannot be read: {error.strerror or error}", subject=str(path)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, BadRequest):
                raise
            raise BadRequest(f"no lock file: {type(error).__name__}: {error}", subject=str(path)) from error

    @staticmethod
    def text(manifest: Manifest) -> str:
        """Make the content of a lock file.

        Raises
        ------
        BadRequest
            A source's URL holds a signature: it would be a secret in a file, and ends some day.
        """
        sources = [_said(pinned) for pinned in manifest.sources]
        return json.dumps({"version": _VERSION, "sources": sources}, indent=2) + "\n"

    def origins(self, held: Content) -> Callable[[str, Settings], Origin]:
        """Return what makes origins that resolve from this file; they read as the real ones do.

        Parameters
        ----------
        held
            Asked first for the content of files that are read to resolve, such as an index of shards.
        """

        def make(scheme: str, settings: Settings) -> Origin:
            return _LockedOrigin(self, scheme, settings, held)

        return make


class _LockedOrigin:
    """An origin that asks nobody what there is; see `Origin`."""

    def __init__(self, lock: Lockfile, scheme: str, settings: Settings, held: Content) -> None:
        self._lock, self._scheme, self._settings, self._held = lock, scheme, settings, held
        self._real: Origin | None = None

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        pinned = self._find(source)
        single = pinned.source.path
        files = tuple(file for file in pinned.files if any(is_below(file.path, path) for path in paths))
        for path in () if single else paths:
            if not any(is_below(file.path, path) for file in files):
                hint = suggest_similar(path, [file.path for file in pinned.files])
                raise SourceNotFound(f"{path} is not in the lock file {self._lock.path}{hint}", subject=str(source))
        return replace(pinned, files=files)

    def _find(self, source: Source) -> PinnedSource:
        for pinned in self._lock.sources:
            known = pinned.source
            root = f"{known.root}/{known.path}" if known.path and source.root != known.root else known.root
            same = (known.scheme, root, known.repo_type) == (source.scheme, source.root, source.repo_type)
            if same and source.revision in (None, known.revision, pinned.commit):
                return pinned
        there = ", ".join(str(replace(pinned.source, path="")) for pinned in self._lock.sources)
        raise SourceNotFound(f"not in the lock file {self._lock.path}, which has {there}", subject=str(source))

    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """See `Origin.read`."""
        content = self._held(pinned, pinned.file(path))
        if content is not None:
            return _opened(content[start:stop])
        self._real = self._real or origin_for(self._scheme, self._settings)
        return self._real.read(pinned, path, start, stop)

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`."""

    def close(self) -> None:
        """See `Origin.close`."""
        if self._real is not None:
            self._real.close()


@contextmanager
def _opened(content: bytes) -> Iterator[Iterator[bytes]]:
    yield iter((content,))


def _said(pinned: PinnedSource) -> dict[str, Any]:
    source = pinned.source
    if source.query and not source.identity.endswith(f"?{source.query}"):
        raise BadRequest("a URL with a signature cannot be locked", subject=str(source))
    return {
        "scheme": source.scheme,
        "root": source.root,
        "path": source.path,
        "revision": source.revision,
        "repo_type": source.repo_type,
        "query": source.query,
        "commit": pinned.commit,
        "files": [
            {
                "path": file.path,
                "size": file.size,
                "checksum": [file.checksum.algorithm, file.checksum.hexdigest] if file.checksum else None,
                "version": file.version,
                "ranges": file.ranges,
            }
            for file in pinned.files
        ],
    }


def _pinned(said: dict[str, Any]) -> PinnedSource:
    source = Source(
        said["scheme"], said["root"], said["path"], said["revision"], repo_type=said["repo_type"], query=said["query"]
    )
    for one in said["files"]:
        if not isinstance(one["size"], int | None):
            raise ValueError(f"the size of {one['path']} is {one['size']!r}")
    files = tuple(
        File(
            one["path"],
            one["size"],
            Checksum(*one["checksum"]) if one["checksum"] else None,
            one["version"],
            one["ranges"],
        )
        for one in said["files"]
    )
    return PinnedSource(source, said["commit"], files)
