"""Read a whole cache, at the speed of its disk, and say which content is not what its name or its note promises."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.inventory import CachedSource, inventory
from weightferry.cache.layout import CacheLayout
from weightferry.hashing import Checksum, Hashes


@dataclass(frozen=True)
class DamagedFile:
    """One content that is wrong.

    Attributes
    ----------
    source : str
    commits : tuple of str
        Those that show it.
    paths : tuple of str
        Under which names.
    blob : Path
    why : str
    repo_id : str
        Of the Hub; empty for other sources.
    """

    source: str
    commits: tuple[str, ...]
    paths: tuple[str, ...]
    blob: Path
    why: str
    repo_id: str = ""


@dataclass(frozen=True)
class VerifyResult:
    """What one cache was found to hold."""

    files: int = 0
    size: int = 0
    unknown: int = 0
    damaged: tuple[DamagedFile, ...] = ()


def verify(
    layout: CacheLayout,
    progress: Callable[[int], None] = lambda _: None,
    only: str = "",
    expect: Callable[[int], None] = lambda _: None,
) -> VerifyResult:
    """Hash everything in a cache.

    Parameters
    ----------
    progress
        Called with counts of bytes as they are read.
    only
        The name of one source; empty: all.
    expect
        Called once, with the bytes that are to be read.
    """
    sources = [held for held in inventory(layout) if only in ("", held.name)]
    wanted = [(held, blob) for held in sources for blob in sorted(held.sizes)]
    size = sum(held.sizes[blob] for held, blob in wanted)
    expect(size)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        wrong = list(pool.map(lambda one: _wrong(one[0], one[1], progress), wanted))
    damaged = tuple(
        _damage(layout, held, blob, why)
        for (held, blob), why in zip(wanted, wrong, strict=True)
        if why not in ("", "?")
    )
    gone = tuple(
        _damage(layout, held, blob, "is not there") for held in sources for blob in sorted(_gone(layout, held))
    )
    return VerifyResult(len(wanted) + len(gone), size, sum(why == "?" for why in wrong), damaged + gone)


def doubt(layout: CacheLayout, damage: DamagedFile) -> None:
    """Let the next operation hash content again, and bring it anew.

    It stays in its place until the right one takes that; only of a source without checksums, whose next operation would
    not find it wrong, it is removed.
    """
    notes = layout.verified_of(damage.blob.parents[1]) / damage.blob.name
    for path in (notes,) if damage.repo_id else (notes, damage.blob):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _gone(layout: CacheLayout, held: CachedSource) -> set[str]:
    """Names of content that a snapshot shows and that is nowhere, in no tier either."""
    gone = set()
    for commit in held.commits:
        if not held.sizes.keys() >= set(commit.blobs):
            for path in (layout.snapshots(held.repo) / commit.name).rglob("*"):
                if path.is_symlink() and not path.exists():
                    gone.add(path.readlink().name)
    return gone


def _wrong(held: CachedSource, blob: str, progress: Callable[[int], None]) -> str:
    """Return what is wrong with a content, an empty text when it is right, ``?`` when nothing is promised."""
    path = CacheLayout.blobs(held.repo) / blob
    wanted = _promised(held, blob)
    if wanted is None:
        return "?"
    hashes = Hashes(wanted, held.sizes[blob])
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                hashes.update(chunk)
                progress(len(chunk))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if hashes.matches else f"expected {wanted}, got {hashes.hexdigest}"


def _promised(held: CachedSource, blob: str) -> Checksum | None:
    """What a content must be: where its source publishes no checksum, what was noted when it came."""
    text = blob
    if held.repo.parent.name != "hub":
        try:
            text = CacheLayout.sha256_of(held.repo, blob).read_text()
        except OSError:
            return None
    return Checksum.parse(text)


def _damage(layout: CacheLayout, held: CachedSource, blob: str, why: str) -> DamagedFile:
    commits = tuple(commit.name for commit in held.commits if blob in commit.blobs)
    paths: dict[str, None] = {}
    for commit in commits:
        snapshot = layout.snapshots(held.repo) / commit
        for path in snapshot.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_symlink() and path.readlink().name == blob:
                    paths[path.relative_to(snapshot).as_posix()] = None
    hub = held.repo.parent == layout.hub
    return DamagedFile(held.name, commits, tuple(paths), layout.blobs(held.repo) / blob, why, held.name if hub else "")
