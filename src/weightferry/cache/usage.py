"""Who uses what of a cache: eviction removes nothing that a living process staged, and nothing that was pinned.

A process holds a shared `flock` on one small file for each source that it staged, for as long as it lives; the kernel
gives it back whatever happens to the process. Whoever removes a source holds the same lock alone meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_holder import local_lock_holder
from weightferry.cache.permissions import make_folder, open_file
from weightferry.cluster.flock import try_flock
from weightferry.errors import Stalled
from weightferry.manifest import Manifest

logger = logging.getLogger(__name__)

_LOOK = 0.05  # seconds between two looks whether an eviction is over; it takes milliseconds
_PATIENCE = 300.0  # seconds; `Settings.stall_timeout` by default

_held: dict[Path, int] = {}
_holding = threading.Lock()


def hold_sources(
    layout: CacheLayout,
    tiers: Iterable[CacheLayout],
    manifest: Manifest,
    check: Callable[[], None],
    limit: float = _PATIENCE,
) -> None:
    """Note that this process uses every source of a manifest in a cache, and in others, only read; see `use`."""
    for cache in (layout, *tiers):
        for pinned in manifest.sources:
            if not pinned.in_place:
                use(cache.used_lock(cache.repo(pinned).name), check, limit, make=cache is layout)


def use(lock: Path, check: Callable[[], None], limit: float = _PATIENCE, *, make: bool = True) -> None:
    """Note that this process uses a source, until it ends; waits while the source is being evicted.

    A cache that this process may not even read that file of is used without: whoever evicts there has to know.

    Parameters
    ----------
    lock
        The file of the source, `CacheLayout.used_lock`.
    check
        Called while waiting; what it raises ends the wait.
    limit
        Seconds to wait.
    make
        Whether to make the file where there is none.

    Raises
    ------
    Stalled
        An eviction of it is not over by then.
    """
    with _holding:
        if lock in _held:
            return
        try:
            descriptor = _open(lock, make=make)
        except OSError:
            return
        try:
            if not _await(lambda: _is_shared(descriptor), check, limit):
                raise Stalled(
                    f"is being removed for {limit:.0f} s by {local_lock_holder(lock) or 'another process'}",
                    subject=str(lock),
                )
        except BaseException:
            os.close(descriptor)
            raise
        _held[lock] = descriptor


def _is_shared(descriptor: int) -> bool:
    try:
        return try_flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        return True  # no flock here


def _await(done: Callable[[], bool], check: Callable[[], None], limit: float) -> bool:
    """Look again and again; whether it was done in time."""
    until = time.monotonic() + limit
    while not done():
        check()
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK)
    return True


def forget() -> None:
    """Give back what this process uses; for tests, and after a fork that goes on with something else."""
    with _holding:
        for descriptor in _held.values():
            os.close(descriptor)
        _held.clear()


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[bool]:
    """Yield whether nobody uses a source; if so, nobody begins to while this context lasts."""
    descriptor = _open(lock)
    try:
        yield try_flock(descriptor)
    finally:
        # Not by closing alone: a process that was forked meanwhile has the file open too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def serialized(lock: Path, check: Callable[[], None], limit: float = _PATIENCE) -> Iterator[None]:
    """Wait until nobody else is in such a context of the same file; without locks nobody waits.

    Parameters
    ----------
    check
        Called while waiting; what it raises ends the wait.
    limit
        Seconds to wait before going on all the same.
    """
    with contextlib.ExitStack() as held:
        if not _await(lambda: _is_ours(held, lock), check, limit):
            logger.warning(
                "%s is held for %.0f s by %s: going on", lock, limit, local_lock_holder(lock) or "another process"
            )
        yield


def _is_ours(held: contextlib.ExitStack, lock: Path) -> bool:
    try:
        if held.enter_context(alone(lock)):
            return True
    except OSError:
        return True  # no flock here, or nothing may be written: that shows soon enough
    held.close()
    return False


def in_use(lock: Path) -> bool:
    """Whether a living process uses a source."""
    if not lock.exists():
        return False
    with alone(lock) as free:
        return not free


def _open(lock: Path, *, make: bool = True) -> int:
    """Open a file to lock it, for which the right to read is enough on most file systems; made where there is none."""
    for flags in (os.O_RDWR, os.O_RDONLY):  # NFS locks for writing only what is opened for that
        with contextlib.suppress(FileNotFoundError, PermissionError):
            return os.open(lock, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not make:
        raise FileNotFoundError(errno.ENOENT, "not there", str(lock))
    make_folder(lock.parent)
    return open_file(lock, os.O_RDWR)
