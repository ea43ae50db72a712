"""How a file gets its final name: checked and on disk first, then one rename."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from weightferry.cache.atomic import point, write_atomically
from weightferry.cache.layout import CacheLayout
from weightferry.cache.partial import discard
from weightferry.cache.permissions import make_folder, touch
from weightferry.cache.survey import is_complete
from weightferry.cache.verified_notes import is_on_local_disk, note_verified
from weightferry.manifest import File, PinnedSource

logger = logging.getLogger(__name__)


def publish(
    layout: CacheLayout, pinned: PinnedSource, file: File, partial: Path, sha256: str, *, sync: bool = True
) -> None:
    """Give checked content its final name.

    Parameters
    ----------
    partial
        The whole content, its checksum already compared; gone afterwards.
    sha256
        What was computed; noted where the origin publishes no checksum.
    sync
        Wait until it is on the disk, where a crash could be missed otherwise (see `verified`). Small files are hashed
        in every survey.
    """
    if sync and not is_on_local_disk(layout):
        with partial.open("rb") as written:
            os.fsync(written.fileno())
    if not file.checksum:
        write_atomically(layout.sha256_note(pinned, file), sha256)
    blob = layout.blob(pinned, file)
    make_folder(blob.parent)
    try:
        partial.replace(blob)
    except FileNotFoundError:
        # Where locks do not exclude, another job that wrote the same bytes to the same place was first.
        if not is_complete(layout, pinned, file):
            raise
    discard(partial)
    note_verified(layout, pinned, file)
    logger.info("published %s/%s", pinned.name, file.path)


def show(layout: CacheLayout, pinned: PinnedSource, places: Mapping[Path, Path] | None = None) -> None:
    """Make the snapshot show every wanted file of `pinned`, and its branch point to the commit.

    Parameters
    ----------
    places
        By where content would be, where it is instead, in another cache.
    """
    for file in pinned.files:
        pointer = layout.pointer(pinned, file)
        blob = layout.blob(pinned, file)
        make_folder(pointer.parent)
        # Relative within the cache, which may be moved or mounted elsewhere.
        point(pointer, (places or {}).get(blob) or os.path.relpath(blob, pointer.parent))
    ref = layout.ref(pinned)
    if ref is not None:
        write_atomically(ref, pinned.commit)


def record_staged(layout: CacheLayout, pinned: PinnedSource) -> None:
    """Note that a commit was staged now: what was longest ago is evicted first."""
    note = layout.used_note(layout.repo(pinned).name, pinned.commit)
    with contextlib.suppress(OSError):
        touch(note)
