"""What a cache holds of a manifest. A name proves nothing: size always, and the checksum where reading is cheap."""

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
from weightferry.cache.partial import PartialFile, WrittenRange, discard, is_untouched, verified_ranges
from weightferry.cache.verified_notes import is_verified, note_verified
from weightferry.errors import CollectError, error_context
from weightferry.hashing import Hashes
from weightferry.manifest import File, Manifest, PinnedSource

_SHA256_DIGITS = 64
# A lock is an open file, and processes may have few (1,024 by default): the biggest files have one each, the others
# one for each source together. Reading a small file twice costs less than a lock on it.
_LOCKS, _WORTH_A_LOCK = 256, 1 << 20
# Hashed in every survey: cheaper than to wonder.
_CHEAP = 1 << 20


@dataclass(frozen=True)
class DomainSurvey:
    """What one domain holds.

    Attributes
    ----------
    whole : mapping of int to str
        The files of `Manifest.staged()` that are there, by their place in it, with their SHA-256 where it is known
        without reading a big file, else an empty text.
    parts : mapping of int to Extents
        What is there of other files.
    busy : bool
        Whether another job holds a lock on something that this domain lacks.
    cache : str
        Names the cache folder, the same for every job that uses it; empty where nothing was missing.
    unreachable : mapping of int to CollectError
        The sources, by their place in the manifest, that the leader cannot read from, and why.
    nearby : frozenset of int
        Missing files that the user's Hugging Face cache seems to hold, as the leader sees it.
    """

    whole: Mapping[int, str] = field(default_factory=dict)
    parts: Mapping[int, Extents] = field(default_factory=dict)
    busy: bool = False
    cache: str = ""
    unreachable: Mapping[int, CollectError] = field(default_factory=dict)
    nearby: frozenset[int] = frozenset()


class CacheSurveyor:
    """Looks through one cache folder for one operation, and holds the locks on what is missing.

    Parameters
    ----------
    layout
        The cache folder.
    manifest
        What is wanted.
    locks
        Released by whoever made them.
    tiers
        Other caches, looked at first and only read.
    users
        Says where the user's Hugging Face cache would have a file.

    Attributes
    ----------
    places : dict of int to Path
        Where the content is of files that a tier holds.
    nearby : dict of int to Path
        Where the user's Hugging Face cache seems to have missing files.
    """

    def __init__(
        self,
        layout: CacheLayout,
        manifest: Manifest,
        locks: FileLocks,
        tiers: Sequence[CacheLayout] = (),
        users: Callable[[PinnedSource, File], Path | None] = lambda *_: None,
    ) -> None:
        self.layout, self._locks, self.tiers, self._users = layout, locks, tiers, users
        self.files = list(manifest.staged())
        self._contents = manifest.contents()
        self.runs: dict[int, list[WrittenRange]] = {}
        self.places: dict[int, Path] = {}
        self.nearby: dict[int, Path] = {}
        self._taken: set[Path] = set()
        self._doubted: set[int] = set()

    @property
    def exclusion(self) -> LockSupport:
        """By what others are kept out."""
        return self._locks.exclusion

    def locked(self, index: int) -> bool:
        """Whether the partial data of a file is this leader's alone."""
        return self._locks.held(self.layout.lock(*self.files[index]))

    def survey(self, *, wait: bool = False, doubted: Collection[int] = ()) -> DomainSurvey:
        """Look which files are whole, lock the others, and look how far those had come.

        Parameters
        ----------
        wait
            Wait for locks that others hold.
        doubted
            Files that turned out wrong somewhere: nothing is believed of them.
        """
        for index in doubted:
            self._doubt(index)
        self._doubted.update(doubted)
        whole = self._whole()
        wanted = self._lock_paths(whole)
        if wait:
            self._locks.wait(wanted)
        busy = self._locks.take(wanted)
        if wanted:
            whole = self._whole()  # what others brought before their lock became ours
        self._locks.release(wanted - self._lock_paths(whole))
        self.runs = {index: self._runs_of(index) for index in self._contents if index not in whole}
        self.nearby = {index: path for index in self.runs if (path := self._nearby(index))}
        parts = {index: Extents((run.start, run.stop) for run in runs) for index, runs in self.runs.items() if runs}
        # Named also where nobody was in the way: else two jobs, each in the other's way on one node, would wait for
        # their nodes in opposite orders, and for ever.
        return DomainSurvey(
            whole,
            parts,
            bool(busy) and not wait,
            identity(self.layout) if wanted else "",
            nearby=frozenset(self.nearby),
        )

    def partials(self) -> set[Path]:
        """The partial data that this leader may go on with: no other job's."""
        entries = [self.files[index] for index in self.runs]
        mine = {self.layout.partial_of(*entry) for entry in entries if self._locks.held(self.layout.lock(*entry))}
        small = {pinned for pinned, _ in entries if self._locks.held(self.layout.small_lock(pinned))}
        return mine | {self.layout.small_partial(pinned) for pinned in small}

    def take_space(self) -> None:
        """Take the space of the big files that are missing: before anybody reads, and so that other jobs see it.

        What a quota allows shows only now; many file systems keep several kinds of them, and tell of none.

        Raises
        ------
        OSError
            There is too little, or no right to write.
        """
        for index, runs in self.runs.items():
            pinned, file = self.files[index]
            if file.size and self.locked(index):
                path = self.layout.partial_of(pinned, file)
                self._taken.add(path)
                with error_context(subject=f"{pinned.name}/{file.path}"):
                    PartialFile(path, file.size, file.key, runs)
        small: dict[Path, int] = {}
        for index in self.runs:
            pinned, file = self.files[index]
            if (file.size or 0) < _WORTH_A_LOCK and self._locks.held(self.layout.small_lock(pinned)):
                path = self.layout.small_partial(pinned)
                small[path] = small.get(path, 0) + (file.size or 0)
        for path, size in small.items():
            self._taken.add(path)
            PartialFile(path, size, "small files")

    def release(self) -> None:
        """Give back all locks, and space into which nothing came."""
        for path in self._taken:
            if is_untouched(path):
                discard(path)
        self._taken.clear()
        self._locks.release()

    def place(self, index: int) -> Path:
        """Where the content of a file is, or will be."""
        return self.places.get(index) or self.layout.blob(*self.files[index])

    def _whole(self) -> dict[int, str]:
        found = {}
        for index, (pinned, file) in enumerate(self.files):
            # Nothing takes what is doubted out of a tier.
            tiers = () if index in self._doubted else self.tiers
            for layout in (*tiers, self.layout):
                digest = self._digest(layout, pinned, file)
                if digest is not None:
                    found[index] = digest
                    if layout is not self.layout:
                        self.places[index] = layout.blob(pinned, file)
                    break
            else:
                self.places.pop(index, None)
        return found

    def _digest(self, layout: CacheLayout, pinned: PinnedSource, file: File) -> str | None:
        if not is_complete(layout, pinned, file):
            return None
        if layout is self.layout:
            return known_sha256(layout, pinned, file)
        with contextlib.suppress(OSError):  # of a tier not everything need be readable
            if os.access(layout.blob(pinned, file), os.R_OK):
                return known_sha256(layout, pinned, file, self.layout)
        return None

    def _nearby(self, index: int) -> Path | None:
        pinned, file = self.files[index]
        path = self._users(pinned, file)
        with contextlib.suppress(OSError):
            if path and index not in self._doubted and file.size == path.stat().st_size and os.access(path, os.R_OK):
                return path
        return None

    def _lock_paths(self, whole: Mapping[int, str]) -> set[Path]:
        missing = [self.files[index] for index in self._contents if index not in whole]
        missing.sort(key=lambda entry: -(entry[1].size or 1 << 62))
        big = [entry for entry in missing if (entry[1].size or 1 << 62) >= _WORTH_A_LOCK][:_LOCKS]
        paths = {self.layout.lock(pinned, file) for pinned, file in big}
        return paths | {self.layout.small_lock(pinned) for pinned, _ in missing[len(big) :]}

    def _runs_of(self, index: int) -> list[WrittenRange]:
        pinned, file = self.files[index]
        if not self.locked(index):
            return []
        return verified_ranges(self.layout.partial_of(pinned, file), file.size, file.key)

    def _doubt(self, index: int) -> None:
        pinned, file = self.files[index]
        with contextlib.suppress(OSError):
            self.layout.verified_note(pinned, file).unlink(missing_ok=True)
            if not file.checksum:
                # Nothing says whose bytes are right: nobody's are kept.
                self.layout.blob(pinned, file).unlink(missing_ok=True)
        if self.locked(index):
            discard(self.layout.partial_of(pinned, file))


def identity(layout: CacheLayout) -> str:
    """Name the cache folder; empty where nothing can be written."""
    with contextlib.suppress(OSError):
        create_atomically(layout.identity, secrets.token_hex(16))
    with contextlib.suppress(OSError):
        return layout.identity.read_text()
    return ""


def is_complete(layout: CacheLayout, pinned: PinnedSource, file: File) -> bool:
    """Whether the content is there under its final name and has the right size."""
    try:
        there = layout.blob(pinned, file).stat()
    except OSError:
        return False
    return stat.S_ISREG(there.st_mode) and file.size in (None, there.st_size)


def known_sha256(layout: CacheLayout, pinned: PinnedSource, file: File, notes: CacheLayout | None = None) -> str | None:
    """Return the SHA-256 of a whole file: what the manifest says, or what was noted, or by reading it.

    A big file is read only when it changed since it was last found right. None when it is not what the manifest, or for
    an origin without checksums the note of its transfer, promises; empty when nobody knows.

    Parameters
    ----------
    notes
        The cache in which it is noted that a big file was found right; None: `layout`, whose notes count in any case.
    """
    notes = notes or layout
    promised = file.checksum.hexdigest if file.checksum and file.checksum.algorithm == "sha256" else ""
    noted = promised or ("" if file.checksum else _noted_sha256(layout, pinned, file))
    big = (file.size or layout.blob(pinned, file).stat().st_size) > _CHEAP
    if big and noted and (is_verified(layout, pinned, file) or is_verified(layout, pinned, file, notes)):
        return noted
    if not noted and not file.checksum:
        return ""
    hashes = Hashes(file.checksum, file.size).update_from(layout.blob(pinned, file))
    right = hashes.matches and noted in ("", hashes.sha256)
    if big and noted and right:
        note_verified(layout, pinned, file, notes)
    return hashes.sha256 if right else None


def _noted_sha256(layout: CacheLayout, pinned: PinnedSource, file: File) -> str:
    with contextlib.suppress(OSError, ValueError):
        note = layout.sha256_note(pinned, file).read_text()
        # A crash of the node may have left it empty: then it says nothing.
        return note if len(note) == _SHA256_DIGITS else ""
    return ""
