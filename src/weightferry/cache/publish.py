"""How a file gets its final name: checked and on disk first, then one rename."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.links import point, write_whole
from weightferry.cache.verified import note_verified
from weightferry.manifest import File, Pinned


def publish(layout: CacheLayout, pinned: Pinned, file: File, partial: Path, sha256: str) -> None:
    """Give checked content its final name.

    Parameters
    ----------
    partial
        The whole content, its checksum already compared; gone afterwards.
    sha256
        What was computed; noted where the origin publishes no checksum.
    """
    with partial.open("rb") as written:
        # Without it a crash of the node may leave the name and lose the bytes.
        os.fsync(written.fileno())
    if not file.checksum:
        write_whole(layout.sha256_note(pinned, file), sha256)
    blob = layout.blob(pinned, file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(blob)
    note_verified(layout, pinned, file)


def show(layout: CacheLayout, pinned: Pinned) -> None:
    """Make the snapshot show every wanted file of `pinned`, and its branch point to the commit."""
    for file in pinned.files:
        pointer = layout.pointer(pinned, file)
        blob = layout.blob(pinned, file)
        point(pointer, os.path.relpath(blob, pointer.parent))
    ref = layout.ref(pinned)
    if ref is not None:
        write_whole(ref, pinned.commit)


def sweep_partials(layout: CacheLayout, ttl: float) -> None:
    """Remove partial data that nobody has written to for `ttl` seconds: its writer was killed."""
    with contextlib.suppress(OSError):
        for partial in layout.partial.iterdir():
            if time.time() - partial.stat().st_mtime > ttl:
                partial.unlink()
