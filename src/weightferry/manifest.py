"""What an operation will bring: every file of every source, pinned."""

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
        Below the source's root, with slashes; never climbs out.
    size : int or None
        Bytes; None where the origin does not say.
    checksum : Checksum or None
        What the origin publishes.
    version : str
        ETag, modification time or the like: another version is another file. Empty when the checksum says it all.
    ranges : bool
        Whether the origin sends any part of it; False: only the whole, in order.
    """

    path: str
    size: int | None
    checksum: Checksum | None = None
    version: str = ""
    ranges: bool = True

    def __post_init__(self) -> None:
        # An origin is not trusted with paths either.
        if safe_path(self.path) != self.path:
            raise ValueError(f"not in normal form: {self.path!r}")

    @property
    def key(self) -> str:
        """The name of its content in a cache: the published checksum, else a digest of path, size and version."""
        if self.checksum:
            return self.checksum.hexdigest
        return _digest((self.path, str(self.size), self.version))


@dataclass(frozen=True)
class PinnedSource:
    """A source with its commit pinned and its wanted files listed.

    Attributes
    ----------
    source : Source
        `source.path` names the file or folder that was asked for, below `source.root`.
    commit : str
        The git commit on the Hub; elsewhere a digest of paths, sizes and versions; empty for local folders.
    files : tuple of File
        What is wanted, in the origin's order.
    """

    source: Source
    commit: str
    files: tuple[File, ...]

    def __post_init__(self) -> None:
        # It names a folder of the cache.
        if self.commit and not self.commit.isalnum():
            raise ValueError(f"not a commit: {self.commit!r}")

    @property
    def in_place(self) -> bool:
        """Local sources are used where they are: nothing is copied, nothing is cached."""
        return self.source.scheme == "file"

    @property
    def name(self) -> str:
        """For readers: the source without its path, at its commit."""
        text = str(Source(self.source.scheme, self.source.root, "", None, self.source.repo_type, self.source.query))
        return f"{text}@{self.commit}" if self.source.scheme == "hf" else text

    def file(self, path: str) -> File:
        """Return the file at `path`; KeyError when it is not part of the manifest."""
        for file in self.files:
            if file.path == path:
                return file
        raise KeyError(path)


@dataclass(frozen=True)
class Manifest:
    """All sources of one operation, pinned by one rank and shared with all."""

    sources: tuple[PinnedSource, ...]

    def staged(self) -> Iterator[tuple[PinnedSource, File]]:
        """Every file that must be in the cache of every domain."""
        for pinned in self.sources:
            if not pinned.in_place:
                for file in pinned.files:
                    yield pinned, file

    @cached_property
    def first_with_content(self) -> tuple[int, ...]:
        """For each staged file the first with its content in its source: two names of it are one blob in the cache."""
        first: dict[tuple[int, str], int] = {}
        return tuple(
            first.setdefault((self.source_of(index), file.key), index) for index, (_, file) in enumerate(self.staged())
        )

    def contents(self) -> tuple[int, ...]:
        """Places of the staged files, each content of a source once."""
        return tuple(dict.fromkeys(self.first_with_content))

    def source_of(self, index: int) -> int:
        """Place in `sources` of the staged file at place `index`."""
        return self._sources_of_staged[index]

    @cached_property
    def _sources_of_staged(self) -> tuple[int, ...]:
        return tuple(n for n, pinned in enumerate(self.sources) if not pinned.in_place for _ in pinned.files)

    @property
    def size(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(file.size or 0 for pinned in self.sources for file in pinned.files)


def listing_commit(files: Iterable[File]) -> str:
    """Name the state of a source that has no commits: equal listings, equal name."""
    return _digest(part for file in sorted(files, key=lambda f: f.path) for part in (file.path, file.key))[:40]


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
