"""Hash all content of a cache and report the files whose checksum does not match."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.inventory import CachedSource, list_sources
from weightferry.cache.layout import CacheLayout
from weightferry.hashing import Checksum, Hashes

_NO_CHECKSUM = "?"


@dataclass(frozen=True)
class DamagedFile:
    """One damaged or missing content.

    Attributes
    ----------
    source : str
    commits : tuple of str
        The commits that link to it.
    paths : tuple of str
        The file names under which the commits link to it.
    blob : Path
    reason : str
    repo_id : str
        The repository id on the Hub; empty for other sources.
    """

    source: str
    commits: tuple[str, ...]
    paths: tuple[str, ...]
    blob: Path
    reason: str
    repo_id: str = ""


@dataclass(frozen=True)
class VerifyResult:
    """The result of a check of one cache.

    Attributes
    ----------
    files : int
    size : int
        Bytes of all content.
    without_checksum : int
        Files that could not be checked: no checksum is known.
    damaged : tuple of DamagedFile
    """

    files: int = 0
    size: int = 0
    without_checksum: int = 0
    damaged: tuple[DamagedFile, ...] = ()


def verify(
    layout: CacheLayout,
    progress: Callable[[int], None] = lambda _: None,
    only: str = "",
    expect: Callable[[int], None] = lambda _: None,
) -> VerifyResult:
    """Hash all content of a cache, at the speed of its disk.

    Parameters
    ----------
    progress
        Called with the number of bytes of each read.
    only
        The name of one source; empty: all sources.
    expect
        Called once, with the total number of bytes to read.
    """
    sources = [source for source in list_sources(layout) if only in ("", source.name)]
    contents = [(source, blob) for source in sources for blob in sorted(source.sizes)]
    size = sum(source.sizes[blob] for source, blob in contents)
    expect(size)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(lambda content: _check_content(content[0], content[1], progress), contents))
    damaged = tuple(
        _damaged_file(layout, source, blob, reason)
        for (source, blob), reason in zip(contents, reasons, strict=True)
        if reason not in ("", _NO_CHECKSUM)
    )
    missing = tuple(
        _damaged_file(layout, source, blob, "the content is missing")
        for source in sources
        for blob in sorted(_missing_content(layout, source))
    )
    unchecked = sum(reason == _NO_CHECKSUM for reason in reasons)
    return VerifyResult(len(contents) + len(missing), size, unchecked, damaged + missing)


def mark_unverified(layout: CacheLayout, damaged: DamagedFile) -> None:
    """Make the next operation hash this content again, and download it again.

    Damaged content of the Hub stays until good content replaces it. Damaged content of a source without checksums is
    removed, because the next operation would not detect the damage.
    """
    note = layout.verified_of(damaged.blob.parents[1]) / damaged.blob.name
    for path in (note,) if damaged.repo_id else (note, damaged.blob):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _missing_content(layout: CacheLayout, source: CachedSource) -> set[str]:
    """Return the names of content that a snapshot links to and that neither this cache nor a tier holds."""
    missing = set()
    for commit in source.commits:
        if not source.sizes.keys() >= set(commit.blobs):
            for path in (layout.snapshots(source.repo) / commit.name).rglob("*"):
                if path.is_symlink() and not path.exists():
                    missing.add(path.readlink().name)
    return missing


def _check_content(source: CachedSource, blob: str, progress: Callable[[int], None]) -> str:
    """Return why a content is damaged, an empty text when it is not, or `_NO_CHECKSUM`."""
    path = CacheLayout.blobs(source.repo) / blob
    expected = _expected_checksum(source, blob)
    if expected is None:
        return _NO_CHECKSUM
    hashes = Hashes(expected, source.sizes[blob])
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                hashes.update(chunk)
                progress(len(chunk))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if hashes.matches else f"checksum mismatch: expected {expected}, got {hashes.hexdigest}"


def _expected_checksum(source: CachedSource, blob: str) -> Checksum | None:
    """Return the published checksum, or the digest recorded at the download when the source publishes none."""
    text = blob
    if source.repo.parent.name != "hub":
        try:
            text = CacheLayout.sha256_of(source.repo, blob).read_text()
        except OSError:
            return None
    return Checksum.parse(text)


def _damaged_file(layout: CacheLayout, source: CachedSource, blob: str, reason: str) -> DamagedFile:
    commits = tuple(commit.name for commit in source.commits if blob in commit.blobs)
    paths: dict[str, None] = {}
    for commit in commits:
        snapshot = layout.snapshots(source.repo) / commit
        for path in snapshot.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_symlink() and path.readlink().name == blob:
                    paths[path.relative_to(snapshot).as_posix()] = None
    repo_id = source.name if source.repo.parent == layout.hub else ""
    return DamagedFile(source.name, commits, tuple(paths), layout.blobs(source.repo) / blob, reason, repo_id)
