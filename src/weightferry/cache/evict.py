"""Eviction: remove the commits that were staged longest ago, and never a source that is pinned or in use."""

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

from weightferry.cache.inventory import CachedSource, is_pinned, list_sources, read_cached_source
from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport, detect_lock_support
from weightferry.cache.permissions import list_entries, list_folders
from weightferry.cache.usage import exclusive_use

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvictedContent:
    """One removal by an eviction.

    Attributes
    ----------
    source, commit : str
        The commit is empty for content that no commit linked to.
    size : int
        Bytes that the removal freed. Content that another commit also links to stays and does not count.
    """

    source: str
    commit: str
    size: int


def evict(layout: CacheLayout, max_bytes: int, locks: LockSupport | None = None) -> list[EvictedContent]:
    """Remove commits until the content of a cache has at most `max_bytes` bytes, or until no more can be removed.

    Commits that were staged longest ago go first. Each goes completely, with the content that no other commit links to.
    Content without any commit goes last; a job that was killed leaves such content. A source stays while a running
    process uses it, while it is pinned, and when another user owns it.

    Parameters
    ----------
    locks
        The result of `detect_lock_support`; None: detect it now. Where `flock` does not work, weightferry cannot know
        which sources are in use, and removes none.

    Returns
    -------
    list of EvictedContent
        In the order of removal.
    """
    if not (locks or detect_lock_support(layout)).flock_works:
        return []
    _remove_trash(layout)
    sources, removed = list_sources(layout), list[EvictedContent]()
    size = sum(source.size for source in sources)
    commits = [(source, commit) for source in sources for commit in source.commits]
    for source, commit in sorted(commits, key=lambda pair: pair[1].last_staged):
        if size <= max_bytes:
            break
        with _locked_for_eviction(layout, source) as evictable:
            if evictable and (freed := _try_remove(remove_commit, layout, source.repo, commit.name)) is not None:
                removed.append(EvictedContent(source.name, commit.name, freed))
                size -= freed
                logger.info("evicted %s@%s: %d bytes", source.name, commit.name[:8], freed)
    for source in sources:
        if size <= max_bytes:
            break
        with _locked_for_eviction(layout, source) as evictable:
            if evictable and (freed := _try_remove(_remove_unreferenced, layout, source.repo)):
                removed.append(EvictedContent(f"unreferenced content of {source.name}", "", freed))
                size -= freed
                logger.info("evicted content of %s that no commit links to: %d bytes", source.name, freed)
    return removed


def _try_remove(remove: Callable[..., int | None], *arguments: Any) -> int | None:
    """Call `remove`. An error, for example for another user's file, does not stop the eviction of other sources."""
    try:
        return remove(*arguments)
    except OSError as error:
        logger.warning("cannot evict: %s", error)
        return None


def evictable_size(layout: CacheLayout, locks: LockSupport) -> int:
    """Return how many bytes an eviction could remove now."""
    if not locks.flock_works:
        return 0
    total = 0
    for source in list_sources(layout):
        with _locked_for_eviction(layout, source) as evictable:
            total += source.size * evictable
    return total


@contextlib.contextmanager
def _locked_for_eviction(layout: CacheLayout, source: CachedSource) -> Iterator[bool]:
    """Yield whether a source can be evicted. If so, no process can start to use it until the context ends."""
    with contextlib.ExitStack() as stack:
        evictable = False
        with contextlib.suppress(OSError):
            if not is_pinned(layout, source) and _may_remove(source.repo):
                evictable = stack.enter_context(exclusive_use(layout.used_lock(source.repo.name)))
        yield evictable


def _may_remove(repo: Path) -> bool:
    """Whether this user owns a source, or a group of this user may write to it."""
    status = repo.lstat()
    folders = [path for path in (repo, CacheLayout.snapshots(repo), CacheLayout.blobs(repo)) if path.exists()]
    group_may_write = bool(status.st_mode & stat.S_IWGRP) and all(
        os.access(path, os.W_OK | os.X_OK) for path in folders
    )
    return os.geteuid() in (0, status.st_uid) or group_may_write


def remove_source(layout: CacheLayout, source: CachedSource) -> int | None:
    """Remove a source with all its commits.

    Returns
    -------
    int or None
        Bytes that were removed; None when the source is in use, pinned, or owned by another user.
    """
    with _locked_for_eviction(layout, source) as evictable:
        if not evictable or not detect_lock_support(layout).flock_works:
            return None
        size = read_cached_source(layout, source.repo).size
        _remove_folder(source.repo)
        _remove_notes(layout, source.repo)
        return size


def remove_commit(layout: CacheLayout, repo: Path, commit: str) -> int | None:
    """Remove one commit of a source that is not in use, and the content that no other commit links to.

    Returns
    -------
    int or None
        Bytes of the removed content; None when the cache does not have the commit.
    """
    source = read_cached_source(layout, repo)
    removed = next((found for found in source.commits if found.name == commit), None)
    if removed is None:
        return None
    remaining = [found for found in source.commits if found is not removed]
    # The refs go first, so that no reader follows a ref to a snapshot that does not exist.
    refs = layout.refs(repo)
    for ref in (path for path in (() if refs.is_symlink() else refs.rglob("*")) if path.is_file()):
        with contextlib.suppress(OSError):
            if ref.read_text() == commit:
                ref.unlink()
    _remove_folder(layout.snapshots(repo) / commit)
    size = _remove_blobs(layout, source, {blob for found in remaining for blob in found.blobs})
    with contextlib.suppress(OSError):
        layout.used_note(repo.name, commit).unlink()
    shutil.rmtree(layout.manifests_of_commit(repo.name, commit), ignore_errors=True)
    if not remaining:
        shutil.rmtree(repo, ignore_errors=True)
        _remove_notes(layout, repo)
    return size


def _remove_unreferenced(layout: CacheLayout, repo: Path) -> int:
    """Remove the content that no commit links to. Returns its bytes."""
    source = read_cached_source(layout, repo)
    size = _remove_blobs(layout, source, {blob for commit in source.commits for blob in commit.blobs})
    if not source.commits:
        shutil.rmtree(repo, ignore_errors=True)
        _remove_notes(layout, repo)
    return size


def _remove_folder(folder: Path) -> None:
    """Rename a folder, so that it disappears at once, then delete it file by file."""
    trash = folder.with_name(f".trash-{secrets.token_hex(6)}")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _remove_blobs(layout: CacheLayout, source: CachedSource, keep: Collection[str]) -> int:
    """Remove the content of a source except `keep`, with the notes about it. Returns its bytes."""
    removed = 0
    for name, size in source.sizes.items():
        if name not in keep:
            with contextlib.suppress(OSError):
                (layout.blobs(source.repo) / name).unlink()
                removed += size
            for note in (layout.verified_of(source.repo) / name, layout.sha256_of(source.repo, name)):
                with contextlib.suppress(OSError):
                    note.unlink()
    return removed


def _remove_notes(layout: CacheLayout, repo: Path) -> None:
    """Remove the notes about a source that was removed. Its lock file stays: another process may wait for it."""
    for notes in (layout.used_notes(repo.name), layout.verified_of(repo), layout.manifests(repo.name)):
        shutil.rmtree(notes, ignore_errors=True)


def _remove_trash(layout: CacheLayout) -> None:
    """Delete renamed folders that an eviction left when it was killed."""
    with contextlib.suppress(OSError):
        for root in layout.source_roots():
            for folder in (root, *(layout.snapshots(repo) for repo in list_folders(root))):
                for entry in list_entries(folder):
                    if entry.name.startswith(".trash-"):
                        shutil.rmtree(entry.path, ignore_errors=True)  # rmtree does not follow links
