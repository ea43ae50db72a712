"""The partial data of one file, and the journal of which byte ranges have been written.

The data file has its full size from the start, so that a full disk is found at once. Data is written to its final
offset, in any order. The journal is a text file beside the data: its first line names the content, then one line
``START STOP CRC32`` follows for each written range. Both files survive the death of the writing process, because the
kernel keeps the data that a killed process has written. The next process reads the ranges again and accepts those whose
CRC-32 matches. A crash of the machine may lose data that the journal lists; the CRC-32 finds that too.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from weightferry.cache.atomic import write_atomically
from weightferry.cache.extents import Extents
from weightferry.cache.permissions import make_folder, open_file

_BUFFER = 1 << 20  # bytes


class WrittenRange(NamedTuple):
    """The bytes from `start` to `stop`, and their CRC-32."""

    start: int
    stop: int
    crc: int

    def __str__(self) -> str:
        return f"{self.start} {self.stop} {self.crc:08x}"


class PartialFile:
    """The data and the journal of one file. Both stay open for writing until the last reference to this object ends.

    Guaranteed: a range in `present` was written by this process, or its CRC-32 matched before. Not guaranteed: that the
    bytes are the right ones; only the checksum of the complete file proves that. Several threads may write different
    ranges at the same time.

    Parameters
    ----------
    path
        The data file; the journal is beside it.
    size
        Bytes; None when the size is unknown: then the file grows.
    content
        Name of the content, for the journal.
    ranges
        The result of `verified_ranges`; every other byte counts as missing.

    Raises
    ------
    OSError
        The disk is full (the text names the needed size), or this user may not write.
    """

    def __init__(self, path: Path, size: int | None, content: str, ranges: Iterable[WrittenRange] = ()) -> None:
        self.path, self.size = path, size
        self._file = self._journal = -1
        self._lock = Lock()
        ranges = list(ranges)
        self.present = Extents((written.start, written.stop) for written in ranges)
        make_folder(path.parent)
        write_atomically(journal_path(path), "".join(f"{line}\n" for line in (_header(size, content), *ranges)))
        if path.is_symlink():
            path.unlink()  # weightferry makes no link here: another user made it
        self._file = open_file(path, os.O_RDWR)
        _preallocate(self._file, size, path)
        self._journal = open_file(journal_path(path), os.O_WRONLY | os.O_APPEND)

    def __repr__(self) -> str:
        return f"PartialFile({str(self.path)!r}, {self.present.total} of {self.size} bytes)"

    def write(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at the offset `start`. They count as present after `record`."""
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self._file, view[done:], start + done)

    def record(self, written: WrittenRange) -> None:
        """Append a written range to the journal."""
        # One write of a short line to a file in append mode: lines of several threads do not mix.
        os.write(self._journal, f"{written}\n".encode())
        with self._lock:
            self.present.add(written.start, written.stop)

    def contiguous_end(self, start: int) -> int:
        """Return the end of the bytes that are present without a gap from `start` on."""
        with self._lock:
            return self.present.end_from(start)

    def covers(self, start: int, stop: int) -> bool:
        """Whether all bytes from `start` to `stop` are present."""
        with self._lock:
            return self.present.cover(start, stop)

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the ranges between `start` and `stop` that are not present."""
        with self._lock:
            return self.present.missing(start, stop)

    def read(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yield the bytes from `start` to `stop` in order. A chunk is valid until the caller takes the next one."""
        return read_range(self._file, start, stop)

    def __del__(self) -> None:
        # Not earlier: a thread that still runs after a failure may write here, and the number of a closed descriptor
        # may belong to another file by then.
        for descriptor in (self._file, self._journal):
            if descriptor >= 0:
                os.close(descriptor)


def verified_ranges(path: Path, size: int | None, content: str) -> list[WrittenRange]:
    """Return the ranges that an interrupted transfer wrote for this content and whose CRC-32 matches.

    Reads all these bytes, at the speed of the disk.
    """
    with contextlib.suppress(OSError, ValueError):
        first, *lines = journal_path(path).read_text(errors="replace").splitlines()
        if size is not None and first == _header(size, content):
            with path.open("rb") as file:
                return [found for found in _parse(lines) if found.stop <= size and _crc_matches(file.fileno(), found)]
    return []


def journal_path(path: Path) -> Path:
    """Return the path of the journal of the data at `path`."""
    return path.with_name(f"{path.name}.journal")


def discard(path: Path) -> None:
    """Remove partial data and its journal, if they exist."""
    for part in (journal_path(path), path):
        with contextlib.suppress(OSError):
            part.unlink()


def is_empty(path: Path) -> bool:
    """Whether the journal of the data at `path` lists no range: the file only reserves space."""
    with contextlib.suppress(OSError):
        return journal_path(path).read_bytes().count(b"\n") <= 1
    return False


def read_range(file: int, start: int, stop: int) -> Iterator[memoryview]:
    """Yield the bytes from `start` to `stop` of an open file in order, through one buffer.

    Raises
    ------
    OSError
        The file ends before `stop`.
    """
    buffer = memoryview(bytearray(min(_BUFFER, max(1, stop - start))))
    while start < stop:
        count = os.preadv(file, [buffer[: min(len(buffer), stop - start)]], start)
        if not count:
            raise OSError(f"the file ends at byte {start}, but at least {stop} bytes were expected")
        yield buffer[:count]
        start += count


def _header(size: int | None, content: str) -> str:
    return json.dumps({"content": content, "size": size})


def _parse(lines: list[str]) -> Iterator[WrittenRange]:
    for line in lines:
        # The last line may be incomplete. A wrong line costs only the range that it names.
        with contextlib.suppress(ValueError):
            start, stop, crc = line.split(" ")
            if 0 <= int(start) < int(stop):
                yield WrittenRange(int(start), int(stop), int(crc, 16))


def _crc_matches(file: int, written: WrittenRange) -> bool:
    crc = 0
    with contextlib.suppress(OSError):
        for chunk in read_range(file, written.start, written.stop):
            crc = zlib.crc32(chunk, crc)
        return crc == written.crc
    return False


def _preallocate(file: int, size: int | None, path: Path) -> None:
    """Reserve the space before the first byte arrives: a full disk is found now, not after half an hour."""
    if size is None or os.fstat(file).st_size > size:
        os.ftruncate(file, size or 0)
    if not size:
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({size} bytes are needed)", str(path.parent)) from error
