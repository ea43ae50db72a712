"""Lock files: pinned sources in a file, so that a job without a network needs no metadata from an origin."""

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
from weightferry.origins.base import Origin, is_below, suggest_similar
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.sources import Source

_VERSION = 1

ReadCached = Callable[[PinnedSource, File], bytes | None]
"""Returns the bytes of a file that a cache already has; None if no cache has it."""


@dataclass(frozen=True)
class Lockfile:
    """The content of a lock file.

    Attributes
    ----------
    path : Path
        Path of the lock file, for error texts.
    sources : tuple of PinnedSource
        The sources with their commits, and the sizes and checksums of their files.
    """

    path: Path
    sources: tuple[PinnedSource, ...]

    @classmethod
    def load(cls, path: Path) -> Lockfile:
        """Read a lock file.

        Raises
        ------
        BadRequest
            The file cannot be read, is not a lock file, or is a lock file of another version.
        """
        try:
            data = json.loads(path.read_text())
            if data["version"] != _VERSION:
                raise BadRequest(
                    f"the lock file has version {data['version']}, but this release reads version {_VERSION}; make it "
                    "again with `weightferry prefetch`",
                    subject=str(path),
                )
            return cls(path, tuple(_from_json(source) for source in data["sources"]))
        except OSError as error:
            raise BadRequest(f"the lock file cannot be read: {error.strerror or error}", subject=str(path)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, BadRequest):
                raise
            raise BadRequest(
                f"not a lock file: {type(error).__name__}: {error}. Make one with `weightferry prefetch`",
                subject=str(path),
            ) from error

    @staticmethod
    def text(manifest: Manifest) -> str:
        """Return the content of a lock file for `manifest`.

        Raises
        ------
        BadRequest
            The URL of a source has a signature: it would be a secret in a file, and it expires.
        """
        sources = [_to_json(pinned) for pinned in manifest.sources]
        return json.dumps({"version": _VERSION, "sources": sources}, indent=2) + "\n"

    def origins(self, read_cached: ReadCached) -> Callable[[str, Settings], Origin]:
        """Return a factory of origins that resolve from this lock file and read from the real origin.

        Parameters
        ----------
        read_cached
            Called first for the content of a file that is read while resolving, such as an index of shards.
        """

        def create(scheme: str, settings: Settings) -> Origin:
            return _LockedOrigin(self, scheme, settings, read_cached)

        return create


class _LockedOrigin:
    """An origin that takes all metadata from a lock file; see `Origin`."""

    def __init__(self, lock: Lockfile, scheme: str, settings: Settings, read_cached: ReadCached) -> None:
        self._lock, self._scheme, self._settings, self._read_cached = lock, scheme, settings, read_cached
        self._real: Origin | None = None

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        pinned = self._find(source)
        is_single_file = bool(pinned.source.path)
        files = tuple(file for file in pinned.files if any(is_below(file.path, path) for path in paths))
        for path in () if is_single_file else paths:
            if not any(is_below(file.path, path) for file in files):
                hint = suggest_similar(path, [file.path for file in pinned.files])
                raise SourceNotFound(f"{path} is not in the lock file {self._lock.path}{hint}", subject=str(source))
        return replace(pinned, files=files)

    def _find(self, source: Source) -> PinnedSource:
        for pinned in self._lock.sources:
            locked = pinned.source
            root = f"{locked.root}/{locked.path}" if locked.path and source.root != locked.root else locked.root
            same = (locked.scheme, root, locked.repo_type) == (source.scheme, source.root, source.repo_type)
            if same and source.revision in (None, locked.revision, pinned.commit):
                return pinned
        names = ", ".join(str(replace(pinned.source, path="")) for pinned in self._lock.sources)
        raise SourceNotFound(f"not in the lock file {self._lock.path}, which has {names}", subject=str(source))

    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """See `Origin.read`."""
        content = self._read_cached(pinned, pinned.file(path))
        if content is not None:
            return _open_bytes(content[start:stop])
        self._real = self._real or origin_for(self._scheme, self._settings)
        return self._real.read(pinned, path, start, stop)

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`; does nothing, since resolving needs no access."""

    def close(self) -> None:
        """See `Origin.close`."""
        if self._real is not None:
            self._real.close()


@contextmanager
def _open_bytes(content: bytes) -> Iterator[Iterator[bytes]]:
    yield iter((content,))


def _to_json(pinned: PinnedSource) -> dict[str, Any]:
    source = pinned.source
    if source.query and not source.identity.endswith(f"?{source.query}"):
        raise BadRequest(
            "a URL with a signature cannot be written to a lock file: it is a secret and expires", subject=str(source)
        )
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


def _from_json(data: dict[str, Any]) -> PinnedSource:
    source = Source(
        data["scheme"], data["root"], data["path"], data["revision"], repo_type=data["repo_type"], query=data["query"]
    )
    for file in data["files"]:
        if not isinstance(file["size"], int | None):
            raise ValueError(f"the size of {file['path']} is {file['size']!r}")
    files = tuple(
        File(
            file["path"],
            file["size"],
            Checksum(*file["checksum"]) if file["checksum"] else None,
            file["version"],
            file["ranges"],
        )
        for file in data["files"]
    )
    return PinnedSource(source, data["commit"], files)
