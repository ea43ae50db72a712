"""Check whether a cache folder can be trusted: no other user may have made it, or may replace files in it.

Notes in the cache folder decide whether a big file is hashed again. So a user who can write there can make weightferry
load any weights.
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


def prepare_cache_folder(layout: CacheLayout, group: str = "") -> None:
    """Check a cache folder; make it when it does not exist, for this user alone or for a group.

    New files in a cache get the permissions of the cache folder. An existing folder is accepted when root or this user
    owns it, or when a group of this user may write to it. For root, every owner is accepted: in a container the folder
    usually belongs to another user.

    Parameters
    ----------
    group
        Name of the group that may use a new cache.

    Raises
    ------
    BadRequest
        Another user could have put files there: a foreign owner, a folder that every user may write to, or a symbolic
        link that another user made in such a folder. Or the group does not exist.
    OSError
        The folder cannot be made.
    """
    try:
        check_cache_folder(layout)
    except FileNotFoundError:
        _create_cache_folder(layout.root, group)


def check_cache_folder(layout: CacheLayout) -> None:
    """Check an existing cache folder; errors as of `prepare_cache_folder`.

    Raises
    ------
    FileNotFoundError
        The folder does not exist.
    """
    root = layout.root
    _check_links(root)
    status = root.stat()
    mode = status.st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise BadRequest(
            f"refused to use the cache {root}: every user may write to it (mode {stat.S_IMODE(mode):o}) and replace "
            "weights. Run `chmod o-w` on it",
            subject=str(root),
        )
    _check_owner(root, status)
    for folder in layout.own_folders():
        if folder.is_symlink() and not is_own_link(folder):
            raise BadRequest(
                f"refused to use the cache {root}: {folder} is a symbolic link made by user {folder.lstat().st_uid}. "
                "Remove the link, or choose another cache folder (`--cache-dir`)",
                subject=str(root),
            )
    if mode & stat.S_IWOTH:
        # Where every user may make folders, another user may have made the cache's own folders.
        for folder in layout.own_folders():
            with contextlib.suppress(FileNotFoundError):
                _check_owner(folder, folder.lstat())


def _create_cache_folder(root: Path, group: str) -> None:
    try:
        gid = grp.getgrnam(group).gr_gid if group else -1
    except KeyError:
        raise BadRequest(
            f"cannot make the cache {root}: this host has no group {group!r}. Check `cache_group`", subject=str(root)
        ) from None
    try:
        # Not made elsewhere and renamed: the rename would replace an empty folder that another rank made and may use.
        root.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        return
    if group:
        _assign_group(root, gid, group)


def _assign_group(root: Path, gid: int, group: str) -> None:
    try:
        os.chown(root, -1, gid)
    except PermissionError:
        root.rmdir()
        text = f"cannot make the cache {root}: this user is not in the group {group!r}. Check `cache_group`"
        raise BadRequest(text, subject=str(root)) from None
    root.chmod(0o2770)


def _check_owner(folder: Path, status: os.stat_result) -> None:
    if not _is_trusted(status):
        raise BadRequest(
            f"refused to use the cache folder {folder}: it belongs to user {status.st_uid}, who can replace weights in "
            "it. Choose another cache folder (`--cache-dir`), or let a group of yours write to this one",
            subject=str(folder),
        )


def _is_trusted(status: os.stat_result) -> bool:
    user = os.geteuid()
    group_may_write = bool(status.st_mode & stat.S_IWGRP) and status.st_gid in {os.getegid(), *os.getgroups()}
    return user in (0, status.st_uid) or status.st_uid == 0 or group_may_write


def _check_links(root: Path) -> None:
    for path in (root, *root.parents):
        if not path.is_symlink():
            continue
        folder, link = path.parent.stat(), path.lstat()
        if folder.st_mode & stat.S_IWOTH and link.st_uid not in (0, os.geteuid()):
            raise BadRequest(
                f"refused to use the cache {root}: {path} is a symbolic link made by user {link.st_uid} in a folder "
                "that every user may write to. Choose another cache folder (`--cache-dir`)",
                subject=str(root),
            )
