"""What a leader does for its domain: read what the plan gives it, and publish each file when it is right."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event, Lock

from weightferry.cache.layout import CacheLayout
from weightferry.cache.locks import content_lock
from weightferry.cache.publish import publish, sweep_partials
from weightferry.cache.survey import Survey, is_whole, known_sha256
from weightferry.errors import IntegrityError, at
from weightferry.manifest import File, Manifest, Pinned
from weightferry.origins.base import Origin, origin_for
from weightferry.origins.retry import Watch
from weightferry.settings import Settings
from weightferry.transfer.fetch import fetch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Brought:
    """What one leader did.

    Attributes
    ----------
    origin_bytes : int
        Bytes that came from the origin, those of broken attempts included.
    sha256 : dict of int to str
        What was computed, by the file's place in `Manifest.staged()`.
    cached : tuple of int
        Files that were whole after all when their lock was taken: another job had brought them.
    """

    origin_bytes: int = 0
    sha256: dict[int, str] = field(default_factory=dict)
    cached: tuple[int, ...] = ()


def bring(
    layout: CacheLayout,
    manifest: Manifest,
    missing: Sequence[int],
    settings: Settings,
    watch: Watch,
    origins: Callable[[str, Settings], Origin] = origin_for,
) -> Brought:
    """Read the `missing` files from their origins and publish them; several at a time.

    Raises
    ------
    CollectError, OSError
        The first thing that went wrong; what was published before stays, nothing half-written has a final name.
    """
    files = list(manifest.staged())
    made = {scheme: origins(scheme, settings) for scheme in {files[i][0].source.scheme for i in missing}}
    counter = _Counter(watch)
    sweep_partials(layout, settings.partial_ttl)

    def one(index: int) -> str | None:
        pinned, file = files[index]
        with at(subject=f"{pinned.name}/{file.path}"):
            return _one(layout, made[pinned.source.scheme], pinned, file, settings, counter)

    done = _in_parallel(one, missing, settings.connections, counter)
    return Brought(
        origin_bytes=counter.total,
        sha256={index: digest for index, digest in done.items() if digest is not None},
        cached=tuple(index for index, digest in done.items() if digest is None),
    )


def _one(
    layout: CacheLayout, origin: Origin, pinned: Pinned, file: File, settings: Settings, watch: Watch
) -> str | None:
    """Bring one file; None when another job did."""
    with content_lock(layout.lock(pinned, file), settings.lock_timeout, watch.check):
        if is_whole(layout, pinned, file) and known_sha256(layout, pinned, file) is not None:
            return None
        partial = layout.new_partial(file)
        try:
            digest = fetch(origin, pinned, file, partial, settings, watch)
            with at(phase="publish"):
                publish(layout, pinned, file, partial, digest)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        logger.info("published %s/%s", pinned.name, file.path)
        return digest


def _in_parallel(
    one: Callable[[int], str | None], indices: Sequence[int], width: int, counter: _Counter
) -> dict[int, str | None]:
    if not indices:
        return {}
    with ThreadPoolExecutor(min(width, len(indices)), thread_name_prefix="weightferry-fetch") as pool:
        futures = {index: pool.submit(one, index) for index in indices}
        try:
            done, waiting = wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            counter.stop()
        if waiting:
            for future in waiting:
                future.cancel()
            wait(futures.values())
    # The first failure in time is the cause; the others may only have been told to stop.
    for future in done:
        future.result()
    return {index: future.result() for index, future in futures.items()}


class _Stopped(Exception):
    """Another file of the same leader failed: this one is given up."""


class _Counter:
    """Counts bytes of all connections, and stops all when one failed."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._lock, self._stop = watch, Lock(), Event()
        self.total = 0

    def stop(self) -> None:
        self._stop.set()

    def moved(self, count: int) -> None:
        with self._lock:
            self.total += count
        self._watch.moved(count)

    def check(self) -> None:
        if self._stop.is_set():
            raise _Stopped
        self._watch.check()


def agree_on_bytes(
    manifest: Manifest, surveys: Mapping[int, Survey], brought: Mapping[int, Brought]
) -> dict[int, Brought]:
    """Compare what the domains hold of files whose origin publishes no checksum; runs on rank 0.

    Raises
    ------
    IntegrityError
        Two domains hold different bytes of one file.
    """
    for index, (pinned, file) in enumerate(manifest.staged()):
        if file.checksum:
            continue
        seen: dict[str, int] = {}
        for leader in brought:
            digest = brought[leader].sha256.get(index) or surveys[leader].whole.get(index)
            if digest:
                seen.setdefault(digest, leader)
        if len(seen) > 1:
            (one, first), (other, second), *_ = seen.items()
            raise IntegrityError(
                f"the nodes got different bytes: rank {first} sha256 {one}, rank {second} sha256 {other}",
                subject=f"{pinned.name}/{file.path}",
            )
    return dict(brought)
