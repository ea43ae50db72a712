"""A big file that arrives in the cache: written in any order, hashed in order, published when its checksum matches."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from weightferry.cache.layout import CacheLayout
from weightferry.cache.partial import PartialFile, WrittenRange
from weightferry.cache.publish import publish
from weightferry.errors import error_context
from weightferry.hashing import Hashes
from weightferry.manifest import File, PinnedSource

BLOCK = 4 << 20
"""Bytes of each block of a damaged file that is compared between domains."""
_HASH_BATCH = 64 << 20
"""Bytes of a file that are hashed before another file gets its turn."""


@dataclass(frozen=True)
class ChecksumMismatch:
    """A file whose bytes do not have the published checksum.

    Attributes
    ----------
    actual : str
        Digest of the bytes, by the algorithm of the origin.
    block_crcs : tuple of int
        CRC-32 of each 4 MiB block, to find out which domain has which block wrong.
    """

    actual: str
    block_crcs: tuple[int, ...]


class IncomingFile:
    """Takes the bytes of one file, from the origin or from a peer. Safe to use from several threads.

    Parameters
    ----------
    layout, entry
        The cache, and the file in it.
    path
        Of the partial file.
    ranges
        The ranges that an earlier transfer left in it.
    pool
        Runs the hashing and the publishing.
    on_finished
        Called once, from the pool: with the SHA-256 of the published file, with a `ChecksumMismatch`, or with the error
        that prevented publishing.
    """

    def __init__(
        self,
        layout: CacheLayout,
        entry: tuple[PinnedSource, File],
        path: Path,
        ranges: list[WrittenRange],
        pool: Executor,
        on_finished: Callable[[str | ChecksumMismatch | Exception], None],
    ) -> None:
        self._layout, (self.pinned, self.file), self.path = layout, entry, path
        self.size = self.file.size
        self._ranges, self._pool, self._on_finished = ranges, pool, on_finished
        self._lock = Lock()
        self._opened: PartialFile | None = None
        self._hashes, self._hashed = Hashes(self.file.checksum, self.file.size), 0
        self._hashing = self._published = False

    def __repr__(self) -> str:
        return f"IncomingFile({self.pinned.name}/{self.file.path}, hashed {self._hashed} of {self.size})"

    @property
    def partial(self) -> PartialFile:
        """The partial file, opened when it is first needed: a process may open fewer files than a transfer has."""
        partial = self._unpublished()
        if partial is None:
            raise RuntimeError(f"{self!r} is published")
        return partial

    def _unpublished(self) -> PartialFile | None:
        """Return the partial file, or None if the file is published.

        Both in one step: otherwise a thread that looks for bytes while the file is published opens a new, empty partial
        file.
        """
        with self._lock:
            if self._published:
                return None
            if self._opened is None:
                self._opened = PartialFile(self.path, self.size, self.file.key, self._ranges)
            return self._opened

    def begin(self) -> None:
        """Take the space on the disk, and hash the bytes that an earlier transfer left."""
        self.partial  # noqa: B018 -- opens it
        self._continue_hashing()

    def record(self, written: WrittenRange) -> None:
        """Record that a range of bytes was written to `partial`."""
        self.partial.record(written)
        self._continue_hashing()

    def set_size(self, size: int) -> None:
        """Set the size of a file whose origin did not publish it."""
        self.size = size
        self._continue_hashing()

    def covers(self, start: int, stop: int) -> bool:
        """Return whether all bytes from `start` to `stop` are present."""
        partial = self._unpublished()
        return partial is None or partial.covers(start, stop)

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the ranges between `start` and `stop` that are not present."""
        partial = self._unpublished()
        return [] if partial is None else partial.missing(start, stop)

    def open(self, flags: int) -> int:
        """Open the partial file, or the published one if it was published meanwhile."""
        try:
            return os.open(self.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return os.open(self._layout.blob(self.pinned, self.file), flags | os.O_CLOEXEC)

    def _continue_hashing(self) -> None:
        with self._lock:
            if not self._hashing and self._has_bytes_to_hash():
                self._hashing = True
                with contextlib.suppress(RuntimeError):  # the pool was shut down because the transfer has failed
                    self._pool.submit(self._hash)

    def _has_bytes_to_hash(self) -> bool:
        if self._published or self._opened is None:
            return False
        return self._opened.contiguous_end(self._hashed) > self._hashed or self._hashed == self.size

    def _hash(self) -> None:
        try:
            partial = self.partial
            end = min(partial.contiguous_end(self._hashed), self._hashed + _HASH_BATCH)
            for chunk in partial.read(self._hashed, end):
                self._hashes.update(chunk)
            self._hashed = end
            if end == self.size:
                self._finish()
                return
        except Exception as error:  # noqa: BLE001 -- passed to the session
            self._on_finished(error)
            return
        with self._lock:
            self._hashing = False
        self._continue_hashing()

    def _finish(self) -> None:
        if not self._hashes.matches:
            self._on_finished(ChecksumMismatch(self._hashes.hexdigest, tuple(self._block_crcs())))
            return
        with error_context(phase="publish", subject=f"{self.pinned.name}/{self.file.path}"):
            publish(self._layout, self.pinned, self.file, self.path, self._hashes.sha256)
        with self._lock:
            self._published, self._opened = True, None
        self._on_finished(self._hashes.sha256)

    def _block_crcs(self) -> list[int]:
        crcs, size = [], self.size or 0
        for start in range(0, size, BLOCK):
            crc = 0
            for chunk in self.partial.read(start, min(start + BLOCK, size)):
                crc = zlib.crc32(chunk, crc)
            crcs.append(crc)
        return crcs
