"""The inventory of a cache: its sources and commits, their sizes, when they were last staged, pins and users."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.permissions import list_entries, list_folders
from weightferry.cache.usage import in_use


@dataclass(frozen=True)
class CachedCommit:
    """One commit of a source in a cache, as its snapshot folder shows it.

    Attributes
    ----------
    name : str
    last_staged : float
        When the commit was last staged, in seconds since the epoch. Without a note about this: when its snapshot was
        made.
    blobs : tuple of str
        Names of the content that the snapshot links to.
    """

    name: str
    last_staged: float
    blobs: tuple[str, ...]


@dataclass(frozen=True)
class CachedSource:
    """One source in a cache.

    Attributes
    ----------
    repo : Path
        The folder of the source.
    commits : tuple of CachedCommit
        The commit that was staged longest ago comes first.
    sizes : dict of str to int
        Bytes of each content, by its name, also of content that no commit links to.
    """

    repo: Path
    commits: tuple[CachedCommit, ...]
    sizes: dict[str, int]

    @property
    def name(self) -> str:
        """The repository id of a Hub source, the folder name of any other source; for people to read."""
        kind, *parts = self.repo.name.split("--")
        if self.repo.parent.name != "hub":
            return self.repo.name
        return "/".join(parts) if kind == "models" else f"{kind}/{'/'.join(parts)}"

    @property
    def size(self) -> int:
        """Bytes of all content."""
        return sum(self.sizes.values())

    @property
    def last_staged(self) -> float:
        """When any of its commits was last staged, in seconds since the epoch; 0 without commits."""
        return max((commit.last_staged for commit in self.commits), default=0.0)


def list_sources(layout: CacheLayout) -> list[CachedSource]:
    """Return the sources of a cache, sorted by name. Folders that this user cannot read are left out."""
    sources = []
    for root in layout.source_roots():
        for repo in list_folders(root):
            if layout.blobs(repo).is_dir() or layout.snapshots(repo).is_dir():
                sources.append(read_cached_source(layout, repo))
    return sorted(sources, key=lambda source: source.name)


def read_cached_source(layout: CacheLayout, repo: Path) -> CachedSource:
    """Return the commits and the content sizes of the source in the folder `repo`."""
    commits = [
        CachedCommit(snapshot.name, _last_staged(layout, snapshot), tuple(sorted(set(_linked_blobs(snapshot)))))
        for snapshot in list_folders(layout.snapshots(repo))
    ]
    sizes = dict(_content_sizes(layout, repo))
    return CachedSource(repo, tuple(sorted(commits, key=lambda commit: commit.last_staged)), sizes)


def is_pinned(layout: CacheLayout, source: CachedSource) -> bool:
    """Whether a user pinned the source, which protects it from eviction."""
    return layout.pin_mark(source.repo.name).exists()


def is_in_use(layout: CacheLayout, source: CachedSource) -> bool:
    """Whether a running process staged the source. True also when this cannot be found out."""
    with contextlib.suppress(OSError):
        return in_use(layout.used_lock(source.repo.name))
    return True


def content_size(layout: CacheLayout) -> int:
    """Return the bytes of all content in a cache. Snapshots are not read, so this is fast."""
    return sum(
        size
        for root in layout.source_roots()
        for repo in list_folders(root)
        for _, size in _content_sizes(layout, repo)
    )


def _content_sizes(layout: CacheLayout, repo: Path) -> Iterator[tuple[str, int]]:
    for entry in list_entries(layout.blobs(repo)):
        with contextlib.suppress(OSError):
            yield entry.name, entry.stat(follow_symlinks=False).st_size


def _last_staged(layout: CacheLayout, snapshot: Path) -> float:
    for path in (layout.used_note(snapshot.parents[1].name, snapshot.name), snapshot):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _linked_blobs(snapshot: Path) -> Iterator[str]:
    """Yield the names of the content that a snapshot links to."""
    for folder, _, files in os.walk(snapshot):
        for name in files:
            with contextlib.suppress(OSError):
                yield os.readlink(f"{folder}/{name}").rpartition("/")[2]
