"""What a cache holds: sources and their commits, how large they are, when they were last staged, and by whom used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.permissions import entries, folders
from weightferry.cache.usage import in_use


@dataclass(frozen=True)
class CachedCommit:
    """One commit of a source, as a snapshot shows it.

    Attributes
    ----------
    name : str
    staged : float
        Seconds since the epoch, when it was last staged; where nobody noted it, when its snapshot was made.
    blobs : tuple of str
        Names of the content that it shows.
    """

    name: str
    staged: float
    blobs: tuple[str, ...]


@dataclass(frozen=True)
class CachedSource:
    """One source in a cache.

    Attributes
    ----------
    repo : Path
        Its folder.
    commits : tuple of Commit
        The one that was staged longest ago comes first.
    sizes : dict of str to int
        Bytes of each content, by its name; those that no commit shows too.
    """

    repo: Path
    commits: tuple[CachedCommit, ...]
    sizes: dict[str, int]

    @property
    def name(self) -> str:
        """For readers: the repository id on the Hub, elsewhere the name of the folder."""
        kind, *parts = self.repo.name.split("--")
        if self.repo.parent.name != "hub":
            return self.repo.name
        return "/".join(parts) if kind == "models" else f"{kind}/{'/'.join(parts)}"

    @property
    def size(self) -> int:
        """Bytes of all content."""
        return sum(self.sizes.values())

    @property
    def staged(self) -> float:
        """When any commit of it was last staged."""
        return max((commit.staged for commit in self.commits), default=0.0)


def inventory(layout: CacheLayout) -> list[CachedSource]:
    """List the sources of a cache, sorted by name; folders that cannot be read are left out."""
    held = []
    for family in layout.families():
        for repo in folders(family):
            if layout.blobs(repo).is_dir() or layout.snapshots(repo).is_dir():
                held.append(read_cached_source(layout, repo))
    return sorted(held, key=lambda one: one.name)


def read_cached_source(layout: CacheLayout, repo: Path) -> CachedSource:
    """Look at one source."""
    commits = [
        CachedCommit(snapshot.name, _staged(layout, snapshot), tuple(sorted(set(_shown(snapshot)))))
        for snapshot in folders(layout.snapshots(repo))
    ]
    sizes = dict(_content(layout, repo))
    return CachedSource(repo, tuple(sorted(commits, key=lambda commit: commit.staged)), sizes)


def is_pinned(layout: CacheLayout, held: CachedSource) -> bool:
    """Whether somebody pinned it."""
    return layout.pin_mark(held.repo.name).exists()


def is_in_use(layout: CacheLayout, held: CachedSource) -> bool:
    """Whether a living process staged it."""
    with contextlib.suppress(OSError):
        return in_use(layout.used_lock(held.repo.name))
    return True  # nobody may say that it is not


def total(layout: CacheLayout) -> int:
    """Bytes of all content in a cache; what shows it is not looked at."""
    return sum(size for family in layout.families() for repo in folders(family) for _, size in _content(layout, repo))


def _content(layout: CacheLayout, repo: Path) -> Iterator[tuple[str, int]]:
    for entry in entries(layout.blobs(repo)):
        with contextlib.suppress(OSError):
            yield entry.name, entry.stat(follow_symlinks=False).st_size


def _staged(layout: CacheLayout, snapshot: Path) -> float:
    for path in (layout.used_note(snapshot.parents[1].name, snapshot.name), snapshot):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _shown(folder: Path) -> Iterator[str]:
    """Yield the names of the content that a snapshot links to."""
    for above, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                yield os.readlink(f"{above}/{name}").rpartition("/")[2]
