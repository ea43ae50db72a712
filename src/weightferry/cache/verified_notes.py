"""Which big files were hashed since they last changed: a note of size, time and inode, beside the cache's content.

Reading 100 GB again before every start would cost a minute; believing a name would let in what somebody else wrote.
Damage below the file system, which changes none of these, is not seen.

A crash of the machine may keep a file's name and lose its bytes. On a file system of this machine alone the note holds
the running kernel too, and so means nothing after a crash; that is cheaper than to wait for the disk at every file. On
others the bytes are on the disk before there is a name.
"""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

from weightferry.cache.atomic import write_atomically
from weightferry.cache.layout import CacheLayout
from weightferry.cluster.domains import is_local
from weightferry.cluster.topology import boot_id
from weightferry.manifest import File, Pinned


def is_verified(layout: CacheLayout, pinned: Pinned, file: File, notes: CacheLayout | None = None) -> bool:
    """Whether the content was found right before, and nothing shows that it changed since.

    Parameters
    ----------
    notes
        The cache whose notes are read; None: `layout`.
    """
    with contextlib.suppress(OSError, ValueError):
        note = (notes or layout).verified_note(pinned, file)
        return note.read_text() == _state(layout, layout.blob(pinned, file))
    return False


def note_verified(layout: CacheLayout, pinned: Pinned, file: File, notes: CacheLayout | None = None) -> None:
    """Note that the content was found right; a cache that cannot be written to is hashed again next time."""
    with contextlib.suppress(OSError):
        write_atomically((notes or layout).verified_note(pinned, file), _state(layout, layout.blob(pinned, file)))


def _state(layout: CacheLayout, blob: Path) -> str:
    seen = blob.stat()
    kernel = boot_id() if is_on_local_disk(layout) else "any"
    return f"{seen.st_size} {seen.st_mtime_ns} {seen.st_ino} {kernel}"


def is_on_local_disk(layout: CacheLayout) -> bool:
    """Whether the cache is on a file system of this machine alone."""
    return _is_local(layout.root)


@cache
def _is_local(root: Path) -> bool:
    return is_local(root)
