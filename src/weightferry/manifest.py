"""The manifest of an operation: every file of every source, pinned to a version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from weightferry.hashing import Checksum
from weightferry.sources import Source, safe_path


@dataclass(frozen=True)
class File:
    """One file of a source.

    Attributes
    ----------
    path : str
        Path below the root of the source, with slashes. It never leaves the root.
    size : int or None
        Bytes; None if the origin does not tell.
    checksum : Checksum or None
        Checksum that the origin publishes; None if it publishes none.
    version : str
        ETag, modification time or a similar validator: a file with another version is a different file. Empty if the
        checksum identifies the content.
    ranges : bool
        Whether the origin supports range requests for the file. False: the file can only be read from its start.
    """

    path: str
    size: int | None
    checksum: Checksum | None = None
    version: str = ""
    ranges: bool = True

    def __post_init__(self) -> None:
        # The path comes from the origin, which is not trusted.
        if safe_path(self.path) != self.path:
            raise ValueError(f"not a path in normal form: {self.path!r}")

    @property
    def key(self) -> str:
        """Name of the content in a cache: the published checksum, else a digest of path, size and version."""
        if self.checksum:
            return self.checksum.hexdigest
        return _digest((self.path, str(self.size), self.version))


@dataclass(frozen=True)
class PinnedSource:
    """A source at one commit, with the list of its requested files.

    Attributes
    ----------
    source : Source
        `source.path` is the requested file or folder below `source.root`.
    commit : str
        For the Hub the git commit. For local folders empty. For any other source a digest of paths, sizes and versions.
    files : tuple of File
        The requested files, in the order of the origin's listing.
    """

    source: Source
    commit: str
    files: tuple[File, ...]

    def __post_init__(self) -> None:
        # The commit becomes a folder name in the cache.
        if self.commit and not self.commit.isalnum():
            raise ValueError(f"not a commit: {self.commit!r}")

    @property
    def in_place(self) -> bool:
        """Whether the files are used where they are, without a copy in the cache: true for local sources."""
        return self.source.scheme == "file"

    @property
    def name(self) -> str:
        """Display name: the source without its path, with its commit."""
        text = str(Source(self.source.scheme, self.source.root, "", None, self.source.repo_type, self.source.query))
        return f"{text}@{self.commit}" if self.source.scheme == "hf" else text

    def file(self, path: str) -> File:
        """Return the file at `path`; raise `KeyError` if it is not part of the manifest."""
        for file in self.files:
            if file.path == path:
                return file
        raise KeyError(path)


@dataclass(frozen=True)
class Manifest:
    """All sources of one operation. One rank makes it, and every rank receives it."""

    sources: tuple[PinnedSource, ...]

    def staged(self) -> Iterator[tuple[PinnedSource, File]]:
        """Yield every file that must be in the cache of every storage domain."""
        for pinned in self.sources:
            if not pinned.in_place:
                for file in pinned.files:
                    yield pinned, file

    @cached_property
    def first_with_content(self) -> tuple[int, ...]:
        """For each staged file, the index of the first staged file of its source with the same content.

        Files with the same content share one blob in the cache.
        """
        first: dict[tuple[int, str], int] = {}
        return tuple(
            first.setdefault((self.source_of(index), file.key), index) for index, (_, file) in enumerate(self.staged())
        )

    def contents(self) -> tuple[int, ...]:
        """Return indices of staged files, one index for each distinct content of a source."""
        return tuple(dict.fromkeys(self.first_with_content))

    def source_of(self, index: int) -> int:
        """Return the index in `sources` of the source of the staged file `index`."""
        return self._sources_of_staged[index]

    @cached_property
    def _sources_of_staged(self) -> tuple[int, ...]:
        return tuple(number for number, pinned in enumerate(self.sources) if not pinned.in_place for _ in pinned.files)

    @property
    def size(self) -> int:
        """Total bytes of all files whose size is known."""
        return sum(file.size or 0 for pinned in self.sources for file in pinned.files)


def listing_commit(files: Iterable[File]) -> str:
    """Return a commit id for a source without commits: equal listings have equal ids."""
    return _digest(part for file in sorted(files, key=lambda file: file.path) for part in (file.path, file.key))[:40]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
