"""Partial data in a cache: list it, and remove the data that killed processes left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport
from weightferry.cache.partial import discard, is_empty
from weightferry.cache.permissions import list_entries, list_folders
from weightferry.cache.usage import exclusive_use

_BLOCK = 512  # bytes; the unit of `st_blocks`


@dataclass(frozen=True)
class PartialData:
    """The partial data of one file.

    Attributes
    ----------
    path : Path
    disk_size : int
        Bytes that it takes on the disk.
    last_written : float
        When a process last wrote to it, in seconds since the epoch.
    """

    path: Path
    disk_size: int
    last_written: float


def list_partial_data(layout: CacheLayout) -> list[PartialData]:
    """Return the partial data of a cache; the data that was written to longest ago comes first."""
    found = []
    for entry in (entry for folder in list_folders(layout.partial) for entry in list_entries(folder)):
        if not entry.name.endswith(".journal"):
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                found.append(PartialData(Path(entry.path), status.st_blocks * _BLOCK, status.st_mtime))
    return sorted(found, key=lambda data: data.last_written)


def remove_abandoned(layout: CacheLayout, own_paths: Collection[Path], locks: LockSupport) -> Iterator[int]:
    """Remove, one after the other, partial data that no running process downloads; yield the bytes of each.

    Parameters
    ----------
    own_paths
        Partial data from which this process resumes.
    locks
        Where `flock` works, a held lock shows that a process downloads the data. Data without a lock stays: its owner
        is unknown.
    """
    for data in list_partial_data(layout):
        if data.path not in own_paths and _remove_unless_locked(layout, data, locks, is_old=False):
            yield data.disk_size


def _remove_unless_locked(layout: CacheLayout, data: PartialData, locks: LockSupport, is_old: bool) -> bool:
    """Remove partial data unless a process holds its lock. Data that has no lock is removed only when it is old."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as held:
        paths = layout.partial_locks(data.path) if locks.flock_works else ()
        if (paths or is_old) and all(held.enter_context(exclusive_use(lock)) for lock in paths if lock.exists()):
            discard(data.path)
            return True
    return False


def remove_expired(
    layout: CacheLayout, own_paths: Collection[Path], ttl: float, locks: LockSupport, sources: Collection[str] = ()
) -> None:
    """Remove partial data that no process has written to for `ttl` seconds, and incomplete notes of that age.

    Space that a killed process reserved without writing to it is freed at once. Files that this user may not remove
    stay.

    Parameters
    ----------
    own_paths
        Partial data from which this process resumes.
    sources
        Folder names of the sources in which to look for incomplete notes and for journals without data. Looking in all
        sources of a large cache would take too long.
    """
    for data in list_partial_data(layout):
        is_old = time.time() - data.last_written >= ttl
        if data.path not in own_paths and (is_old or is_empty(data.path)):
            _remove_unless_locked(layout, data, locks, is_old)
    for leftover in _leftovers(layout, sources):
        with contextlib.suppress(OSError):
            if time.time() - leftover.lstat().st_mtime > ttl:
                leftover.unlink()


def _leftovers(layout: CacheLayout, sources: Collection[str]) -> Iterator[Path]:
    """Yield journals without data, and notes that still have their temporary name."""
    for source in sources:
        entries = list_entries(layout.partial / source)
        journals = (Path(entry.path) for entry in entries if entry.name.endswith(".journal"))
        yield from (path for path in journals if not path.with_suffix("").exists())
        notes = list_entries(layout.verified / source)
        yield from (Path(entry.path) for entry in notes if entry.name.startswith("."))
