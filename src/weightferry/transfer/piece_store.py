"""What one leader has of the pieces of a transfer: where their bytes go, and where they are read again."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from threading import Lock

from weightferry.cache.partial import WrittenRange, discard
from weightferry.cache.permissions import make_folder, write_new
from weightferry.cache.publish import publish
from weightferry.cache.survey import CacheSurveyor
from weightferry.errors import IntegrityError, error_context
from weightferry.hashing import Hashes
from weightferry.transfer.incoming_file import ChecksumMismatch, IncomingFile
from weightferry.transfer.pieces import Frame, Piece, is_small


class PieceStore:
    """The files that a domain lacks, as they come, and those that it holds, for the neighbour that lacks them.

    Parameters
    ----------
    surveyor
        Of this domain's cache; its locks are held.
    lacking
        The files that are not whole.
    pieces
        Of the plan.
    pool
        Hashes and publishes.
    ended
        Called once for each lacking file, with its place and what became of it; see `IncomingFile`.
    """

    def __init__(
        self,
        surveyor: CacheSurveyor,
        lacking: Sequence[int],
        pieces: tuple[Piece, ...],
        pool: Executor,
        ended: Callable[[int, str | ChecksumMismatch | Exception], None],
    ) -> None:
        self._surveyor, self._layout, self.files = surveyor, surveyor.layout, surveyor.files
        self._pieces, self._ended = pieces, ended
        self.nearby = surveyor.user_cache_paths
        self._lock = Lock()
        self._missing = set(lacking)
        self._private: list[IncomingFile] = []
        self.incoming: dict[int, IncomingFile] = {
            index: self._arrival(index, pool) for index in lacking if not is_small(self.files[index][1])
        }

    def __repr__(self) -> str:
        return f"PieceStore(missing={sorted(self._missing)})"

    def _arrival(self, index: int, pool: Executor) -> IncomingFile:
        entry = self.files[index]
        locked = self._surveyor.holds_lock(index)
        path = self._layout.partial_of(*entry) if locked else self._layout.new_partial(*entry)
        made = IncomingFile(
            self._layout,
            entry,
            path,
            self._surveyor.written_ranges.get(index, []),
            pool,
            lambda end: self._end(index, end),
        )
        if not locked:
            self._private.append(made)
        return made

    def _end(self, index: int, end: str | ChecksumMismatch | Exception) -> None:
        with self._lock:
            if index not in self._missing:
                return
            self._missing.discard(index)
        self._ended(index, end)

    def begin(self) -> None:
        """Take the space for all files, and go on with what was there of them before."""
        for incoming in self.incoming.values():
            with error_context(subject=f"{incoming.pinned.name}/{incoming.file.path}"):
                incoming.begin()

    def close(self) -> None:
        """Remove what nobody would find again; partial data under its own name stays."""
        for incoming in self._private:
            discard(incoming.path)

    def is_missing(self, index: int) -> bool:
        """Whether a file is neither published nor given up."""
        with self._lock:
            return index in self._missing

    def end_of(self, piece: Piece) -> int | None:
        """Where a piece ends; None while nobody knows."""
        if piece.stop is not None or piece.files[0] not in self.incoming:
            return piece.stop if piece.stop is not None else self._blob_size(piece.files[0])
        return self.incoming[piece.files[0]].size

    def _blob_size(self, index: int) -> int:
        return self._surveyor.content_path(index).stat().st_size

    def has(self, piece: Piece, start: int, stop: int) -> bool:
        """Whether bytes `start` to `stop` of a piece are there, to be passed on."""
        if piece.bundle:
            return not any(self.is_missing(index) for index in piece.files)
        incoming = self.incoming.get(piece.files[0])
        return incoming is None or incoming.covers(start, stop)

    def window(self, frame: Frame) -> memoryview:
        """Map the bytes of a frame: what is written there is in the file."""
        index = self._pieces[frame.piece].files[0]
        incoming = self.incoming.get(index)
        begin = frame.start % mmap.ALLOCATIONGRANULARITY  # a mapping starts with a page, a frame anywhere
        length, offset = begin + frame.stop - frame.start, frame.start - begin
        if incoming is None:
            descriptor = os.open(self._surveyor.content_path(index), os.O_RDONLY | os.O_CLOEXEC)
        else:
            descriptor = incoming.open(os.O_RDWR)
            if incoming.file.size is None and os.fstat(descriptor).st_size < frame.stop:
                os.ftruncate(descriptor, frame.stop)
        # A private mapping of a file that is only read: its pages are the page cache's own as long as nobody writes.
        access = mmap.ACCESS_COPY if incoming is None else mmap.ACCESS_WRITE
        try:
            return memoryview(mmap.mmap(descriptor, length, access=access, offset=offset))[begin:]
        finally:
            os.close(descriptor)

    def came(self, frame: Frame, content: memoryview, *, last: bool) -> None:
        """Take note of a frame whose bytes were written to its window, of which `content` is a view."""
        incoming = self.incoming[self._pieces[frame.piece].files[0]]
        if content:
            incoming.note(WrittenRange(frame.start, frame.stop, zlib.crc32(content)))
        if last and incoming.file.size is None:
            incoming.end_at(frame.stop)

    def bundle(self, piece: Piece) -> bytes:
        """Read the files of a bundle, one after the other."""
        return b"".join(self._surveyor.content_path(index).read_bytes() for index in piece.files)

    def unbundle(self, piece: Piece, content: memoryview, sender: str) -> None:
        """Publish the files of a bundle that came from a peer.

        Raises
        ------
        IntegrityError
            They are not what that peer had checked.
        """
        for index, part in zip(piece.files, self._split(piece, content), strict=True):
            if self.is_missing(index):
                pinned, file = self.files[index]
                hashes = Hashes(file.checksum, file.size)
                hashes.update(part)
                if not hashes.matches:
                    text = f"came damaged from {sender}: expected {file.checksum}, got {hashes.hexdigest}"
                    raise IntegrityError(text, subject=f"{pinned.name}/{file.path}")
                self.keep(index, part, hashes.sha256)

    def _split(self, piece: Piece, content: memoryview) -> Iterator[memoryview]:
        start = 0
        for index in piece.files:
            stop = start + (self.files[index][1].size or 0)
            yield content[start:stop]
            start = stop

    def keep(self, index: int, content: bytes | memoryview, sha256: str) -> None:
        """Publish a small file whose bytes are the right ones."""
        pinned, file = self.files[index]
        path = self._layout.new_partial(pinned, file)
        with error_context(subject=f"{pinned.name}/{file.path}"):
            try:
                make_folder(path.parent)
                write_new(path, content)
                with error_context(phase="publish"):
                    publish(self._layout, pinned, file, path, sha256, sync=False)
            finally:
                discard(path)
        self._end(index, sha256)
