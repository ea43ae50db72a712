"""Read a file of a network file system in order before it is mapped.

Page faults ask a server for a few pages at a time, in whatever order tensors are used; people measured 5 to 30 times
between that and reading in order. On a local disk the kernel's own read-ahead is enough, and nothing is done here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from weightferry.cluster.domains import is_local

logger = logging.getLogger(__name__)

_CHUNK = 16 << 20  # bytes at a time: the largest that NFS and Lustre clients split up by themselves
_SAMPLES = 16
_ONLY_CACHED = getattr(os, "RWF_NOWAIT", None)  # Linux: answer from the page cache or not at all
_MOST_OF_FREE = 0.5  # of the memory that is available: more would push out what was read first


def read_ahead(files: Iterable[Path], place: int, places: int, check: Callable[[], None]) -> int:
    """Bring this rank's share of files into the page cache of its node, where that makes loading faster.

    Parameters
    ----------
    files
        Whole files, in the order in which they are loaded.
    place, places
        This rank among the ranks of its node, and how many those are: each reads one part of each file.
    check
        Called between parts; what it raises ends this.

    Returns
    -------
    int
        Bytes read.
    """
    # Where the bytes are: links lead from a local folder to a cache that is not.
    paths = dict.fromkeys(file.resolve() for file in files)
    local = {folder: is_local(folder) for folder in {path.parent for path in paths}}
    cold = [path for path in paths if not local[path.parent] and not is_cached(path)]
    wanted, free = sum(path.stat().st_size for path in cold), available_memory()
    if wanted > _MOST_OF_FREE * free:
        logger.info("%d bytes to load and %d bytes of memory free: not read ahead, mapped only", wanted, free)
        return 0
    return sum(_read(path, place, places, check) for path in cold)


def _read(path: Path, place: int, places: int, check: Callable[[], None]) -> int:
    size = path.stat().st_size
    start, stop = (size * number // places for number in (place, place + 1))
    buffer, done = bytearray(min(_CHUNK, max(1, stop - start))), start
    with path.open("rb", buffering=0) as file:
        while done < stop:
            check()
            count = os.preadv(file.fileno(), [memoryview(buffer)[: min(len(buffer), stop - done)]], done)
            if not count:
                break  # shorter than it was: whoever loads it says so
            done += count
    return done - start


def is_cached(path: Path) -> bool:
    """Whether samples all over the file are in the page cache; False where the file system does not tell."""
    size = path.stat().st_size
    if _ONLY_CACHED is None:
        return False
    with path.open("rb", buffering=0) as file:
        for number in range(_SAMPLES):
            try:
                os.preadv(file.fileno(), [bytearray(1)], max(0, size - 1) * number // (_SAMPLES - 1), _ONLY_CACHED)
            except OSError:  # EAGAIN: not there; EOPNOTSUPP: not told
                return False
    return True


def available_memory() -> int:
    """Bytes that may be used without swapping; 0 where the kernel does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
