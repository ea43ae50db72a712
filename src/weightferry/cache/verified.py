"""Which big files were hashed since they last changed: a note of size, time and inode, beside the cache's content.

Reading 100 GB again before every start would cost a minute; believing a name would let in what somebody else wrote.
Damage below the file system, which changes none of these, is not seen.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.links import write_whole
from weightferry.manifest import File, Pinned


def is_verified(layout: CacheLayout, pinned: Pinned, file: File) -> bool:
    """Whether the content was found right before, and nothing shows that it changed since."""
    with contextlib.suppress(OSError, ValueError):
        return layout.verified_note(pinned, file).read_text() == _state(layout.blob(pinned, file))
    return False


def note_verified(layout: CacheLayout, pinned: Pinned, file: File) -> None:
    """Note that the content was found right; a cache that cannot be written to is hashed again next time."""
    with contextlib.suppress(OSError):
        write_whole(layout.verified_note(pinned, file), _state(layout.blob(pinned, file)))


def _state(blob: Path) -> str:
    seen = blob.stat()
    return f"{seen.st_size} {seen.st_mtime_ns} {seen.st_ino}"
