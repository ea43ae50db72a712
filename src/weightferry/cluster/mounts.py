"""Which file system a folder is on, and whether other machines may see it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

# The kernel's own file systems that belong to one machine. Several machines may see any other file system.
_LOCAL = frozenset(
    {
        *("bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660", "jfs", "nilfs2", "ntfs3"),
        *("overlay", "ramfs", "reiserfs", "rootfs", "squashfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"),
    }
)


class Mount(NamedTuple):
    """A mounted file system: its type and its options, both empty where they are unknown."""

    kind: str = ""
    options: frozenset[str] = frozenset()


def mount_of(folder: Path, mountinfo: str | None = None) -> Mount:
    """Return the file system of an existing folder.

    Parameters
    ----------
    mountinfo
        The text of ``/proc/self/mountinfo`` (proc(5)). None: read the file.
    """
    try:
        text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    except OSError:
        return Mount()
    path, longest, found = os.path.realpath(folder), "", Mount()
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        # The file writes spaces and the like in octal.
        point = before.split(" ")[4].encode().decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(longest):  # of two mounts at one point the later one hides the earlier one
            kind, *fields = after.split(" ")
            options = frozenset(",".join([*fields[-1:], before.split(" ")[5]]).split(","))
            longest, found = point, Mount(kind, options)
    return found


def is_local(folder: Path, mountinfo: str | None = None) -> bool:
    """Return whether only this machine can see an existing folder; parameters as of `mount_of`."""
    return mount_of(folder, mountinfo).kind in _LOCAL
