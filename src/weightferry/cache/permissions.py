"""Permissions of new files in a cache: they follow the folder in which the file is made, not the umask.

A private cache stays private. In the cache of a group, every member can continue from the files of another member. A
member may also have placed a symbolic link there, so no function here makes, changes or lists a file through a link.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from weightferry.errors import BadRequest

# Never writable for every user. No sticky bit below the cache itself: a member may remove a file that another one made.
_FOLDER_MODE = stat.S_ISGID | 0o775
_FILE_MODE = 0o664


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, each with the permissions and the group of the folder above it.

    Raises
    ------
    BadRequest
        The path is a symbolic link that another user made.
    """
    if path.is_symlink() and not is_own_link(path):
        raise BadRequest(
            f"refused to write through {path}: it is a symbolic link made by user {path.lstat().st_uid}. Remove the "
            "link, or choose another cache folder (`--cache-dir`)",
            subject=str(path),
        )
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        return  # another process made it first
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _inherit_permissions(descriptor, path.parent, _FOLDER_MODE)
    finally:
        os.close(descriptor)


def open_file(path: Path, flags: int) -> int:
    """Open a file of a cache and return its descriptor. A new file gets the permissions and the group of its folder.

    Raises
    ------
    OSError
        ELOOP: the path is a symbolic link.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    _inherit_permissions(descriptor, path.parent, _FILE_MODE)
    return descriptor


def write_new(path: Path, content: bytes | memoryview) -> None:
    """Write a file that does not exist yet."""
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
        file.write(content)


def touch(path: Path) -> None:
    """Set the modification time of a file to now; make it, empty, when it does not exist."""
    make_folder(path.parent)
    descriptor = open_file(path, os.O_WRONLY)
    try:
        os.utime(descriptor)
    finally:
        os.close(descriptor)


def list_entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder; nothing when the folder is a symbolic link or cannot be read."""
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            with os.scandir(folder) as entries:
                yield from entries


def list_folders(folder: Path) -> Iterator[Path]:
    """Yield the subfolders of a folder, without symbolic links and hidden folders, which are temporary."""
    for entry in list_entries(folder):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield Path(entry.path)


def is_own_link(link: Path) -> bool:
    """Whether this user or root made a symbolic link."""
    return link.lstat().st_uid in (0, os.geteuid())


def _inherit_permissions(descriptor: int, folder: Path, max_mode: int) -> None:
    """Give a new file or folder the group of `folder`, and its mode as far as `max_mode` allows."""
    parent = folder.stat()
    # Fails when this user is not in the group, and on a file system without permissions.
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_gid != parent.st_gid:
            os.fchown(descriptor, -1, parent.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, parent.st_mode & max_mode)
