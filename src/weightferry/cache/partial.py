"""Data of one file on its way, and the journal of what of it is really there.

The data file has its full size from the start, so a full disk is found at once, and what arrives is written to its
place in any order. The journal is a text file beside it: a first line that says which content this is, then one line
``START STOP CRC32`` for each run of bytes that was written. Both survive the death of their writer, since the kernel
keeps what a killed process has written; whoever comes next reads the runs again, and believes those whose CRC-32 is
right. A crash of the machine may lose what the journal promises: that too shows in the CRC-32.
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

_BUFFER = 1 << 20


class WrittenRange(NamedTuple):
    """Bytes from `start` to `stop`, and their CRC-32."""

    start: int
    stop: int
    crc: int

    def __str__(self) -> str:
        return f"{self.start} {self.stop} {self.crc:08x}"


class PartialFile:
    """The data and the journal of one file, open for writing until nobody has this object any more.

    Guaranteed: a range in `there` was written by this process, or was found right by its CRC-32 before. Not
    guaranteed: that the bytes are the right ones; the checksum of the whole file tells. Safe to use from several
    threads that write different ranges.

    Parameters
    ----------
    path
        Of the data; the journal is beside it.
    size
        Bytes; None when nobody knows: then the file grows.
    content
        Names the content, for the journal.
    runs
        What `verified_ranges` found there; everything else is taken for missing.

    Raises
    ------
    OSError
        No space (with the size in its text), no right to write.
    """

    def __init__(self, path: Path, size: int | None, content: str, runs: Iterable[WrittenRange] = ()) -> None:
        self.path, self.size = path, size
        self._file = self._journal = -1
        self._lock = Lock()
        runs = list(runs)
        self.there = Extents((run.start, run.stop) for run in runs)
        make_folder(path.parent)
        write_atomically(journal_of(path), "".join(f"{line}\n" for line in (_head(size, content), *runs)))
        if path.is_symlink():
            path.unlink()  # none of ours
        self._file = open_file(path, os.O_RDWR)
        _allocate(self._file, size, path)
        self._journal = open_file(journal_of(path), os.O_WRONLY | os.O_APPEND)

    def __repr__(self) -> str:
        return f"Partial({str(self.path)!r}, {self.there.total} of {self.size} bytes)"

    def write(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes to their place; they count once they are noted."""
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.pwrite(self._file, view[done:], start + done)

    def note(self, run: WrittenRange) -> None:
        """Put down that a run is there."""
        # One write of a short line to a file opened for appending: lines of several threads do not mix.
        os.write(self._journal, f"{run}\n".encode())
        with self._lock:
            self.there.add(run.start, run.stop)

    def whole_from(self, start: int) -> int:
        """Where the bytes that are there without a gap from `start` on end."""
        with self._lock:
            return self.there.end_from(start)

    def covers(self, start: int, stop: int) -> bool:
        """Whether all bytes from `start` to `stop` are there."""
        with self._lock:
            return self.there.cover(start, stop)

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """What is not there between `start` and `stop`."""
        with self._lock:
            return self.there.missing(start, stop)

    def read(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yield the bytes from `start` to `stop` in order; each chunk is valid until the next one is asked for."""
        return read_range(self._file, start, stop)

    def __del__(self) -> None:
        # Not earlier: a thread that is left behind after a failure may still write, and a number that is closed may by
        # then be somebody else's file.
        for descriptor in (self._file, self._journal):
            if descriptor >= 0:
                os.close(descriptor)


def verified_ranges(path: Path, size: int | None, content: str) -> list[WrittenRange]:
    """Find what is there of a killed transfer: the runs of its journal for this content whose CRC-32 is right.

    Reads all of them, at the speed of the disk.
    """
    with contextlib.suppress(OSError, ValueError):
        first, *lines = journal_of(path).read_text(errors="replace").splitlines()
        if size is not None and first == _head(size, content):
            with path.open("rb") as file:
                return [run for run in _parsed(lines) if run.stop <= size and _is_right(file.fileno(), run)]
    return []


def journal_of(path: Path) -> Path:
    """Where the journal of the data at `path` is."""
    return path.with_name(f"{path.name}.journal")


def discard(path: Path) -> None:
    """Remove partial data and its journal, as far as they are there."""
    for part in (journal_of(path), path):
        with contextlib.suppress(OSError):
            part.unlink()


def is_untouched(path: Path) -> bool:
    """Whether the journal of the data at `path` says that nothing of it came: space was taken, and that is all."""
    with contextlib.suppress(OSError):
        return journal_of(path).read_bytes().count(b"\n") <= 1
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
            raise OSError(f"the file ends at {start} where {stop} bytes were expected")
        yield buffer[:count]
        start += count


def _head(size: int | None, content: str) -> str:
    return json.dumps({"content": content, "size": size})


def _parsed(lines: list[str]) -> Iterator[WrittenRange]:
    for line in lines:
        # The last line may be torn; a lying one costs what it lies about.
        with contextlib.suppress(ValueError):
            start, stop, crc = line.split(" ")
            if 0 <= int(start) < int(stop):
                yield WrittenRange(int(start), int(stop), int(crc, 16))


def _is_right(file: int, run: WrittenRange) -> bool:
    crc = 0
    with contextlib.suppress(OSError):
        for chunk in read_range(file, run.start, run.stop):
            crc = zlib.crc32(chunk, crc)
        return crc == run.crc
    return False


def _allocate(file: int, size: int | None, path: Path) -> None:
    """Take the space before the first byte comes: a full disk is found now, not in half an hour."""
    if size is None or os.fstat(file).st_size > size:
        os.ftruncate(file, size or 0)
    if not size:
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({size} bytes are needed)", str(path.parent)) from error
