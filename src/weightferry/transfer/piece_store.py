"""Store the pieces of one leader's transfer: write what arrives, read what the right neighbour lacks."""

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
    """Holds the files that a domain lacks while they arrive, and the files that it has and a neighbour lacks.

    Parameters
    ----------
    surveyor
        Of this domain's cache; holds the locks of the missing files.
    missing
        The files that are not complete, by index.
    pieces
        Of the plan.
    pool
        Runs the hashing and the publishing.
    on_finished
        Called once for each missing file, with its index and result; see `IncomingFile`.
    """

    def __init__(
        self,
        surveyor: CacheSurveyor,
        missing: Sequence[int],
        pieces: tuple[Piece, ...],
        pool: Executor,
        on_finished: Callable[[int, str | ChecksumMismatch | Exception], None],
    ) -> None:
        self._surveyor, self._layout, self.files = surveyor, surveyor.layout, surveyor.files
        self._pieces, self._on_finished = pieces, on_finished
        self.in_user_cache = surveyor.user_cache_paths
        self._lock = Lock()
        self._missing = set(missing)
        self._unlocked: list[IncomingFile] = []
        self.incoming: dict[int, IncomingFile] = {
            index: self._new_incoming(index, pool) for index in missing if not is_small(self.files[index][1])
        }

    def __repr__(self) -> str:
        return f"PieceStore(missing={sorted(self._missing)})"

    def _new_incoming(self, index: int, pool: Executor) -> IncomingFile:
        entry = self.files[index]
        locked = self._surveyor.holds_lock(index)
        path = self._layout.partial_of(*entry) if locked else self._layout.new_partial(*entry)
        incoming = IncomingFile(
            self._layout,
            entry,
            path,
            self._surveyor.written_ranges.get(index, []),
            pool,
            lambda end: self._finish(index, end),
        )
        if not locked:
            self._unlocked.append(incoming)
        return incoming

    def _finish(self, index: int, end: str | ChecksumMismatch | Exception) -> None:
        with self._lock:
            if index not in self._missing:
                return
            self._missing.discard(index)
        self._on_finished(index, end)

    def begin(self) -> None:
        """Take the space for all files, and hash the bytes that an earlier transfer left."""
        for incoming in self.incoming.values():
            with error_context(subject=f"{incoming.pinned.name}/{incoming.file.path}"):
                incoming.begin()

    def close(self) -> None:
        """Remove the partial files that no later transfer would find; the others stay for the next transfer."""
        for incoming in self._unlocked:
            discard(incoming.path)

    def is_missing(self, index: int) -> bool:
        """Return whether a file has no result yet."""
        with self._lock:
            return index in self._missing

    def end_of(self, piece: Piece) -> int | None:
        """Return the offset at which a piece ends; None while the size of the file is unknown."""
        if piece.stop is not None or piece.files[0] not in self.incoming:
            return piece.stop if piece.stop is not None else self._blob_size(piece.files[0])
        return self.incoming[piece.files[0]].size

    def _blob_size(self, index: int) -> int:
        return self._surveyor.content_path(index).stat().st_size

    def has(self, piece: Piece, start: int, stop: int) -> bool:
        """Return whether bytes `start` to `stop` of a piece are present, so that they can be relayed."""
        if piece.bundle:
            return not any(self.is_missing(index) for index in piece.files)
        incoming = self.incoming.get(piece.files[0])
        return incoming is None or incoming.covers(start, stop)

    def window(self, frame: Frame) -> memoryview:
        """Return a memory mapping of the bytes of a frame; bytes written to it are in the file."""
        index = self._pieces[frame.piece].files[0]
        incoming = self.incoming.get(index)
        shift = frame.start % mmap.ALLOCATIONGRANULARITY  # a mapping starts at a page, a frame anywhere
        length, offset = shift + frame.stop - frame.start, frame.start - shift
        if incoming is None:
            descriptor = os.open(self._surveyor.content_path(index), os.O_RDONLY | os.O_CLOEXEC)
        else:
            descriptor = incoming.open(os.O_RDWR)
            if incoming.file.size is None and os.fstat(descriptor).st_size < frame.stop:
                os.ftruncate(descriptor, frame.stop)
        # A private mapping of a file that is only read uses the pages of the page cache.
        access = mmap.ACCESS_COPY if incoming is None else mmap.ACCESS_WRITE
        try:
            return memoryview(mmap.mmap(descriptor, length, access=access, offset=offset))[shift:]
        finally:
            os.close(descriptor)

    def record_frame(self, frame: Frame, content: memoryview, *, last: bool) -> None:
        """Record a frame whose bytes were written to its mapping, of which `content` is a view."""
        incoming = self.incoming[self._pieces[frame.piece].files[0]]
        if content:
            incoming.record(WrittenRange(frame.start, frame.stop, zlib.crc32(content)))
        if last and incoming.file.size is None:
            incoming.set_size(frame.stop)

    def read_bundle(self, piece: Piece) -> bytes:
        """Read the files of a bundle, one after the other."""
        return b"".join(self._surveyor.content_path(index).read_bytes() for index in piece.files)

    def publish_bundle(self, piece: Piece, content: memoryview, sender: str) -> None:
        """Publish the files of a bundle that came from a peer.

        Raises
        ------
        IntegrityError
            A file does not have its published checksum.
        """
        for index, part in zip(piece.files, self._split(piece, content), strict=True):
            if self.is_missing(index):
                pinned, file = self.files[index]
                hashes = Hashes(file.checksum, file.size)
                hashes.update(part)
                if not hashes.matches:
                    text = f"checksum mismatch in bytes from {sender}: expected {file.checksum}, got {hashes.hexdigest}"
                    raise IntegrityError(text, subject=f"{pinned.name}/{file.path}")
                self.publish_small(index, part, hashes.sha256)

    def _split(self, piece: Piece, content: memoryview) -> Iterator[memoryview]:
        start = 0
        for index in piece.files:
            stop = start + (self.files[index][1].size or 0)
            yield content[start:stop]
            start = stop

    def publish_small(self, index: int, content: bytes | memoryview, sha256: str) -> None:
        """Publish a small file whose checksum matched."""
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
        self._finish(index, sha256)
