"""One big file on its way into the cache: written in any order, hashed in order, published when it is right."""

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

COMPARED = 4 << 20
"""Bytes in each part of a wrong file that is compared between domains."""
_AT_A_TIME = 64 << 20
"""Bytes of a file that are hashed before another one gets its turn."""


@dataclass(frozen=True)
class ChecksumMismatch:
    """A file whose bytes are not the promised ones.

    Attributes
    ----------
    got : str
        Digest, by the algorithm of the origin.
    parts : tuple of int
        CRC-32 of each 4 MiB of it, to find out who has which of them wrong.
    """

    got: str
    parts: tuple[int, ...]


class IncomingFile:
    """Takes what comes of one file, from the origin or from a peer. Safe to use from several threads.

    Parameters
    ----------
    layout, pinned, file
        Which file.
    path
        Of the partial data.
    runs
        What of it was there before.
    pool
        Hashes, and publishes.
    ended
        Called once, from the pool: with the SHA-256 of the published file, with a `ChecksumMismatch`, or with the error
        that prevented publishing.
    """

    def __init__(
        self,
        layout: CacheLayout,
        entry: tuple[PinnedSource, File],
        path: Path,
        runs: list[WrittenRange],
        pool: Executor,
        ended: Callable[[str | ChecksumMismatch | Exception], None],
    ) -> None:
        self._layout, (self.pinned, self.file), self.path = layout, entry, path
        self.size = self.file.size
        self._runs, self._pool, self._ended = runs, pool, ended
        self._lock = Lock()
        self._opened: PartialFile | None = None
        self._hashes, self._hashed = Hashes(self.file.checksum, self.file.size), 0
        self._hashing = self._published = False

    def __repr__(self) -> str:
        return f"IncomingFile({self.pinned.name}/{self.file.path}, hashed {self._hashed} of {self.size})"

    @property
    def partial(self) -> PartialFile:
        """The partial data of a file that is not published, opened when it is first needed.

        Not earlier: there may be more files than a process may open.
        """
        partial = self._unpublished()
        if partial is None:
            raise RuntimeError(f"{self!r} is published")
        return partial

    def _unpublished(self) -> PartialFile | None:
        """Return the partial data; None once the file is published.

        Both in one step: else who looks for bytes while they are published finds new, empty partial data.
        """
        with self._lock:
            if self._published:
                return None
            if self._opened is None:
                self._opened = PartialFile(self.path, self.size, self.file.key, self._runs)
            return self._opened

    def begin(self) -> None:
        """Take the space on the disk, and go on with what was there before."""
        self.partial  # noqa: B018 -- opens it
        self._hash_on()

    def note(self, run: WrittenRange) -> None:
        """Put down that a run of bytes was written to `partial`."""
        self.partial.record(run)
        self._hash_on()

    def end_at(self, size: int) -> None:
        """Say where a file ends whose size nobody knew."""
        self.size = size
        self._hash_on()

    def covers(self, start: int, stop: int) -> bool:
        """Whether all bytes from `start` to `stop` are there."""
        partial = self._unpublished()
        return partial is None or partial.covers(start, stop)

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What is not there between `start` and `stop`."""
        partial = self._unpublished()
        return [] if partial is None else partial.missing(start, stop)

    def open(self, flags: int) -> int:
        """Open the data, wherever it is by now."""
        try:
            return os.open(self.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return os.open(self._layout.blob(self.pinned, self.file), flags | os.O_CLOEXEC)

    def _hash_on(self) -> None:
        with self._lock:
            if not self._hashing and self._is_due():
                self._hashing = True
                with contextlib.suppress(RuntimeError):  # the pool was shut down: the transfer has failed
                    self._pool.submit(self._hash)

    def _is_due(self) -> bool:
        if self._published or self._opened is None:
            return False
        return self._opened.contiguous_end(self._hashed) > self._hashed or self._hashed == self.size

    def _hash(self) -> None:
        try:
            partial = self.partial
            end = min(partial.contiguous_end(self._hashed), self._hashed + _AT_A_TIME)
            for chunk in partial.read(self._hashed, end):
                self._hashes.update(chunk)
            self._hashed = end
            if end == self.size:
                self._conclude()
                return
        except Exception as error:  # noqa: BLE001 -- told to whoever waits for the end
            self._ended(error)
            return
        with self._lock:
            self._hashing = False
        self._hash_on()

    def _conclude(self) -> None:
        if not self._hashes.matches:
            self._ended(ChecksumMismatch(self._hashes.hexdigest, tuple(self._crcs())))
            return
        with error_context(phase="publish", subject=f"{self.pinned.name}/{self.file.path}"):
            publish(self._layout, self.pinned, self.file, self.path, self._hashes.sha256)
        with self._lock:
            self._published, self._opened = True, None
        self._ended(self._hashes.sha256)

    def _crcs(self) -> list[int]:
        crcs, size = [], self.size or 0
        for start in range(0, size, COMPARED):
            crc = 0
            for chunk in self.partial.read(start, min(start + COMPARED, size)):
                crc = zlib.crc32(chunk, crc)
            crcs.append(crc)
        return crcs
