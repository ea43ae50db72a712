"""Whether a cache folder can be believed: nobody else may have made it, or may put things into it unseen.

Big files in a cache are believed on the word of notes in the same folder; who may write there may let any weights in.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from weightferry.errors import BadRequest


def prepare(root: Path) -> None:
    """Check the path of a cache, and make the folder, for this user alone, where there is none.

    An administrator who wants a cache for a group makes the folder: owned by root or by one of the group, writable by
    the group. Root itself is not asked who owns a folder: in a container it mostly is somebody else.

    Raises
    ------
    BadRequest
        Somebody else could have planted it: a foreign owner, a folder that anybody may write to, or a link that
        somebody else put into such a folder.
    OSError
        It cannot be made.
    """
    _check_links(root)
    try:
        seen = root.stat()
    except FileNotFoundError:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return
    mode = seen.st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise BadRequest(
            f"anybody may write to this cache folder (mode {stat.S_IMODE(mode):o}), and replace weights in it: refused;"
            " chmod o-w it",
            subject=str(root),
        )
    if not _is_trusted(seen):
        raise BadRequest(
            f"this cache folder belongs to user {seen.st_uid}, who may have planted it: refused; name another one, or "
            "let it be writable by a group that you are in",
            subject=str(root),
        )


def _is_trusted(seen: os.stat_result) -> bool:
    me = os.geteuid()
    shared = bool(seen.st_mode & stat.S_IWGRP) and seen.st_gid in {os.getegid(), *os.getgroups()}
    return me in (0, seen.st_uid) or seen.st_uid == 0 or shared


def _check_links(root: Path) -> None:
    for path in (root, *root.parents):
        if not path.is_symlink():
            continue
        folder, link = path.parent.stat(), path.lstat()
        if folder.st_mode & stat.S_IWOTH and link.st_uid not in (0, os.geteuid()):
            raise BadRequest(
                f"{path} is a link that user {link.st_uid} put into a folder that anybody may write to: refused",
                subject=str(root),
            )
