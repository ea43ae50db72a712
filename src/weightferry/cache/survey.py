"""What a cache holds of a manifest. A name proves nothing: size always, and the checksum where reading is cheap."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from weightferry.cache.layout import CacheLayout
from weightferry.cache.verified import is_verified, note_verified
from weightferry.hashing import Hashes
from weightferry.manifest import File, Manifest, Pinned

_SHA256_DIGITS = 64


@dataclass(frozen=True)
class Survey:
    """What one domain holds.

    Attributes
    ----------
    whole : mapping of int to str
        The files of `Manifest.staged()` that are there, by their place in it, with their SHA-256 where it is known
        without reading a big file, else an empty text.
    """

    whole: Mapping[int, str] = field(default_factory=dict)


def survey(layout: CacheLayout, manifest: Manifest) -> Survey:
    """Look which files of the manifest are whole in the cache."""
    found = {}
    for index, (pinned, file) in enumerate(manifest.staged()):
        if is_whole(layout, pinned, file):
            digest = known_sha256(layout, pinned, file)
            if digest is not None:
                found[index] = digest
    return Survey(found)


def is_whole(layout: CacheLayout, pinned: Pinned, file: File) -> bool:
    """Whether the content is there under its final name and has the right size."""
    try:
        there = layout.blob(pinned, file).stat()
    except OSError:
        return False
    return stat.S_ISREG(there.st_mode) and file.size in (None, there.st_size)


def known_sha256(layout: CacheLayout, pinned: Pinned, file: File) -> str | None:
    """Return the SHA-256 of a whole file: what the manifest says, or what was noted, or by reading a small one.

    None when a small file was read and is not what the manifest promises; empty when nobody knows.
    """
    if file.checksum:
        # The Hub keeps files as git blobs only up to 10 MB: they are read every time. Big ones only when they changed.
        big = file.checksum.algorithm == "sha256"
        if big and is_verified(layout, pinned, file):
            return file.checksum.hexdigest
        hashes = Hashes(file.checksum, file.size).update_from(layout.blob(pinned, file))
        if big and hashes.right:
            note_verified(layout, pinned, file)
        return hashes.sha256 if hashes.right else None
    with contextlib.suppress(OSError, ValueError):
        note = layout.sha256_note(pinned, file).read_text()
        # A crash of the node may have left it empty: then it says nothing.
        return note if len(note) == _SHA256_DIGITS else ""
    return ""
