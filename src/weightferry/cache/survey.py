"""Find out which files of a manifest a cache holds: check each file's size, and its checksum where that is cheap."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightferry.cache.atomic import create_atomically
from weightferry.cache.extents import Extents
from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport
from weightferry.cache.locks import FileLocks
from weightferry.cache.partial import PartialFile, WrittenRange, discard, is_empty, verified_ranges
from weightferry.cache.verified_notes import is_verified, note_verified
from weightferry.errors import CollectError, error_context
from weightferry.hashing import Hashes
from weightferry.manifest import File, Manifest, PinnedSource

_SHA256_DIGITS = 64
# A lock is an open file, and a process may open few (1,024 by default). So the biggest files have one lock each, and
# the other files of a source share one. Reading a small file twice costs less than a lock for it.
_MAX_LOCKS, _MIN_LOCKED_SIZE = 256, 1 << 20  # files, bytes
# Files up to this size are hashed in every survey. That costs less than keeping a note about them.
_ALWAYS_HASHED = 1 << 20  # bytes


@dataclass(frozen=True)
class DomainSurvey:
    """What the cache of one domain holds.

    Attributes
    ----------
    complete : mapping of int to str
        The complete files, by their index in `Manifest.staged()`. The value is the SHA-256 where it is known without
        reading a big file, else an empty text.
    partial_ranges : mapping of int to Extents
        Which bytes of the incomplete files the domain has.
    locked_elsewhere : bool
        Whether another job holds a lock of a file that this domain lacks.
    cache_id : str
        Names the cache folder, the same for every job that uses it; empty when no file was missing.
    unreachable : mapping of int to CollectError
        The sources that the leader cannot read from, by their index in the manifest, and why.
    in_user_cache : frozenset of int
        Missing files that the user's Hugging Face cache seems to hold, as the leader sees it.
    """

    complete: Mapping[int, str] = field(default_factory=dict)
    partial_ranges: Mapping[int, Extents] = field(default_factory=dict)
    locked_elsewhere: bool = False
    cache_id: str = ""
    unreachable: Mapping[int, CollectError] = field(default_factory=dict)
    in_user_cache: frozenset[int] = frozenset()


class CacheSurveyor:
    """Surveys one cache folder for one operation, and holds the locks of the missing files.

    Parameters
    ----------
    layout
        The cache folder.
    manifest
        The files that the job needs.
    locks
        The caller releases them.
    tiers
        Other caches. They are searched first, and never written to.
    user_cache_path
        Returns where the user's Hugging Face cache would have a file; None when it would not.

    Attributes
    ----------
    files : list of (PinnedSource, File)
        `Manifest.staged()`.
    written_ranges : dict of int to list of WrittenRange
        The missing files, by index, and the verified ranges of their partial data.
    tier_paths : dict of int to Path
        Where the content is of files that a tier holds.
    user_cache_paths : dict of int to Path
        Where the user's Hugging Face cache seems to have missing files.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manifest: Manifest,
        locks: FileLocks,
        tiers: Sequence[CacheLayout] = (),
        user_cache_path: Callable[[PinnedSource, File], Path | None] = lambda *_: None,
    ) -> None:
        self.layout, self._locks, self.tiers, self._user_cache_path = layout, locks, tiers, user_cache_path
        self.files = list(manifest.staged())
        self._contents = manifest.contents()
        self.written_ranges: dict[int, list[WrittenRange]] = {}
        self.tier_paths: dict[int, Path] = {}
        self.user_cache_paths: dict[int, Path] = {}
        self._reserved: set[Path] = set()
        self._suspects: set[int] = set()

    @property
    def lock_support(self) -> LockSupport:
        """Which kind of lock works in this cache."""
        return self._locks.lock_support

    def holds_lock(self, index: int) -> bool:
        """Whether this leader holds the lock of a file, so that no other process writes its partial data."""
        return self._locks.is_held(self.layout.lock(*self.files[index]))

    def survey(self, *, wait: bool = False, suspects: Collection[int] = ()) -> DomainSurvey:
        """Find the complete files, lock the missing ones, and read the ranges that interrupted transfers wrote.

        Parameters
        ----------
        wait
            Wait for locks that other jobs hold.
        suspects
            Files whose checksum did not match somewhere. Their notes and partial data are discarded.
        """
        for index in suspects:
            self._discard_trust(index)
        self._suspects.update(suspects)
        complete = self._complete_files()
        wanted = self._lock_paths(complete)
        if wait:
            self._locks.acquire(wanted)
        held_elsewhere = self._locks.try_acquire(wanted)
        if wanted:
            complete = self._complete_files()  # another job may have published files before this one got their locks
        self._locks.release(wanted - self._lock_paths(complete))
        self.written_ranges = {index: self._verified_ranges(index) for index in self._contents if index not in complete}
        self.user_cache_paths = {
            index: path for index in self.written_ranges if (path := self._find_in_user_cache(index))
        }
        partial_ranges = {
            index: Extents((written.start, written.stop) for written in ranges)
            for index, ranges in self.written_ranges.items()
            if ranges
        }
        # The cache is named even when no other job holds a lock here. Otherwise two jobs, each of which holds locks of
        # the other on one node, would wait for their nodes in opposite orders, and would deadlock.
        return DomainSurvey(
            complete,
            partial_ranges,
            bool(held_elsewhere) and not wait,
            cache_id(self.layout) if wanted else "",
            in_user_cache=frozenset(self.user_cache_paths),
        )

    def own_partial_paths(self) -> set[Path]:
        """Return the partial data from which this leader may resume: it holds the locks."""
        missing = [self.files[index] for index in self.written_ranges]
        paths = {self.layout.partial_of(*entry) for entry in missing if self._locks.is_held(self.layout.lock(*entry))}
        sources = {pinned for pinned, _ in missing if self._locks.is_held(self.layout.small_files_lock(pinned))}
        return paths | {self.layout.small_files_partial(pinned) for pinned in sources}

    def reserve_space(self) -> None:
        """Reserve the disk space of the missing files before any download starts. Other jobs see it as taken.

        An exceeded quota shows only here: many file systems have several kinds of quota, and report none of them.

        Raises
        ------
        OSError
            The space is too small, or this user may not write.
        """
        for index, ranges in self.written_ranges.items():
            pinned, file = self.files[index]
            if file.size and self.holds_lock(index):
                path = self.layout.partial_of(pinned, file)
                self._reserved.add(path)
                with error_context(subject=f"{pinned.name}/{file.path}"):
                    PartialFile(path, file.size, file.key, ranges)
        small: dict[Path, int] = {}
        for index in self.written_ranges:
            pinned, file = self.files[index]
            if (file.size or 0) < _MIN_LOCKED_SIZE and self._locks.is_held(self.layout.small_files_lock(pinned)):
                path = self.layout.small_files_partial(pinned)
                small[path] = small.get(path, 0) + (file.size or 0)
        for path, size in small.items():
            self._reserved.add(path)
            PartialFile(path, size, "small files")

    def release(self) -> None:
        """Release all locks, and free reserved space that received no data."""
        for path in self._reserved:
            if is_empty(path):
                discard(path)
        self._reserved.clear()
        self._locks.release()

    def content_path(self, index: int) -> Path:
        """Return where the content of a file is, or will be after its publication."""
        return self.tier_paths.get(index) or self.layout.blob(*self.files[index])

    def _complete_files(self) -> dict[int, str]:
        """Return the complete files with their SHA-256, as in `DomainSurvey.complete`; update `tier_paths`."""
        found = {}
        for index, (pinned, file) in enumerate(self.files):
            # A suspect file in a tier cannot be replaced there. So its content in the tier is not used.
            tiers = () if index in self._suspects else self.tiers
            for layout in (*tiers, self.layout):
                digest = self._digest(layout, pinned, file)
                if digest is not None:
                    found[index] = digest
                    if layout is not self.layout:
                        self.tier_paths[index] = layout.blob(pinned, file)
                    break
            else:
                self.tier_paths.pop(index, None)
        return found

    def _digest(self, layout: CacheLayout, pinned: PinnedSource, file: File) -> str | None:
        """Return the SHA-256 of a complete file, empty when unknown; None when the cache does not hold the file."""
        if not is_complete(layout, pinned, file):
            return None
        if layout is self.layout:
            return known_sha256(layout, pinned, file)
        with contextlib.suppress(OSError):  # some files of a tier may be unreadable for this user
            if os.access(layout.blob(pinned, file), os.R_OK):
                return known_sha256(layout, pinned, file, self.layout)
        return None

    def _find_in_user_cache(self, index: int) -> Path | None:
        pinned, file = self.files[index]
        path = self._user_cache_path(pinned, file)
        with contextlib.suppress(OSError):
            if path and index not in self._suspects and file.size == path.stat().st_size and os.access(path, os.R_OK):
                return path
        return None

    def _lock_paths(self, complete: Mapping[int, str]) -> set[Path]:
        """Return the locks of the missing files: one for each of the biggest files, one for each source's other files.

        A file of unknown size counts as big.
        """
        missing = [self.files[index] for index in self._contents if index not in complete]
        missing.sort(key=lambda entry: -(entry[1].size or 1 << 62))
        big = [entry for entry in missing if (entry[1].size or 1 << 62) >= _MIN_LOCKED_SIZE][:_MAX_LOCKS]
        paths = {self.layout.lock(pinned, file) for pinned, file in big}
        return paths | {self.layout.small_files_lock(pinned) for pinned, _ in missing[len(big) :]}

    def _verified_ranges(self, index: int) -> list[WrittenRange]:
        pinned, file = self.files[index]
        if not self.holds_lock(index):
            return []
        return verified_ranges(self.layout.partial_of(pinned, file), file.size, file.key)

    def _discard_trust(self, index: int) -> None:
        """Remove the note that a suspect file was verified, and its partial data."""
        pinned, file = self.files[index]
        with contextlib.suppress(OSError):
            self.layout.verified_note(pinned, file).unlink(missing_ok=True)
            if not file.checksum:
                # Without a published checksum no domain can know that its bytes are right. Each removes its copy.
                self.layout.blob(pinned, file).unlink(missing_ok=True)
        if self.holds_lock(index):
            discard(self.layout.partial_of(pinned, file))


def cache_id(layout: CacheLayout) -> str:
    """Return the random name of a cache folder, and make it at the first call; empty when it cannot be written."""
    with contextlib.suppress(OSError):
        create_atomically(layout.identity_file, secrets.token_hex(16))
    with contextlib.suppress(OSError):
        return layout.identity_file.read_text()
    return ""


def is_complete(layout: CacheLayout, pinned: PinnedSource, file: File) -> bool:
    """Whether the content exists under its final name and has the right size."""
    try:
        status = layout.blob(pinned, file).stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and file.size in (None, status.st_size)


def known_sha256(layout: CacheLayout, pinned: PinnedSource, file: File, notes: CacheLayout | None = None) -> str | None:
    """Return the SHA-256 of a complete file: from the manifest, from a note of its transfer, or by reading the file.

    A big file is read only when it changed since its checksum last matched.

    Parameters
    ----------
    notes
        The cache that records that a big file was verified; None: `layout`. The notes in `layout` count in any case.

    Returns
    -------
    str or None
        None when the content does not match the manifest, or the note of its transfer when the origin publishes no
        checksum. Empty when no digest is known.
    """
    notes = notes or layout
    published = file.checksum.hexdigest if file.checksum and file.checksum.algorithm == "sha256" else ""
    expected = published or ("" if file.checksum else _recorded_sha256(layout, pinned, file))
    is_big = (file.size or layout.blob(pinned, file).stat().st_size) > _ALWAYS_HASHED
    if is_big and expected and (is_verified(layout, pinned, file) or is_verified(layout, pinned, file, notes)):
        return expected
    if not expected and not file.checksum:
        return ""
    hashes = Hashes(file.checksum, file.size).update_from(layout.blob(pinned, file))
    matches = hashes.matches and expected in ("", hashes.sha256)
    if is_big and expected and matches:
        note_verified(layout, pinned, file, notes)
    return hashes.sha256 if matches else None


def _recorded_sha256(layout: CacheLayout, pinned: PinnedSource, file: File) -> str:
    with contextlib.suppress(OSError, ValueError):
        note = layout.sha256_note(pinned, file).read_text()
        # A crash of the node may leave the note empty. Then it counts as no note.
        return note if len(note) == _SHA256_DIGITS else ""
    return ""
