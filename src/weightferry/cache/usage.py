"""Which processes use which source of a cache: eviction removes no source that a running process has staged.

A process holds a shared `flock` on one small file for each source that it has staged, until it ends. The kernel frees
the lock however the process ends. An eviction holds the same lock exclusively while it removes a source.
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

_POLL_INTERVAL = 0.05  # seconds between two tries to lock; an eviction takes milliseconds
_TIMEOUT = 300.0  # seconds; the default of `Settings.stall_timeout`

_held_locks: dict[Path, int] = {}
_held_locks_guard = threading.Lock()


def hold_sources(
    layout: CacheLayout,
    tiers: Iterable[CacheLayout],
    manifest: Manifest,
    check: Callable[[], None],
    timeout: float = _TIMEOUT,
) -> None:
    """Hold every source of a manifest in a cache, and in tiers, which are only read; see `hold_source`."""
    for cache in (layout, *tiers):
        for pinned in manifest.sources:
            if not pinned.in_place:
                hold_source(cache.used_lock(cache.repo(pinned).name), check, timeout, make=cache is layout)


def hold_source(lock: Path, check: Callable[[], None], timeout: float = _TIMEOUT, *, make: bool = True) -> None:
    """Protect a source from eviction until this process ends. Waits while an eviction removes the source.

    Where this process may not even read the lock file, it uses the source without protection. The administrator who
    evicts in such a cache must know which jobs use it.

    Parameters
    ----------
    lock
        The lock file of the source, `CacheLayout.used_lock`.
    check
        Called while waiting; its exception ends the wait.
    timeout
        Seconds to wait.
    make
        Whether to make the lock file when it does not exist.

    Raises
    ------
    Stalled
        An eviction still holds the lock after `timeout` seconds.
    """
    with _held_locks_guard:
        if lock in _held_locks:
            return
        try:
            descriptor = _open(lock, make=make)
        except OSError:
            return
        try:
            if not _wait_until(lambda: _lock_shared(descriptor), check, timeout):
                raise Stalled(
                    f"cannot use this cached source: it is still being evicted after {timeout:.0f} s by "
                    f"{local_lock_holder(lock) or 'another process'}. Check whether that process hangs, then try again",
                    subject=str(lock),
                )
        except BaseException:
            os.close(descriptor)
            raise
        _held_locks[lock] = descriptor


def _lock_shared(descriptor: int) -> bool:
    try:
        return try_flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        return True  # this file system has no flock


def _wait_until(done: Callable[[], bool], check: Callable[[], None], timeout: float) -> bool:
    """Poll until `done` returns true. Return False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not done():
        check()
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL)
    return True


def release_held_sources() -> None:
    """Release every source that this process holds; for tests, and after a fork whose child uses other sources."""
    with _held_locks_guard:
        for descriptor in _held_locks.values():
            os.close(descriptor)
        _held_locks.clear()


@contextlib.contextmanager
def exclusive_use(lock: Path) -> Iterator[bool]:
    """Yield whether no process uses a source. If so, none can start to use it until the context ends."""
    descriptor = _open(lock)
    try:
        yield try_flock(descriptor)
    finally:
        # Closing is not enough: a process that was forked in the meantime has the file open too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def serialized(lock: Path, check: Callable[[], None], timeout: float = _TIMEOUT) -> Iterator[None]:
    """Run a block in one process at a time. Where the file system has no locks, the block runs without waiting.

    Parameters
    ----------
    check
        Called while waiting; its exception ends the wait.
    timeout
        Seconds to wait before continuing without the lock.
    """
    with contextlib.ExitStack() as held:
        if not _wait_until(lambda: _lock_exclusive(held, lock), check, timeout):
            logger.warning(
                "continuing without the lock %s: %s still holds it after %.0f s",
                *(lock, local_lock_holder(lock) or "another process", timeout),
            )
        yield


def _lock_exclusive(held: contextlib.ExitStack, lock: Path) -> bool:
    try:
        if held.enter_context(exclusive_use(lock)):
            return True
    except OSError:
        return True  # no flock here, or no right to write; later steps report a missing right
    held.close()
    return False


def in_use(lock: Path) -> bool:
    """Whether a running process uses a source."""
    if not lock.exists():
        return False
    with exclusive_use(lock) as unused:
        return not unused


def _open(lock: Path, *, make: bool = True) -> int:
    """Open a lock file, and make it when it does not exist. Read access is enough on most file systems."""
    for flags in (os.O_RDWR, os.O_RDONLY):  # NFS grants an exclusive lock only on a file that is open for writing
        with contextlib.suppress(FileNotFoundError, PermissionError):
            return os.open(lock, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not make:
        raise FileNotFoundError(errno.ENOENT, "no such lock file", str(lock))
    make_folder(lock.parent)
    return open_file(lock, os.O_RDWR)
