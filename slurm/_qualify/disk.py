"""What a node sees of a folder by itself: file system, space, rates, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from slurm._qualify.values import Cache, Candidate, Question, Work

# Where clusters keep their node-local disks. $TMPDIR is left out: on many it ends with the job.
_PLACES = ("/local", "/localscratch", "/lscratch", "/scratch/local", "/nvme", "/tmp")  # noqa: S108 -- looked at only
# No other machine can see a file on these, unless it is exported from here.
LOCAL_TYPES = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs"))
IN_MEMORY = frozenset(("tmpfs", "ramfs"))
_BLOCK = 8 << 20
# A stage holds the generated file on rank 0, and the staged one beside it.
_TIMES_THE_SIZE = 3


def look_at_cache(question: Question, rank: int) -> Cache:
    """Make the cache folder if need be, and measure it; what is wrong with it is told, not raised."""
    work = Work(question.cache_dir, question.run)
    found: Cache = {
        "folder": str(question.cache_dir),
        "problem": None,
        "filesystem": "?",
        "free_bytes": None,
        "fallocate": None,
        "flock": None,
        "write_mb_s": None,
        "read_mb_s": None,
    }
    try:
        work.root.mkdir(parents=True, exist_ok=True)
        found["filesystem"] = filesystem_of(question.cache_dir)
        found["free_bytes"] = free = free_bytes(question.cache_dir)
        needed = _TIMES_THE_SIZE * question.size
        if free < needed:
            found["problem"] = f"{free / 1e6:.0f} MB are free, this check needs {needed / 1e6:.0f} MB (--size-mb)"
            return found
        found["flock"] = try_flock(work.root / f"flock-{rank}")
        found["fallocate"], found["write_mb_s"], found["read_mb_s"] = _rates(work.disk(rank), question.size)
    except OSError as error:
        found["problem"] = told(error)
    return found


def told(error: OSError) -> str:
    """Write an error with its file, for readers."""
    where = f": {error.filename}" if error.filename else ""
    return f"{name_of(error)}, {error.strerror}{where}"


def name_of(error: OSError) -> str:
    """Name an error as manuals do: ``ENOLCK``."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def candidates() -> list[Candidate]:
    """List the usual places for node-local files that are there, on a disk of this node, and writable."""
    found: list[Candidate] = []
    for folder in map(Path, _PLACES):
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        kind = filesystem_of(folder) if writable else ""
        if kind in LOCAL_TYPES - IN_MEMORY:
            found.append({"folder": str(folder), "filesystem": kind, "free_bytes": free_bytes(folder)})
    return found


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write."""
    seen = os.statvfs(folder)
    return seen.f_bavail * seen.f_frsize


def filesystem_of(folder: Path) -> str:
    """Name the type of the file system of a folder, ``?`` when the kernel does not tell."""
    try:
        return filesystem_in(Path("/proc/self/mountinfo").read_text(), folder.resolve())
    except OSError:
        return "?"


def filesystem_in(mountinfo: str, folder: Path) -> str:
    """Find the type of the mount that holds `folder` in the text of ``/proc/self/mountinfo``; see proc(5)."""
    best, kind = -1, "?"
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount.split()[4]))
        # Of two mounts on one point the later one is seen.
        if folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), filesystem.split()[0]
    return kind


def try_flock(path: Path) -> str:
    """Take and leave a lock on a file of its own; ``ok``, or the name of the error."""
    try:
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return name_of(error)
    finally:
        path.unlink(missing_ok=True)
    return "ok"


def _rates(path: Path, size: int) -> tuple[str, float, float]:
    """Write and read `size` bytes as a stage does; return how fallocate went, and both rates."""
    with _removed_at_the_end(path):
        with path.open("wb", buffering=0) as file:
            allocated = _allocate(file.fileno(), size)
            # Random, since some file systems compress.
            block = memoryview(os.urandom(_BLOCK))
            began = time.monotonic()
            done = 0
            while done < size:
                done += file.write(block[: size - done])
            os.fsync(file.fileno())
            written = time.monotonic() - began
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            buffer = bytearray(_BLOCK)
            began = time.monotonic()
            while file.readinto(buffer):
                pass
            read = time.monotonic() - began
    return allocated, round(size / 1e6 / written, 1), round(size / 1e6 / read, 1)


def _allocate(descriptor: int, size: int) -> str:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        return name_of(error)
    return "ok"


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
