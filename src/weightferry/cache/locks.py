"""The lock on one file's content, shared with huggingface_hub.

It saves bandwidth: of several jobs that want one file, one reads it. Correctness rests on checksums and on the atomic
rename, so a lock that cannot be had (a file system without locks, somebody else's lock file) is done without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_SLICE = 0.5  # seconds between two looks at whether the operation still goes on
_SAY_EVERY = 10.0  # seconds, as huggingface_hub does


@contextmanager
def content_lock(path: Path, timeout: float, check: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock at `path`, or go on without it; yields whether it is held.

    Parameters
    ----------
    path
        The lock file; never removed, since somebody may hold a lock on the removed one.
    timeout
        Seconds to wait for another holder before going on without.
    check
        Called while waiting; what it raises ends the wait.
    """
    # Without flock no soft lock instead: its file would outlive a killed job, and the next one would wait for nobody.
    lock = FileLock(path, mode=0o664, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _acquire(lock, timeout, check)
    except (NotImplementedError, OSError) as error:
        # ENOSYS and ENOLCK (Lustre without -o flock, some NFS), EACCES (another user's lock file), EROFS.
        logger.warning("going on without the lock %s: %s", path, error)
        held = False
    try:
        yield held
    finally:
        if held:
            lock.release()


def _acquire(lock: FileLock, timeout: float, check: Callable[[], None]) -> bool:
    start = said = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_SLICE, poll_interval=0.05)
        except Timeout:
            now = time.monotonic()
            check()
            if now - start > timeout:
                logger.warning("going on without the lock %s: held elsewhere for %.0f s", lock.lock_file, now - start)
                return False
            if now - said > _SAY_EVERY:
                said = now
                logger.info("waiting for the lock %s, held by another process", lock.lock_file)
        else:
            return True
