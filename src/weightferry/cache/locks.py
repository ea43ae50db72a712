"""The locks on files' content, shared with huggingface_hub.

They save bandwidth: of several jobs that want one file, one reads it. Correctness rests on checksums and on the atomic
rename, so a lock that cannot be had (a file system without locks, somebody else's lock file) is done without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from weightferry.cache.rights import make_folder

logger = logging.getLogger(__name__)

_SLICE = 0.5  # seconds between two looks at whether the operation still goes on
_SAY_EVERY = 10.0  # seconds, as huggingface_hub does


class Locks:
    """The locks that one leader holds in one operation.

    Guaranteed: a lock in `held` excludes everybody who locks the same path where the file system's `flock` does; the
    kernel frees it when this process dies. Not guaranteed: that a lock is held after `wait`; see `held`.

    Parameters
    ----------
    timeout
        Seconds to wait for another holder before going on without.
    check
        Called while waiting; what it raises ends the wait.
    """

    def __init__(self, timeout: float, check: Callable[[], None]) -> None:
        self._timeout, self._check = timeout, check
        self._locks: dict[Path, FileLock] = {}

    def __repr__(self) -> str:
        return f"Locks(held={sorted(map(str, self._locks))})"

    def held(self, path: Path) -> bool:
        """Whether the lock at `path` is ours."""
        return path in self._locks

    def take(self, paths: Iterable[Path]) -> set[Path]:
        """Take what nobody else holds, without waiting; return what somebody else does."""
        return {path for path in paths if path not in self._locks and not self._acquired(path, 0.0)}

    def wait(self, paths: Iterable[Path]) -> None:
        """Take all, one after the other in the order of their paths, so that two jobs never wait for each other."""
        for path in sorted(paths):
            if path not in self._locks:
                self._wait(path)

    def release(self, paths: Iterable[Path] | None = None) -> None:
        """Give back some, or all; the lock files stay, since somebody may hold a lock on a removed one."""
        for path in list(self._locks) if paths is None else paths:
            if path in self._locks:
                self._locks.pop(path).release()

    def _wait(self, path: Path) -> None:
        start = said = time.monotonic()
        while not self._acquired(path, _SLICE):
            self._check()
            now = time.monotonic()
            if now - start > self._timeout:
                logger.warning("going on without the lock %s: held elsewhere for %.0f s", path, now - start)
                return
            if now - said > _SAY_EVERY:
                said = now
                logger.info("waiting for the lock %s, held by another process", path)

    def _acquired(self, path: Path, timeout: float) -> bool:
        """Whether there is nobody to wait for: the lock is ours now, or cannot be had at all."""
        # Without flock no soft lock instead: its file would outlive a killed job, and the next one would wait for
        # nobody.
        lock = FileLock(path, mode=0o664, fallback_to_soft=False, thread_local=False)
        try:
            make_folder(path.parent)
            lock.acquire(timeout=timeout, poll_interval=0.05)
        except Timeout:
            return False
        except (NotImplementedError, OSError) as error:
            # ENOSYS and ENOLCK (Lustre without -o flock, some NFS), EACCES (another user's lock file), EROFS.
            logger.warning("going on without the lock %s: %s", path, error)
        else:
            self._locks[path] = lock
        return True
