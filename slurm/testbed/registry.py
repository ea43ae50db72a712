"""Lists the testbeds of this user, and removes the files of testbeds that have ended."""

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
    """Create the folder of a new testbed, and remove the folders of testbeds that have ended.

    Returns
    -------
    int
        A file descriptor that holds the testbed's lock. The testbed counts as running as long as any process has it
        open; the kernel releases the lock when the last such process ends.

    Raises
    ------
    TestbedError
        A running testbed has that name.
    """
    with _base_lock():
        for other in _layouts():
            if not _is_running(other):
                _clean_up(other)
        try:
            layout.folder.mkdir()
        except FileExistsError:
            raise TestbedError(f"a testbed {layout.name!r} is already up in {layout.folder}") from None
        lock = os.open(layout.lock, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock


def release(layout: Layout) -> None:
    """Remove the folder of a testbed, if it exists; all its processes except the caller must have ended."""
    with _base_lock():
        if layout.folder.exists():
            shutil.rmtree(layout.folder)


def running() -> list[Layout]:
    """Return the running testbeds of this user, sorted by name."""
    with _base_lock():
        return [layout for layout in _layouts() if _is_running(layout)]


def _layouts() -> list[Layout]:
    base = base_folder()
    return [Layout(folder.name) for folder in sorted(base.iterdir())] if base.is_dir() else []


def _is_running(layout: Layout) -> bool:
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


def _clean_up(layout: Layout) -> None:
    # The lock is free, so the supervisor has ended, and the kernel ends the other processes: wait for their end.
    with contextlib.suppress(TestbedError):
        for process in State.load(layout).processes:
            process.end(grace=0)
    shutil.rmtree(layout.folder)


@contextlib.contextmanager
def _base_lock() -> Iterator[None]:
    """Create and lock the base folder; at the end remove it if it is empty."""
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
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            os.close(descriptor)
            raise TestbedError(
                f"{base} belongs to another user; remove or rename it, since your testbeds need this path"
            )
        # The previous holder of the lock may have removed the folder.
        if base.exists() and base.stat().st_ino == status.st_ino:
            return descriptor
        os.close(descriptor)
