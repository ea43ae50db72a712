"""Before the phases of a collection: which files that exist in the folder for links are used as they are.

A file is used only when it has the same content on every rank that wants it. Otherwise ranks could load different
values, for example after a node was replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.usage import hold_source
from weightferry.cluster.coordinator import Coordinator
from weightferry.cluster.domains import FolderIdentity
from weightferry.errors import CollectError
from weightferry.settings import Settings
from weightferry.sources import SourceRequest

logger = logging.getLogger(__name__)

Wanted = tuple[str, SourceRequest]
"""A name, and the source of the file that a rank wants under this name."""

_CHUNK = 8 << 20  # bytes


@dataclass(frozen=True)
class ExistingFile:
    """A file in the folder for links, as one rank sees it.

    Attributes
    ----------
    folder : FolderIdentity
        Its folder. Ranks that see one folder see one file.
    size : int
        Bytes.
    content : str
        Name of the content in a cache, if the file is a link into one; otherwise empty.
    """

    folder: FolderIdentity
    size: int
    content: str = ""


@dataclass(frozen=True)
class Comparison:
    """Rank 0's conclusion about the existing files.

    Attributes
    ----------
    same : frozenset of Wanted
        These have the same content on every rank that wants them.
    unread : mapping of Wanted to (tuple of int)
        These have equal sizes in several folders. By file, one rank for each folder, to read the file.
    """

    same: frozenset[Wanted] = frozenset()
    unread: Mapping[Wanted, tuple[int, ...]] | None = None


def find_reusable(
    coordinator: Coordinator, find_existing: Callable[[], Mapping[Wanted, Path | None]], settings: Settings
) -> frozenset[Wanted]:
    """Return the existing files that are used as they are, the same on every rank; collective.

    Parameters
    ----------
    find_existing
        Returns what this rank wants, with the path of a file that may be used, or None if there can be none. An error
        that it raises fails the operation on every rank.
    """
    paths: dict[Wanted, Path] = {}

    def describe() -> dict[Wanted, ExistingFile | None]:
        described = {}
        for wanted, path in find_existing().items():
            described[wanted] = None if path is None else _describe(path, coordinator, settings)
            if path is not None:
                paths[wanted] = path
        return described

    compared: Comparison = coordinator.run_phase("agree", describe, _compare)
    if not compared.unread:
        return compared.same
    unread = compared.unread
    readers = {rank for ranks in unread.values() for rank in ranks}
    mine = {wanted: paths[wanted] for wanted, ranks in unread.items() if coordinator.rank in ranks}
    same = coordinator.run_phase("agree", partial(_read_all, mine, coordinator), partial(_equal, unread), readers)
    return compared.same | same


def _describe(path: Path, coordinator: Coordinator, settings: Settings) -> ExistingFile | None:
    """Describe a file; None if it cannot be read. Content in a cache is protected from eviction."""
    with contextlib.suppress(OSError):
        content = path.resolve(strict=True)
        name = ""
        for layout in map(CacheLayout, (settings.cache_dir, *settings.cache_tiers)):
            if layout.owns(content):
                name = content.name
                lock = layout.used_lock(content.parent.parent.name)
                hold_source(lock, coordinator.check, settings.stall_timeout, make=layout.root == settings.cache_dir)
        # A folder cannot be opened, so it is not used as it is: all its files would have to be compared.
        with content.open("rb") as file:
            return ExistingFile(FolderIdentity.of(path.parent), os.fstat(file.fileno()).st_size, name)
    return None


def _compare(by_rank: Mapping[int, Mapping[Wanted, ExistingFile | None]]) -> Comparison:
    found: dict[Wanted, dict[int, ExistingFile | None]] = {}
    for rank, described in by_rank.items():
        for wanted, existing in described.items():
            found.setdefault(wanted, {})[rank] = existing
    same, unread = set(), {}
    for wanted, by_reader in found.items():
        files = {rank: existing for rank, existing in by_reader.items() if existing is not None}
        if len(files) < len(by_reader) or len({existing.size for existing in files.values()}) != 1:
            if files:
                _log_different(wanted)
            continue
        folders = {existing.folder: rank for rank, existing in reversed(files.items())}
        contents = {existing.content for existing in files.values()}
        if len(folders) == 1 or (len(contents) == 1 and contents != {""}):
            same.add(wanted)
        else:
            unread[wanted] = tuple(folders.values())
    return Comparison(frozenset(same), unread)


def _read_all(paths: Mapping[Wanted, Path], coordinator: Coordinator) -> dict[Wanted, str]:
    with coordinator.waiting("compares existing files"):
        return {wanted: _sha256(path, coordinator.check) for wanted, path in paths.items()}


def _sha256(path: Path, check: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                check()
                digest.update(chunk)
    except OSError as error:
        raise CollectError(f"cannot read the existing file: {error}", subject=str(path)) from error
    return digest.hexdigest()


def _equal(unread: Collection[Wanted], by_rank: Mapping[int, Mapping[Wanted, str]]) -> frozenset[Wanted]:
    digests = {wanted: {read[wanted] for read in by_rank.values() if wanted in read} for wanted in unread}
    for wanted in unread:
        if len(digests[wanted]) > 1:
            _log_different(wanted)
    return frozenset(wanted for wanted in unread if len(digests[wanted]) == 1)


def _log_different(wanted: Wanted) -> None:
    name, request = wanted
    logger.warning("%s: the existing file is not the same on all ranks, so every rank gets it from %s", name, request)
