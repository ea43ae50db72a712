"""The locks of files' content: `flock`, shared with huggingface_hub, or lock files where `flock` does not work.

Locks save bandwidth: when several jobs need one file, one of them downloads it. Correctness rests on checksums and on
the atomic rename. So a job goes on without a lock that it cannot get, for example because the lock file belongs to
another user, or because the holder sends no heartbeat.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLockProtocolError, StrictSoftFileLock, Timeout

from weightferry.cache.atomic import write_atomically
from weightferry.cache.lock_holder import LockHolder, local_lock_holder
from weightferry.cache.lock_support import LockSupport
from weightferry.cache.permissions import make_folder

logger = logging.getLogger(__name__)

_CHECK_INTERVAL = 0.5  # seconds between two checks whether the operation was cancelled
_LOG_INTERVAL = 10.0  # seconds, as huggingface_hub does


@dataclass(frozen=True)
class LockTimeouts:
    """How long to wait for locks that other processes hold, in seconds.

    Attributes
    ----------
    total
        For all locks together, also when their holders send heartbeats.
    silence
        Since the last heartbeat of a holder that sends heartbeats.
    heartbeat_interval
        How often this process sends a heartbeat for its own locks.
    """

    total: float
    silence: float = 75.0
    heartbeat_interval: float = 2.0


class FileLocks:
    """The locks that one leader holds in one operation.

    Guaranteed: a lock for which `is_held` is true excludes every process that locks the same path with the same
    `LockSupport`. The kernel frees its locks when this process dies. The next process removes a lock file when it has
    proof that the holder has ended, and continues without the lock when the holder stops its heartbeats.
    Not guaranteed: that a lock is held after `acquire`; see `is_held`.

    Parameters
    ----------
    timeouts
        How long to wait for another holder before continuing without the lock.
    check
        Called while waiting; its exception ends the wait.
    lock_support
        The result of `detect_lock_support`; None: `flock` works.
    """

    def __init__(
        self, timeouts: LockTimeouts, check: Callable[[], None], lock_support: LockSupport | None = None
    ) -> None:
        self.lock_support = lock_support or LockSupport()
        self._timeouts, self._check = timeouts, check
        self._locks: dict[Path, BaseFileLock] = {}
        self._heartbeat = _HolderHeartbeat(timeouts.heartbeat_interval)
        self._this_process: LockHolder | None = None

    def __repr__(self) -> str:
        return f"FileLocks({self.lock_support}, held={sorted(map(str, self._locks))})"

    def is_held(self, path: Path) -> bool:
        """Whether this object holds the lock at `path`."""
        return path in self._locks

    def try_acquire(self, paths: Iterable[Path]) -> set[Path]:
        """Acquire the free locks without waiting. Return the paths that another process holds."""
        return {path for path in paths if path not in self._locks and not self._try_lock(path, 0.0)}

    def acquire(self, paths: Iterable[Path]) -> None:
        """Acquire all locks one by one, in the order of their paths, so that two jobs never wait for each other."""
        deadline = time.monotonic() + self._timeouts.total
        for path in sorted(paths):
            if path not in self._locks:
                self._wait(path, deadline)

    def release(self, paths: Iterable[Path] | None = None) -> None:
        """Release some locks, or all. The lock files of `flock` stay: another process may wait for one of them."""
        for path in list(self._locks) if paths is None else paths:
            if path in self._locks:
                self._heartbeat.stop(_holder_note(path))
                with contextlib.suppress(OSError, SoftFileLockProtocolError):
                    self._locks.pop(path).release()

    def _wait(self, path: Path, deadline: float) -> None:
        start, last_logged, watch = time.monotonic(), float("-inf"), _HolderWatch(_holder_note(path))
        while not self._try_lock(path, _CHECK_INTERVAL):
            self._check()
            now = time.monotonic()
            if now > deadline:
                logger.warning(
                    "continuing without the lock %s: %s still holds it after %.0f s",
                    *(path, _describe_holder(path), now - start),
                )
                return
            if self._sends_heartbeats(path) and watch.silence() > self._timeouts.silence:
                logger.warning(
                    "continuing without the lock %s: its holder, %s, sends no heartbeat. If that process has ended,"
                    " remove %s",
                    *(path, _describe_holder(path), _claims_folder(path)),
                )
                return
            if now - last_logged > _LOG_INTERVAL:
                last_logged = now
                logger.info("waiting for the lock %s: %s holds it", path, _describe_holder(path))

    def _sends_heartbeats(self, path: Path) -> bool:
        """Whether the holder of a lock sends heartbeats; huggingface_hub sends none."""
        return not self.lock_support.flock_works or (self.lock_support.holder_notes and _holder_note(path).exists())

    def _try_lock(self, path: Path, timeout: float) -> bool:
        """Try to acquire a lock. True when waiting is over: this object holds the lock, or can never get it."""
        lock = self._new_lock(path)
        try:
            make_folder(path.parent)
            if isinstance(lock, StrictSoftFileLock):
                _break_dead_claims(lock, _holder_note(path))
            lock.acquire(timeout=timeout, poll_interval=0.05)
        except Timeout:
            return False
        except (NotImplementedError, OSError, SoftFileLockProtocolError) as error:
            if isinstance(lock, StrictSoftFileLock) and _has_claims(lock):
                return False  # another user holds the lock, and this user may not read more about it
            # ENOLCK, EACCES (another user's lock file), EROFS, or a file system without hard links.
            logger.warning("continuing without the lock %s: %s", path, error)
            return True
        self._locks[path] = lock
        if self.lock_support.holder_notes:
            claims = tuple(claim.name for claim in lock.claims) if isinstance(lock, StrictSoftFileLock) else ()
            self._this_process = self._this_process or LockHolder.this_process()
            self._heartbeat.start(_holder_note(path), replace(self._this_process, claims=claims).json_text)
        return True

    def _new_lock(self, path: Path) -> BaseFileLock:
        if self.lock_support.flock_works:
            return FileLock(path, mode=0o664, fallback_to_soft=False, thread_local=False)
        # Another path than the lock of huggingface_hub: its own soft lock would wait at that path without end.
        return StrictSoftFileLock(_soft_lock_path(path), mode=0o664, thread_local=False)


def _soft_lock_path(path: Path) -> Path:
    return path.with_suffix(".soft")


def _claims_folder(path: Path) -> Path:
    """Return the folder in which `StrictSoftFileLock` keeps its claims."""
    return path.with_suffix(".soft.filelock")


def _holder_note(path: Path) -> Path:
    return path.with_suffix(".holder")


def _describe_holder(path: Path) -> str:
    """Name the process that holds a lock, as far as it is known."""
    return str(LockHolder.read(_holder_note(path)) or local_lock_holder(path) or "another process")


def _has_claims(lock: StrictSoftFileLock) -> bool:
    try:
        return bool(lock.claims)
    except (OSError, SoftFileLockProtocolError):
        return False


def _break_dead_claims(lock: StrictSoftFileLock, note: Path) -> None:
    """Remove the claims of a holder when it is proven that its process has ended."""
    holder = LockHolder.read(note)
    if holder is None or not holder.is_dead:
        return
    for claim in lock.claims:
        if claim.name in holder.claims:
            with contextlib.suppress(FileNotFoundError):
                lock.force_break(claim.name)
                logger.warning("removed a stale claim on %s: %s has ended", lock.lock_file, holder)


class _HolderWatch:
    """Measures how long the note of a lock holder has not changed."""

    def __init__(self, note: Path) -> None:
        self._note = note
        self._last, self._since = self._status(), time.monotonic()

    def silence(self) -> float:
        """Return the seconds since the note last changed."""
        status = self._status()
        if status != self._last:
            self._last, self._since = status, time.monotonic()
        return time.monotonic() - self._since

    def _status(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            status = self._note.stat()
            return status.st_mtime_ns, status.st_ino
        return None


@dataclass
class _HolderHeartbeat:
    """Writes a note beside each lock that names its holder, and touches the notes from a thread as a heartbeat.

    Attributes
    ----------
    interval : float
        Seconds between two heartbeats.
    """

    interval: float
    _notes: set[Path] = field(default_factory=set)
    _stopped: threading.Event | None = None

    def start(self, note: Path, text: str) -> None:
        with contextlib.suppress(OSError):
            write_atomically(note, text)
            os.utime(note)
        self._notes.add(note)
        if self._stopped is None:
            self._stopped = threading.Event()
            thread = threading.Thread(
                target=self._run, args=(self._stopped,), name="weightferry-lock-heartbeat", daemon=True
            )
            thread.start()

    def stop(self, note: Path) -> None:
        if note in self._notes:
            self._notes.discard(note)
            with contextlib.suppress(OSError):
                note.unlink()
        if not self._notes and self._stopped:
            self._stopped.set()
            self._stopped = None

    def _run(self, stopped: threading.Event) -> None:
        while not stopped.wait(self.interval):
            for note in list(self._notes):
                with contextlib.suppress(OSError):
                    os.utime(note)  # fails for a note that `stop` has removed, and does not make it again
