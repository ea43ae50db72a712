"""Publish a file: its checksum has matched, it is written to the disk, then one rename gives it its final name."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from weightferry.cache.atomic import replace_symlink, write_atomically
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
    """Move verified content to its final path.

    Parameters
    ----------
    partial
        The complete content; the caller has compared its checksum. It does not exist afterwards.
    sha256
        The computed digest. It is recorded in the cache when the origin publishes no checksum.
    sync
        Wait until the content is on the disk, where a crash could otherwise go unnoticed (see `verified_notes`). Small
        files do not need it: every survey hashes them.
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
        # Where locks do not exclude, another job may have written the same bytes to the same path and renamed first.
        if not is_complete(layout, pinned, file):
            raise
    discard(partial)
    note_verified(layout, pinned, file)
    logger.info("published %s/%s", pinned.name, file.path)


def link_snapshot(layout: CacheLayout, pinned: PinnedSource, tier_paths: Mapping[Path, Path] | None = None) -> None:
    """Make the snapshot's links to every requested file of `pinned`, and set its branch to the commit.

    Parameters
    ----------
    tier_paths
        For content that another cache holds: from its path in this cache to its path there.
    """
    for file in pinned.files:
        pointer = layout.pointer(pinned, file)
        blob = layout.blob(pinned, file)
        make_folder(pointer.parent)
        # Relative within the cache: the cache may be moved or mounted elsewhere.
        replace_symlink(pointer, (tier_paths or {}).get(blob) or os.path.relpath(blob, pointer.parent))
    ref = layout.ref(pinned)
    if ref is not None:
        write_atomically(ref, pinned.commit)


def record_staged(layout: CacheLayout, pinned: PinnedSource) -> None:
    """Record that a commit was staged now. Eviction removes the commits that were staged longest ago first."""
    note = layout.used_note(layout.repo(pinned).name, pinned.commit)
    with contextlib.suppress(OSError):
        touch(note)
