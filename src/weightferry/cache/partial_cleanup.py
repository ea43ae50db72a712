"""Partial data in a cache: what of it somebody brings now, and what a killed process left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport
from weightferry.cache.partial import discard, is_untouched
from weightferry.cache.permissions import entries, folders
from weightferry.cache.usage import alone

_SECTOR = 512  # bytes of a block that `stat` counts


@dataclass(frozen=True)
class PartialData:
    """The partial data of one file.

    Attributes
    ----------
    path : Path
    taken : int
        Bytes that it has on the disk.
    written : float
        Seconds since the epoch, when somebody last wrote to it.
    """

    path: Path
    taken: int
    written: float


def unfinished(layout: CacheLayout) -> list[PartialData]:
    """List the partial data of a cache, what was written to longest ago first."""
    found = []
    for entry in (entry for folder in folders(layout.partial) for entry in entries(folder)):
        if not entry.name.endswith(".journal"):
            with contextlib.suppress(OSError):
                seen = entry.stat(follow_symlinks=False)
                found.append(PartialData(Path(entry.path), seen.st_blocks * _SECTOR, seen.st_mtime))
    return sorted(found, key=lambda one: one.written)


def remove_abandoned(layout: CacheLayout, mine: Collection[Path], locks: LockSupport) -> Iterator[int]:
    """Remove, one after the other, partial data that nobody brings; yield its bytes.

    Parameters
    ----------
    mine
        Partial data with which this process goes on.
    locks
        Where they exclude, they tell what somebody brings. Of data that no lock is on nobody knows whose it is: it is
        left alone.
    """
    for one in unfinished(layout):
        if one.path not in mine and _is_dropped(layout, one, locks, is_old=False):
            yield one.taken


def _is_dropped(layout: CacheLayout, one: PartialData, locks: LockSupport, is_old: bool) -> bool:
    """Remove partial data unless somebody brings it; what no lock tells about, when it is old."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as held:
        known = layout.locks_of_partial(one.path) if locks.by_flock else ()
        if (known or is_old) and all(held.enter_context(alone(lock)) for lock in known if lock.exists()):
            discard(one.path)
            return True
    return False


def sweep(
    layout: CacheLayout, mine: Collection[Path], ttl: float, locks: LockSupport, sources: Collection[str] = ()
) -> None:
    """Remove partial data that nobody has written to for `ttl` seconds, and halves of notes and of partial data.

    Space that a killed process took, and into which nothing came, goes at once. Some may belong to somebody else: that
    is left.

    Parameters
    ----------
    sources
        Folders of the sources whose halves are looked for: in all of a large cache that would take long.
    """
    for one in unfinished(layout):
        is_old = time.time() - one.written >= ttl
        if one.path not in mine and (is_old or is_untouched(one.path)):
            _is_dropped(layout, one, locks, is_old)
    for half in _halves(layout, sources):
        with contextlib.suppress(OSError):
            if time.time() - half.lstat().st_mtime > ttl:
                half.unlink()


def _halves(layout: CacheLayout, sources: Collection[str]) -> Iterator[Path]:
    for source in sources:
        journals = (Path(entry.path) for entry in entries(layout.partial / source) if entry.name.endswith(".journal"))
        yield from (path for path in journals if not path.with_suffix("").exists())
        notes = entries(layout.verified / source)
        yield from (Path(entry.path) for entry in notes if entry.name.startswith("."))
