"""Whether a file system has room for what is missing, asked before the first byte comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from weightferry.cache.evict import evict, evictable_size
from weightferry.cache.inventory import total
from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport
from weightferry.cache.partial_cleanup import remove_abandoned, sweep, unfinished
from weightferry.cache.survey import CacheSurveyor
from weightferry.cache.usage import serialized
from weightferry.errors import NoSpace
from weightferry.manifest import File, PinnedSource
from weightferry.report.text import format_size
from weightferry.settings import Settings

_BLOCK = 4096  # bytes that the smallest file takes
# Content, the journal of its partial data, the note that it was found right, and its name in the snapshot.
_INODES_A_FILE = 4
_FOLDERS = 12  # that a new source needs, at most


def make_room(
    surveyor: CacheSurveyor, lacking: Iterable[tuple[PinnedSource, File]], settings: Settings, check: Callable[[], None]
) -> None:
    """Evict until what is missing fits, where the settings allow that, check that it does, and take the space.

    One leader at a time does so in a cache: what jobs bring that come at once is counted by all of them.

    Parameters
    ----------
    surveyor
        Of the cache, after its survey.
    check
        Called while another leader does so; what it raises ends the wait.

    Raises
    ------
    NoSpace
        It does not fit, whatever may go.
    OSError
        Space could not be taken: a quota, or no right to write.
    """
    files, layout = list(lacking), surveyor.layout
    if not files:
        return
    mine = surveyor.partials()
    with serialized(layout.space_lock, check, settings.stall_timeout):
        sources = {layout.repo(pinned).name for pinned, _ in files}
        sweep(layout, mine, settings.partial_ttl, surveyor.exclusion, sources)
        if settings.max_size:
            _keep_below(surveyor, files, mine, settings)
        check_space(layout, files, settings.min_free)
        surveyor.take_space()


def _keep_below(
    surveyor: CacheSurveyor, files: Sequence[tuple[PinnedSource, File]], mine: Collection[Path], settings: Settings
) -> None:
    """Evict until what a cache has, what others bring into it, and `files` are within the settings together."""
    layout, locks = surveyor.layout, surveyor.exclusion
    needed = sum(file.size or 0 for _, file in files)
    coming = _coming(layout, mine)
    there = os.statvfs(_existing(layout.root))
    takes = sum(_takes(layout, pinned, file) for pinned, file in files)
    short = settings.min_free + takes - there.f_bavail * there.f_frsize
    has = total(layout)
    above = max(has + coming + needed - settings.max_size, short)
    if above <= 0:
        return
    # What cannot be made to fit takes nothing away: a job that is tried again and again would empty the cache.
    if above > evictable_size(layout, locks) + coming:
        _check_size(layout, files, has + coming, settings, locks)
        return
    above -= sum(removed.size for removed in evict(layout, max(0, has - above), locks))
    if above > 0:
        # Whoever wants it again reads it again: better than that this job fails.
        for gone in remove_abandoned(layout, mine, locks):
            above -= gone
            if above <= 0:
                break
    left = total(layout) + _coming(layout, mine)
    _check_size(layout, files, left, settings, locks)


def _coming(layout: CacheLayout, mine: Collection[Path]) -> int:
    """Bytes that others have on their way into a cache."""
    return sum(one.taken for one in unfinished(layout) if one.path not in mine)


def _check_size(
    layout: CacheLayout, files: Sequence[tuple[PinnedSource, File]], left: int, settings: Settings, locks: LockSupport
) -> None:
    needed = sum(file.size or 0 for _, file in files)
    if left + needed > settings.max_size:
        raise NoSpace(
            f"{len(files)} files need {format_size(needed)}, and the cache may have {format_size(settings.max_size)} (max_size)"
            if needed > settings.max_size
            else f"{len(files)} files need {format_size(needed)}, and the cache may have {format_size(settings.max_size)} "
            f"(max_size): it has {format_size(left)}, too much of it "
            + ("in use, on its way, pinned, or somebody else's" if locks.by_flock else f"perhaps in use: {locks.why}"),
            subject=str(layout.root),
        )


def check_space(layout: CacheLayout, lacking: Iterable[tuple[PinnedSource, File]], min_free: int) -> None:
    """Compare what files will take with what is free, less `min_free` bytes.

    Quotas count where the file system tells them as free space (XFS and ext4 project quotas); others show when space
    is taken. A size that nobody knows counts as nothing.

    Raises
    ------
    NoSpace
        Bytes or inodes are too few.
    """
    files = list(lacking)
    if not files:
        return
    there = os.statvfs(_existing(layout.root))
    free = there.f_bavail * there.f_frsize
    needed = sum(_takes(layout, pinned, file) for pinned, file in files)
    if needed > free - min_free:
        kept = f" and {format_size(min_free)} are to stay free (min_free)" if min_free else ""
        raise NoSpace(
            f"{len(files)} files need {format_size(needed)}, {format_size(free)} are free{kept}: missing "
            f"{format_size(needed - free + min_free)}",
            subject=str(layout.root),
        )
    inodes = _INODES_A_FILE * len(files) + _FOLDERS
    # Some file systems (btrfs) make inodes as they go, and say 0 of 0.
    if there.f_files and inodes > there.f_favail:
        raise NoSpace(
            f"{len(files)} files need up to {inodes} inodes, {there.f_favail} are free", subject=str(layout.root)
        )


def _takes(layout: CacheLayout, pinned: PinnedSource, file: File) -> int:
    """Bytes that a file will take beyond those that its partial data has taken already."""
    try:
        taken = layout.partial_of(pinned, file).stat().st_blocks * 512
    except OSError:
        taken = 0
    size = -(-(file.size or 0) // _BLOCK) * _BLOCK
    return max(0, size - taken)


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
