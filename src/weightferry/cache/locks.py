"""The locks on files' content: the kernel's, shared with huggingface_hub, or files where the kernel's mean nothing.

They save bandwidth: of several jobs that want one file, one reads it. Correctness rests on checksums and on the atomic
rename, so a lock that cannot be had (somebody else's lock file, a holder that gives no sign of life) is done without.
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

_SLICE = 0.5  # seconds between two looks at whether the operation still goes on
_SAY_EVERY = 10.0  # seconds, as huggingface_hub does


@dataclass(frozen=True)
class LockTimeouts:
    """How long holders are waited for, in seconds.

    Attributes
    ----------
    longest
        At most, all together, whatever they do.
    silence
        Without a sign of life, where they give some.
    sign_every
        How often this process gives one.
    """

    longest: float
    silence: float = 75.0
    sign_every: float = 2.0


class FileLocks:
    """The locks that one leader holds in one operation.

    Guaranteed: a lock in `held` excludes every process that locks the same path with the same `LockSupport`. The kernel
    frees its own when this process dies; a file in its place is taken away by the next one who wants it, on proof that its
    process has ended, and passed by when that gives no sign of life. Not guaranteed: that a lock is held after `wait`;
    see `held`.

    Parameters
    ----------
    patience
        How long to wait for another holder before going on without.
    check
        Called while waiting; what it raises ends the wait.
    exclusion
        What was found to exclude here.
    """

    def __init__(self, patience: LockTimeouts, check: Callable[[], None], exclusion: LockSupport | None = None) -> None:
        self.exclusion = exclusion or LockSupport()
        self._patience, self._check = patience, check
        self._locks: dict[Path, BaseFileLock] = {}
        self._signs = _HolderHeartbeat(patience.sign_every)
        self._me: LockHolder | None = None

    def __repr__(self) -> str:
        return f"FileLocks({self.exclusion}, held={sorted(map(str, self._locks))})"

    def held(self, path: Path) -> bool:
        """Whether the lock at `path` is ours."""
        return path in self._locks

    def take(self, paths: Iterable[Path]) -> set[Path]:
        """Take what nobody else holds, without waiting; return what somebody else does."""
        return {path for path in paths if path not in self._locks and not self._acquired(path, 0.0)}

    def wait(self, paths: Iterable[Path]) -> None:
        """Take all, one after the other in the order of their paths, so that two jobs never wait for each other."""
        until = time.monotonic() + self._patience.longest
        for path in sorted(paths):
            if path not in self._locks:
                self._wait(path, until)

    def release(self, paths: Iterable[Path] | None = None) -> None:
        """Give back some, or all; the kernel's lock files stay, since somebody may hold a lock on a removed one."""
        for path in list(self._locks) if paths is None else paths:
            if path in self._locks:
                self._signs.end(_note_of(path))
                with contextlib.suppress(OSError, SoftFileLockProtocolError):
                    self._locks.pop(path).release()

    def _wait(self, path: Path, until: float) -> None:
        start, said, watched = time.monotonic(), float("-inf"), _HolderWatch(_note_of(path))
        while not self._acquired(path, _SLICE):
            self._check()
            now = time.monotonic()
            if now > until:
                logger.warning("going on without the lock %s: held by %s for %.0f s", path, _who(path), now - start)
                return
            if self._may_be_silent(path) and watched.silence() > self._patience.silence:
                logger.warning(
                    "going on without the lock %s: %s gives no sign of life; when it is known to have ended, %s may be"
                    " removed",
                    *(path, _who(path), _coordination(path)),
                )
                return
            if now - said > _SAY_EVERY:
                said = now
                logger.info("waiting for the lock %s, held by %s", path, _who(path))

    def _may_be_silent(self, path: Path) -> bool:
        """Whether the holder would give signs of life; huggingface_hub gives none."""
        return not self.exclusion.by_flock or (self.exclusion.noted and _note_of(path).exists())

    def _acquired(self, path: Path, timeout: float) -> bool:
        """Whether there is nobody to wait for: the lock is ours now, or cannot be had at all."""
        lock = self._lock(path)
        try:
            make_folder(path.parent)
            if isinstance(lock, StrictSoftFileLock):
                _break_dead(lock, _note_of(path))
            lock.acquire(timeout=timeout, poll_interval=0.05)
        except Timeout:
            return False
        except (NotImplementedError, OSError, SoftFileLockProtocolError) as error:
            if isinstance(lock, StrictSoftFileLock) and _has_claims(lock):
                return False  # another user's, which this one may not look at more closely
            # ENOLCK, EACCES (another user's lock file), EROFS, no hard links.
            logger.warning("going on without the lock %s: %s", path, error)
            return True
        self._locks[path] = lock
        if self.exclusion.noted:
            claims = tuple(claim.name for claim in lock.claims) if isinstance(lock, StrictSoftFileLock) else ()
            self._me = self._me or LockHolder.me()
            self._signs.begin(_note_of(path), replace(self._me, claims=claims).text)
        return True

    def _lock(self, path: Path) -> BaseFileLock:
        if self.exclusion.by_flock:
            return FileLock(path, mode=0o664, fallback_to_soft=False, thread_local=False)
        # Not at the path that huggingface_hub uses: its own soft lock would wait there for ever.
        return StrictSoftFileLock(_soft_path(path), mode=0o664, thread_local=False)


def _soft_path(path: Path) -> Path:
    return path.with_suffix(".soft")


def _coordination(path: Path) -> Path:
    """What `StrictSoftFileLock` keeps its claims in."""
    return path.with_suffix(".soft.filelock")


def _note_of(path: Path) -> Path:
    return path.with_suffix(".holder")


def _who(path: Path) -> str:
    """Name the holder of a lock, as far as it is known."""
    return str(LockHolder.read(_note_of(path)) or local_lock_holder(path) or "another process")


def _has_claims(lock: StrictSoftFileLock) -> bool:
    try:
        return bool(lock.claims)
    except (OSError, SoftFileLockProtocolError):
        return False


def _break_dead(lock: StrictSoftFileLock, note: Path) -> None:
    """Remove the claims of a holder of which it is proven that its process has ended."""
    holder = LockHolder.read(note)
    if holder is None or not holder.is_dead:
        return
    for claim in lock.claims:
        if claim.name in holder.claims:
            with contextlib.suppress(FileNotFoundError):
                lock.force_break(claim.name)
                logger.warning("removed a claim on %s: %s has ended", lock.lock_file, holder)


class _HolderWatch:
    """The note of a holder, as it changes."""

    def __init__(self, note: Path) -> None:
        self._note = note
        self._last, self._since = self._look(), time.monotonic()

    def silence(self) -> float:
        """Seconds since anything of it changed."""
        now = self._look()
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        return time.monotonic() - self._since

    def _look(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            seen = self._note.stat()
            return seen.st_mtime_ns, seen.st_ino
        return None


@dataclass
class _HolderHeartbeat:
    """Says beside each lock who holds it, and touches what it said as long as it does."""

    every: float
    _notes: set[Path] = field(default_factory=set)
    _ended: threading.Event | None = None

    def begin(self, note: Path, text: str) -> None:
        with contextlib.suppress(OSError):
            write_atomically(note, text)
            os.utime(note)
        self._notes.add(note)
        if self._ended is None:
            self._ended = threading.Event()
            threading.Thread(target=self._run, args=(self._ended,), name="weightferry-holds", daemon=True).start()

    def end(self, note: Path) -> None:
        if note in self._notes:
            self._notes.discard(note)
            with contextlib.suppress(OSError):
                note.unlink()
        if not self._notes and self._ended:
            self._ended.set()
            self._ended = None

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(self.every):
            for note in list(self._notes):
                with contextlib.suppress(OSError):
                    os.utime(note)  # which makes none anew that `end` has removed
