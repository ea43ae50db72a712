"""Which testbeds there are, which of them live, and removing what the dead ones left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator

from .errors import TestbedError
from .layout import Layout, base_folder
from .state import State


def claim(layout: Layout) -> int:
    """Make the folder of a new testbed and remove those of dead ones.

    Returns
    -------
    int
        A file descriptor that holds the testbed's lock. Whoever inherits it keeps the testbed alive; the kernel lets
        go of the lock when the last of them has ended, however.

    Raises
    ------
    TestbedError
        A living testbed has that name.
    """
    with _base_locked():
        for other in _layouts():
            if not _lives(other):
                _bury(other)
        try:
            layout.folder.mkdir()
        except FileExistsError:
            raise TestbedError(f"a testbed {layout.name!r} is already up in {layout.folder}") from None
        lock = os.open(layout.lock, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock


def release(layout: Layout) -> None:
    """Remove the folder of a testbed whose processes have ended, the calling one excepted; fine when it is gone."""
    with _base_locked():
        if layout.folder.exists():
            shutil.rmtree(layout.folder)


def living() -> list[Layout]:
    """Return the testbeds of this user that live, by name."""
    with _base_locked():
        return [layout for layout in _layouts() if _lives(layout)]


def _layouts() -> list[Layout]:
    base = base_folder()
    return [Layout(folder.name) for folder in sorted(base.iterdir())] if base.is_dir() else []


def _lives(layout: Layout) -> bool:
    try:
        lock = os.open(layout.lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _bury(layout: Layout) -> None:
    # Nobody holds the lock, so the supervisor is gone and the kernel has ended the rest, or is about to: wait for it.
    with contextlib.suppress(TestbedError):
        for process in State.load(layout).processes:
            process.end(patience=0)
    shutil.rmtree(layout.folder)


@contextlib.contextmanager
def _base_locked() -> Iterator[None]:
    """Hold the lock of the base folder, making it first and removing it afterwards when nothing is in it."""
    base = base_folder()
    descriptor = _open_locked()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            base.rmdir()
        os.close(descriptor)


def _open_locked() -> int:
    base = base_folder()
    while True:
        with contextlib.suppress(FileExistsError):
            base.mkdir(mode=0o755)
        try:
            descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        mine = os.fstat(descriptor)
        if mine.st_uid != os.geteuid():
            os.close(descriptor)
            raise TestbedError(f"{base} belongs to another user: it was not made by a testbed of yours")
        # Whoever held the lock before may have removed the folder that we waited for.
        if base.exists() and base.stat().st_ino == mine.st_ino:
            return descriptor
        os.close(descriptor)
