"""Make room: what was staged longest ago goes first, and never what anybody uses."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightferry.cache.inventory import CachedSource, inventory, is_pinned, read_cached_source
from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport, exclusion
from weightferry.cache.permissions import entries, folders
from weightferry.cache.usage import alone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvictedContent:
    """What was evicted.

    Attributes
    ----------
    source, commit : str
        The commit is empty for content that none showed.
    size : int
        Bytes that nothing else needed.
    """

    source: str
    commit: str
    size: int


def evict(layout: CacheLayout, to: int, locks: LockSupport | None = None) -> list[EvictedContent]:
    """Remove commits until the content of a cache has at most `to` bytes, or nothing more may go.

    Those staged longest ago go first, each as a whole, with the content that no other commit shows; then content that
    no commit shows at all, as a killed job leaves it. Left alone are sources that a living process has staged, that
    somebody pinned, and that belong to somebody else.

    Parameters
    ----------
    locks
        What is known of them; None: to be found out. Where `flock` means nothing nobody knows what is in use, and
        nothing is removed.

    Returns
    -------
    list of EvictedContent
        In their order.
    """
    if not (locks or exclusion(layout)).by_flock:
        return []
    _sweep(layout)
    sources, removed = inventory(layout), list[EvictedContent]()
    size = sum(held.size for held in sources)
    order = [(held, commit) for held in sources for commit in held.commits]
    for held, commit in sorted(order, key=lambda one: one[1].staged):
        if size <= to:
            break
        with _ours(layout, held) as ours:
            if ours and (gone := _tried(remove_commit, layout, held.repo, commit.name)) is not None:
                removed.append(EvictedContent(held.name, commit.name, gone))
                size -= gone
                logger.info("evicted %s@%s: %d bytes", held.name, commit.name[:8], gone)
    for held in sources:
        if size <= to:
            break
        with _ours(layout, held) as ours:
            if ours and (gone := _tried(_remove_unshown, layout, held.repo)):
                removed.append(EvictedContent(f"what no commit shows of {held.name}", "", gone))
                size -= gone
                logger.info("evicted content of %s that no commit shows: %d bytes", held.name, gone)
    return removed


def _tried(remove: Callable[..., int | None], *what: Any) -> int | None:
    """Remove something; what does not go, another user's perhaps, keeps nothing else from going."""
    try:
        return remove(*what)
    except OSError as error:
        logger.warning("not evicted: %s", error)
        return None


def evictable_size(layout: CacheLayout, locks: LockSupport) -> int:
    """Bytes that could go now."""
    if not locks.by_flock:
        return 0
    found = 0
    for held in inventory(layout):
        with _ours(layout, held) as ours:
            found += held.size * ours
    return found


@contextlib.contextmanager
def _ours(layout: CacheLayout, held: CachedSource) -> Iterator[bool]:
    """Yield whether a source may go; if so, nobody begins to use it meanwhile."""
    with contextlib.ExitStack() as stack:
        free = False
        with contextlib.suppress(OSError):
            if not is_pinned(layout, held) and _may_remove(held.repo):
                free = stack.enter_context(alone(layout.used_lock(held.repo.name)))
        yield free


def _may_remove(repo: Path) -> bool:
    """Whether a source is this user's, or that of a group which this user is in."""
    seen = repo.lstat()
    inside = [path for path in (repo, CacheLayout.snapshots(repo), CacheLayout.blobs(repo)) if path.exists()]
    of_group = bool(seen.st_mode & stat.S_IWGRP) and all(os.access(path, os.W_OK | os.X_OK) for path in inside)
    return os.geteuid() in (0, seen.st_uid) or of_group


def remove_source(layout: CacheLayout, held: CachedSource) -> int | None:
    """Remove a whole source; None when it is in use, pinned, or somebody else's. Returns its bytes."""
    with _ours(layout, held) as ours:
        if not ours or not exclusion(layout).by_flock:
            return None
        size = read_cached_source(layout, held.repo).size
        _remove_folder(held.repo)
        _forget(layout, held.repo)
        return size


def remove_commit(layout: CacheLayout, repo: Path, commit: str) -> int | None:
    """Remove one commit of a source that nobody uses, and the content that no other commit shows.

    Returns
    -------
    int or None
        Bytes of that content; None when the commit is not there.
    """
    held = read_cached_source(layout, repo)
    gone = next((one for one in held.commits if one.name == commit), None)
    if gone is None:
        return None
    left = [one for one in held.commits if one is not gone]
    # The refs first: nobody is led to a snapshot that is not there.
    refs = layout.refs(repo)
    for ref in (path for path in (() if refs.is_symlink() else refs.rglob("*")) if path.is_file()):
        with contextlib.suppress(OSError):
            if ref.read_text() == commit:
                ref.unlink()
    _remove_folder(layout.snapshots(repo) / commit)
    size = _remove_blobs(layout, held, {blob for one in left for blob in one.blobs})
    with contextlib.suppress(OSError):
        layout.used_note(repo.name, commit).unlink()
    if not left:
        shutil.rmtree(repo, ignore_errors=True)
        _forget(layout, repo)
    return size


def _remove_unshown(layout: CacheLayout, repo: Path) -> int:
    held = read_cached_source(layout, repo)
    size = _remove_blobs(layout, held, {blob for commit in held.commits for blob in commit.blobs})
    if not held.commits:
        shutil.rmtree(repo, ignore_errors=True)
        _forget(layout, repo)
    return size


def _remove_folder(folder: Path) -> None:
    """Take a folder out of sight at once, then remove it bit by bit."""
    trash = folder.with_name(f".trash-{secrets.token_hex(6)}")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _remove_blobs(layout: CacheLayout, held: CachedSource, shown: Collection[str]) -> int:
    size = 0
    for name, bytes_of in held.sizes.items():
        if name not in shown:
            with contextlib.suppress(OSError):
                (layout.blobs(held.repo) / name).unlink()
                size += bytes_of
            for note in (layout.verified_of(held.repo) / name, layout.sha256_of(held.repo, name)):
                with contextlib.suppress(OSError):
                    note.unlink()
    return size


def _forget(layout: CacheLayout, repo: Path) -> None:
    """Remove notes about a source that is gone; its lock file stays, since somebody may wait for it."""
    for notes in (layout.used_notes(repo.name), layout.verified_of(repo)):
        shutil.rmtree(notes, ignore_errors=True)


def _sweep(layout: CacheLayout) -> None:
    """Remove what an eviction left that was killed."""
    with contextlib.suppress(OSError):
        for family in layout.families():
            for place in (family, *(layout.snapshots(repo) for repo in folders(family))):
                for entry in entries(place):
                    if entry.name.startswith(".trash-"):
                        shutil.rmtree(entry.path, ignore_errors=True)  # which follows no link
