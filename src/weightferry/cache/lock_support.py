"""Detect whether `flock` works in a cache folder: on some file systems it excludes no process, or does not exist."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.atomic import write_atomically
from weightferry.cache.layout import CacheLayout
from weightferry.cache.permissions import open_file
from weightferry.cluster.flock import try_flock
from weightferry.cluster.mounts import is_local, mount_of

_ON_TWO_MACHINES = "flock succeeds on two machines at once"
# With these mount options `flock` excludes only processes of the same machine: mount.lustre(8), nfs(5).
_ONE_MACHINE_OPTIONS = frozenset({"localflock", "nolock", "local_lock=flock", "local_lock=all"})


@dataclass(frozen=True)
class LockSupport:
    """Which kind of lock works in a cache.

    Attributes
    ----------
    reason : str
        Why the kernel's `flock` does not work there; empty when it works.
    holder_notes : bool
        Whether a process that holds a lock writes a note beside it. Needed where other machines may see the cache: the
        kernel of this machine does not know their lock holders.
    """

    reason: str = ""
    holder_notes: bool = False

    @property
    def flock_works(self) -> bool:
        """Whether the kernel's lock is used; otherwise lock files replace it."""
        return not self.reason

    def __str__(self) -> str:
        return "flock" if self.flock_works else f"files ({self.reason})"


def detect_lock_support(layout: CacheLayout, *, across_machines: bool = True) -> LockSupport:
    """Return which kind of lock works in a cache.

    Parameters
    ----------
    across_machines
        False when two machines of the job held one lock at the same time in a test.
    """
    reason = _probe_flock(layout.probe_lock)
    if is_local(layout.root):
        return LockSupport(reason, holder_notes=bool(reason))
    if not reason and (options := mount_of(layout.root).options & _ONE_MACHINE_OPTIONS):
        reason = f"with the mount option {min(options)}, flock excludes only processes of the same machine"
    if not reason and not across_machines:
        # Jobs on one machine and evictions cannot detect this. The note tells them.
        with contextlib.suppress(OSError):
            write_atomically(layout.no_flock, _ON_TWO_MACHINES)
        reason = _ON_TWO_MACHINES
    with contextlib.suppress(OSError):
        reason = reason or layout.no_flock.read_text()
    return LockSupport(reason, holder_notes=True)


def _probe_flock(path: Path) -> str:
    """Lock a file twice. Return why `flock` does not work; empty when it works."""
    with contextlib.ExitStack() as opened:
        try:
            first, second = (opened.enter_context(_open_file(path)) for _ in range(2))
        except OSError:
            return ""  # a process that cannot write here takes no lock either
        try:
            # When another process holds the lock, both calls fail. That also shows that flock works.
            return "flock grants one lock twice" if try_flock(first) and try_flock(second) else ""
        except OSError as error:
            return f"flock: {error.strerror}"


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[int]:
    descriptor = open_file(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
