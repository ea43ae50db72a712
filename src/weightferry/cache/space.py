"""Check before the first byte arrives that the file system has room for the missing files; evict where allowed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from weightferry.cache.evict import evict, evictable_size
from weightferry.cache.inventory import content_size
from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport
from weightferry.cache.partial_cleanup import list_partial_data, remove_abandoned, remove_expired
from weightferry.cache.survey import CacheSurveyor
from weightferry.cache.usage import serialized
from weightferry.errors import NoSpace
from weightferry.manifest import File, PinnedSource
from weightferry.report.report_text import format_size
from weightferry.settings import Settings

_BLOCK = 4096  # bytes that the smallest file takes
# The content, the journal of its partial data, the note that it was verified, and its link in the snapshot.
_INODES_PER_FILE = 4
_FOLDERS_PER_SOURCE = 12  # at most, for a new source


def make_room(
    surveyor: CacheSurveyor, missing: Iterable[tuple[PinnedSource, File]], settings: Settings, check: Callable[[], None]
) -> None:
    """Evict old commits where the settings allow it, check that the missing files fit, and reserve their space.

    One leader at a time does this in a cache, so jobs that start at the same time count each other's downloads.

    Parameters
    ----------
    surveyor
        Of the cache, after its survey.
    check
        Called while another leader does this; its exception ends the wait.

    Raises
    ------
    NoSpace
        The files do not fit, even after an eviction.
    OSError
        The space could not be reserved: a quota is exceeded, or this user may not write.
    """
    files, layout = list(missing), surveyor.layout
    if not files:
        return
    own_paths = surveyor.own_partial_paths()
    with serialized(layout.space_lock, check, settings.stall_timeout):
        sources = {layout.repo(pinned).name for pinned, _ in files}
        remove_expired(layout, own_paths, settings.partial_ttl, surveyor.lock_support, sources)
        if settings.max_size:
            _evict_to_limit(surveyor, files, own_paths, settings)
        check_space(layout, files, settings.min_free)
        surveyor.reserve_space()


def _evict_to_limit(
    surveyor: CacheSurveyor, files: Sequence[tuple[PinnedSource, File]], own_paths: Collection[Path], settings: Settings
) -> None:
    """Evict until the cache's content, the downloads of other jobs and `files` together keep the settings' limits."""
    layout, locks = surveyor.layout, surveyor.lock_support
    needed = sum(file.size or 0 for _, file in files)
    downloading = _downloading_size(layout, own_paths)
    disk = os.statvfs(_existing_parent(layout.root))
    disk_needed = sum(_disk_needed(layout, pinned, file) for pinned, file in files)
    disk_shortage = settings.min_free + disk_needed - disk.f_bavail * disk.f_frsize
    cached = content_size(layout)
    excess = max(cached + downloading + needed - settings.max_size, disk_shortage)
    if excess <= 0:
        return
    # When the files cannot fit, evict nothing: otherwise a job that is tried again and again would empty the cache.
    if excess > evictable_size(layout, locks) + downloading:
        _check_max_size(layout, files, cached + downloading, settings, locks)
        return
    excess -= sum(removed.size for removed in evict(layout, max(0, cached - excess), locks))
    if excess > 0:
        # A later job may have to download this data again. That is better than failing this job.
        for removed_size in remove_abandoned(layout, own_paths, locks):
            excess -= removed_size
            if excess <= 0:
                break
    remaining = content_size(layout) + _downloading_size(layout, own_paths)
    _check_max_size(layout, files, remaining, settings, locks)


def _downloading_size(layout: CacheLayout, own_paths: Collection[Path]) -> int:
    """Return the bytes that other processes have reserved in a cache for their downloads."""
    return sum(data.disk_size for data in list_partial_data(layout) if data.path not in own_paths)


def _check_max_size(
    layout: CacheLayout, files: Sequence[tuple[PinnedSource, File]], cached: int, settings: Settings, locks: LockSupport
) -> None:
    needed = sum(file.size or 0 for _, file in files)
    if cached + needed <= settings.max_size:
        return
    text = (
        f"not enough room in the cache {layout.root}: {len(files)} files need {format_size(needed)}, but `max_size` "
        f"allows {format_size(settings.max_size)}"
    )
    if needed > settings.max_size:
        raise NoSpace(f"{text}. Raise `max_size`", subject=str(layout.root))
    reason = (
        "kept: in use by a running process, being downloaded, pinned, or owned by another user"
        if locks.flock_works
        else f"kept, because running processes may use it: {locks.reason}"
    )
    raise NoSpace(
        f"{text} and the cache has {format_size(cached)} ({reason}). Raise `max_size`, or remove or unpin models "
        "(`weightferry cache ls` lists them)",
        subject=str(layout.root),
    )


def check_space(layout: CacheLayout, missing: Iterable[tuple[PinnedSource, File]], min_free: int) -> None:
    """Compare the space that files will take with the free space, less `min_free` bytes.

    A quota counts where the file system reports it as free space (XFS and ext4 project quotas). Other quotas show when
    the space is reserved. A file of unknown size counts as 0 bytes.

    Raises
    ------
    NoSpace
        The file system has too few free bytes or inodes.
    """
    files = list(missing)
    if not files:
        return
    disk = os.statvfs(_existing_parent(layout.root))
    free = disk.f_bavail * disk.f_frsize
    needed = sum(_disk_needed(layout, pinned, file) for pinned, file in files)
    if needed > free - min_free:
        reserve = f", of which {format_size(min_free)} must stay free (`min_free`)" if min_free else ""
        raise NoSpace(
            f"not enough disk space: {layout.root} needs {format_size(needed)} for {len(files)} files, has "
            f"{format_size(free)}{reserve}. Free {format_size(needed - free + min_free)}, set `max_size` to evict old "
            "models, or choose another cache folder (`--cache-dir`)",
            subject=str(layout.root),
        )
    inodes = _INODES_PER_FILE * len(files) + _FOLDERS_PER_SOURCE
    # Some file systems (btrfs) make inodes on demand, and report 0 of 0.
    if disk.f_files and inodes > disk.f_favail:
        raise NoSpace(
            f"not enough inodes: {layout.root} needs up to {inodes} for {len(files)} files, has {disk.f_favail}. "
            "Remove files from that file system, or choose another cache folder (`--cache-dir`)",
            subject=str(layout.root),
        )


def _disk_needed(layout: CacheLayout, pinned: PinnedSource, file: File) -> int:
    """Return the bytes that a file will take beyond those that its partial data takes already."""
    try:
        reserved = layout.partial_of(pinned, file).stat().st_blocks * 512
    except OSError:
        reserved = 0
    size = -(-(file.size or 0) // _BLOCK) * _BLOCK
    return max(0, size - reserved)


def _existing_parent(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
