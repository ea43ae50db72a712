"""Who may read and write what is made in a cache: those who may in the folder it is made in, whatever the umask.

So a private cache stays private, and in the cache of a group everybody goes on with what anybody left. There anybody
may also have put a link where others look: nothing is made, changed or listed through one.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from weightferry.errors import BadRequest

# Never for everybody; and who removes must not have to be who made it, so no sticky bit below the cache itself.
_FOLDER = stat.S_ISGID | 0o775
_FILE = 0o664


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each with the rights and the group of the one above it.

    Raises
    ------
    BadRequest
        It is a link that somebody else put there.
    """
    if path.is_symlink() and not is_own_link(path):
        raise BadRequest(f"a link that user {path.lstat().st_uid} put into the cache: refused", subject=str(path))
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        return  # somebody else was first
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _follow(descriptor, path.parent, _FOLDER)
    finally:
        os.close(descriptor)


def open_file(path: Path, flags: int) -> int:
    """Open a file of a cache, made with the rights and the group of its folder where there is none.

    Raises
    ------
    OSError
        ELOOP: it is a link.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    _follow(descriptor, path.parent, _FILE)
    return descriptor


def write_new(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is not there yet."""
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
        file.write(content)


def touch(path: Path) -> None:
    """Let a file be there, empty if it was not, and changed now."""
    make_folder(path.parent)
    descriptor = open_file(path, os.O_WRONLY)
    try:
        os.utime(descriptor)
    finally:
        os.close(descriptor)


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what lies in a folder; nothing when that is a link, or cannot be read."""
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            with os.scandir(folder) as found:
                yield from found


def folders(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder, but for links and those that are half-made."""
    for entry in entries(folder):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield Path(entry.path)


def is_own_link(link: Path) -> bool:
    """Whether a link was made by this user or by root."""
    return link.lstat().st_uid in (0, os.geteuid())


def _follow(descriptor: int, folder: Path, most: int) -> None:
    above = folder.stat()
    # A group that this user is not in, or a file system without rights.
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_gid != above.st_gid:
            os.fchown(descriptor, -1, above.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, above.st_mode & most)
