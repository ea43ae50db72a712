"""Whether a cache folder can be believed: nobody else may have made it, or may put things into it unseen.

Big files in a cache are believed on the word of notes in the same folder; who may write there may let any weights in.
"""

from __future__ import annotations

import contextlib
import grp
import os
import stat
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.permissions import is_own_link
from weightferry.errors import BadRequest


def prepare(layout: CacheLayout, group: str = "") -> None:
    """Check the path of a cache, and make the folder where there is none: for this user alone, or for a group.

    What is made in it has the rights of the folder itself. One that is there is taken as it is: owned by root or by
    this user, or writable by a group that this user is in. Root itself is not asked who owns a folder: in a container
    it mostly is somebody else.

    Parameters
    ----------
    group
        Name of the group that a new cache is for.

    Raises
    ------
    BadRequest
        Somebody else could have planted it: a foreign owner, a folder that anybody may write to, or a link that
        somebody else put into such a folder; or there is no such group.
    OSError
        It cannot be made.
    """
    try:
        check(layout)
    except FileNotFoundError:
        _make(layout.root, group)


def check(layout: CacheLayout) -> None:
    """Check the path of a cache that is there; errors as of `prepare`.

    Raises
    ------
    FileNotFoundError
        It is not.
    """
    root = layout.root
    _check_links(root)
    seen = root.stat()
    mode = seen.st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise BadRequest(
            f"anybody may write to this cache folder (mode {stat.S_IMODE(mode):o}), and replace weights in it: refused;"
            " chmod o-w it",
            subject=str(root),
        )
    _check_owner(root, seen)
    for folder in layout.own_folders():
        if folder.is_symlink() and not is_own_link(folder):
            raise BadRequest(
                f"{folder} is a link that user {folder.lstat().st_uid} put into this cache: refused", subject=str(root)
            )
    if mode & stat.S_IWOTH:
        # Where anybody may make folders, also those below may be planted.
        for folder in layout.own_folders():
            with contextlib.suppress(FileNotFoundError):
                _check_owner(folder, folder.lstat())


def _make(root: Path, group: str) -> None:
    try:
        gid = grp.getgrnam(group).gr_gid if group else -1
    except KeyError:
        raise BadRequest(
            f"there is no group {group!r} here, for which a cache is to be made", subject=str(root)
        ) from None
    try:
        # Not made elsewhere and renamed: that takes the place of an empty folder, which another rank made and knows.
        root.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        return
    if group:
        _give(root, gid, group)


def _give(root: Path, gid: int, group: str) -> None:
    try:
        os.chown(root, -1, gid)
    except PermissionError:
        root.rmdir()
        text = f"this user is not in the group {group!r}, for which a cache is to be made"
        raise BadRequest(text, subject=str(root)) from None
    root.chmod(0o2770)


def _check_owner(folder: Path, seen: os.stat_result) -> None:
    if not _is_trusted(seen):
        raise BadRequest(
            f"this cache folder belongs to user {seen.st_uid}, who may have planted it: refused; name another one, or "
            "let it be writable by a group that you are in",
            subject=str(folder),
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
