"""Who may read and write what is made in a cache: those who may in the folder it is made in, whatever the umask.

So a private cache stays private, and in the cache of a group everybody goes on with what anybody left.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

# Never for everybody; and who removes must not have to be who made it, so no sticky bit below the cache itself.
_FOLDER = stat.S_ISGID | 0o775
_FILE = 0o664


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each with the rights and the group of the one above it."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        return  # somebody else was first
    _follow(path, _FOLDER)


def follow(file: Path) -> None:
    """Give a new file the rights and the group of its folder; of somebody else's nothing changes."""
    _follow(file, _FILE)


def _follow(path: Path, most: int) -> None:
    with contextlib.suppress(OSError):  # somebody else's, or a file system without rights
        above = path.parent.stat()
        if path.stat().st_gid != above.st_gid:
            os.chown(path, -1, above.st_gid)
        path.chmod(above.st_mode & most)
