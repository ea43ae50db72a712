"""Notes about big files that were hashed: a note keeps size, modification time and inode of the verified content.

Hashing 100 GB before every start would take a minute. Trusting a file name would accept a file that another program
wrote. Damage below the file system changes none of the three values, so the notes do not detect it.

A crash of the machine may keep a file's name and lose its bytes. On a local file system the note also names the running
kernel, so it is invalid after a crash or reboot; this costs less than an fsync for every file. On other file systems
the file is written to the disk before it gets its name.
"""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

from weightferry.cache.atomic import write_atomically
from weightferry.cache.layout import CacheLayout
from weightferry.cluster.machine import boot_id
from weightferry.cluster.mounts import is_local
from weightferry.manifest import File, PinnedSource


def is_verified(layout: CacheLayout, pinned: PinnedSource, file: File, notes: CacheLayout | None = None) -> bool:
    """Whether the checksum of the content matched before and the file has not changed since.

    Parameters
    ----------
    notes
        The cache whose notes are read; None: `layout`.
    """
    with contextlib.suppress(OSError, ValueError):
        note = (notes or layout).verified_note(pinned, file)
        return note.read_text() == _fingerprint(layout, layout.blob(pinned, file))
    return False


def note_verified(layout: CacheLayout, pinned: PinnedSource, file: File, notes: CacheLayout | None = None) -> None:
    """Record that the checksum of the content matched. In a read-only cache the next survey hashes the file again."""
    with contextlib.suppress(OSError):
        write_atomically((notes or layout).verified_note(pinned, file), _fingerprint(layout, layout.blob(pinned, file)))


def _fingerprint(layout: CacheLayout, blob: Path) -> str:
    """Return the content of a note: size in bytes, modification time in ns, inode, and the running kernel or "any"."""
    status = blob.stat()
    kernel = boot_id() if is_on_local_disk(layout) else "any"
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {kernel}"


def is_on_local_disk(layout: CacheLayout) -> bool:
    """Whether the cache is on a file system that only this machine can see."""
    return _is_local(layout.root)


@cache
def _is_local(root: Path) -> bool:
    return is_local(root)
