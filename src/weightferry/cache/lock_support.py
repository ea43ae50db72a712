"""Whether a lock on a file of a cache keeps others out: tried, since `flock` may let everybody in, or not be there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.atomic import write_atomically
from weightferry.cache.layout import CacheLayout
from weightferry.cache.permissions import open_file
from weightferry.cluster.domains import is_local, mount_of
from weightferry.cluster.flock import try_flock

_ON_TWO = "flock succeeds on two machines at once"
# Options with which `flock` keeps out processes of the same machine alone: mount.lustre(8), nfs(5).
_ON_ONE_MACHINE = frozenset({"localflock", "nolock", "local_lock=flock", "local_lock=all"})


@dataclass(frozen=True)
class LockSupport:
    """The locks to use in a cache.

    Attributes
    ----------
    why : str
        Why the kernel's `flock` is of no use there; empty where it is.
    noted : bool
        Whether holders say who they are beside their locks: where other machines may see the cache, the kernel of this
        one does not know them.
    """

    why: str = ""
    noted: bool = False

    @property
    def by_flock(self) -> bool:
        """Whether the kernel's own lock is used; otherwise files take its place."""
        return not self.why

    def __str__(self) -> str:
        return "flock" if self.by_flock else f"files ({self.why})"


def exclusion(layout: CacheLayout, *, across: bool = True) -> LockSupport:
    """Find out which locks mean something in a cache.

    Parameters
    ----------
    across
        False: two machines of the job were seen to hold one lock at once.
    """
    why = _tried(layout.probe)
    if is_local(layout.root):
        return LockSupport(why, noted=bool(why))
    if not why and (options := mount_of(layout.root).options & _ON_ONE_MACHINE):
        why = f"the mount option {min(options)} lets flock exclude on one machine alone"
    if not why and not across:
        # Jobs on one machine, and those who evict, cannot see that by themselves.
        with contextlib.suppress(OSError):
            write_atomically(layout.no_flock, _ON_TWO)
        why = _ON_TWO
    with contextlib.suppress(OSError):
        why = why or layout.no_flock.read_text()
    return LockSupport(why, noted=True)


def _tried(probe: Path) -> str:
    """Lock a file twice; why that says that `flock` is of no use, if it does."""
    with contextlib.ExitStack() as opened:
        try:
            first, second = (opened.enter_context(_opened(probe)) for _ in range(2))
        except OSError:
            return ""  # who cannot write here takes no lock either
        try:
            # If somebody else has it, that says it too.
            return "flock succeeds for everybody" if try_flock(first) and try_flock(second) else ""
        except OSError as error:
            return f"flock: {error.strerror}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = open_file(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
