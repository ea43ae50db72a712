"""Checks that one node makes on a folder: type of file system, free space, rates, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from weightferry.doctor.findings import CacheFolder, LocalDisk
from weightferry.doctor.request import CheckRequest, ScratchPaths

# Where clusters mount their node-local disks. $TMPDIR is not in the list: on many clusters it ends with the job.
_LOCAL_FOLDERS = ("/local", "/localscratch", "/lscratch", "/scratch/local", "/nvme", "/tmp")  # noqa: S108 -- read only
# No other machine sees a file on these file systems, unless this machine exports them.
LOCAL_TYPES = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs"))
IN_MEMORY = frozenset(("tmpfs", "ramfs"))
_BLOCK = 8 << 20
# On rank 0 a stage holds the generated file and the staged file.
_SPACE_FACTOR = 3


def check_cache_folder(request: CheckRequest, rank: int) -> CacheFolder:
    """Create the cache folder if it is missing, and measure it; a problem is returned, not raised."""
    paths = ScratchPaths(request.cache_dir, request.run)
    found: CacheFolder = {
        "folder": str(request.cache_dir),
        "problem": None,
        "filesystem": "?",
        "free_bytes": None,
        "fallocate": None,
        "flock": None,
        "write_mb_s": None,
        "read_mb_s": None,
    }
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        found["filesystem"] = filesystem_of(request.cache_dir)
        found["free_bytes"] = free = free_bytes(request.cache_dir)
        needed = _SPACE_FACTOR * request.size
        if free < needed:
            found["problem"] = (
                f"it has {free / 1e6:.0f} MB free, this check needs {needed / 1e6:.0f} MB; use a smaller --size-mb"
            )
            return found
        found["flock"] = try_flock(paths.root / f"flock-{rank}")
        found["fallocate"], found["write_mb_s"], found["read_mb_s"] = _measure_rates(paths.disk(rank), request.size)
    except OSError as error:
        found["problem"] = error_text(error)
    return found


def error_text(error: OSError) -> str:
    """Return the error's name, its text and its file."""
    path = f": {error.filename}" if error.filename else ""
    return f"{errno_name(error)}, {error.strerror}{path}"


def errno_name(error: OSError) -> str:
    """Return the error's name as manuals write it: ``ENOLCK``."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def local_disks() -> list[LocalDisk]:
    """List the usual node-local folders that exist here, are writable, and are on a disk of this node."""
    found: list[LocalDisk] = []
    for folder in map(Path, _LOCAL_FOLDERS):
        writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        kind = filesystem_of(folder) if writable else ""
        if kind in LOCAL_TYPES - IN_MEMORY:
            found.append({"folder": str(folder), "filesystem": kind, "free_bytes": free_bytes(folder)})
    return found


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write."""
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize


def filesystem_of(folder: Path) -> str:
    """Return the type of the folder's file system, or ``?`` when the kernel does not say."""
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
        # Of two mounts on one folder, the later one is visible.
        if folder.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), filesystem.split()[0]
    return kind


def try_flock(path: Path) -> str:
    """Lock and unlock a new file; return ``ok``, or the name of the error."""
    try:
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return errno_name(error)
    finally:
        path.unlink(missing_ok=True)
    return "ok"


def _measure_rates(path: Path, size: int) -> tuple[str, float, float]:
    """Write and read `size` bytes as a stage does; return the result of fallocate, and both rates in MB/s."""
    with _removed_at_end(path):
        with path.open("wb", buffering=0) as file:
            allocated = _allocate(file.fileno(), size)
            # Random bytes, since some file systems compress.
            block = memoryview(os.urandom(_BLOCK))
            began = time.monotonic()
            done = 0
            while done < size:
                done += file.write(block[: size - done])
            os.fsync(file.fileno())
            write_seconds = time.monotonic() - began
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            buffer = bytearray(_BLOCK)
            began = time.monotonic()
            while file.readinto(buffer):
                pass
            read_seconds = time.monotonic() - began
    return allocated, round(size / 1e6 / write_seconds, 1), round(size / 1e6 / read_seconds, 1)


def _allocate(descriptor: int, size: int) -> str:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        return errno_name(error)
    return "ok"


@contextlib.contextmanager
def _removed_at_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
