"""Phase 2, resolve: one rank asks the origins, or a lock file, and every rank gets the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.survey import is_complete
from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import OriginUnreachable
from weightferry.manifest import File, PinnedSource
from weightferry.origins.base import Origin
from weightferry.origins.hub_cache import HubCacheOrigin, is_offline, user_hub_cache
from weightferry.origins.lockfile import Lockfile
from weightferry.origins.pin_sources import Resolution, pin_sources
from weightferry.origins.registry import origin_for
from weightferry.phases.job_request import JobRequest
from weightferry.settings import Settings


def resolve(coordinator: Coordinator, job: JobRequest, settings: Settings, lockfile: Path | None) -> Resolution:
    """Return the manifest of all that the ranks want, the same on every rank; collective.

    Parameters
    ----------
    lockfile
        Read the manifest from this file on rank 0, and ask no origin. None: ask the origins.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    if lockfile is not None:
        return coordinator.run_on_rank0("resolve", partial(_read_lockfile, coordinator, job, settings, lockfile))
    resolution = _ask_first_reachable(coordinator, job, settings)
    # No rank reaches the origins: rank 0 retries as often as the settings say, and reports why it failed.
    return resolution or coordinator.run_on_rank0("resolve", partial(_ask_origins, coordinator, job, settings))


def _ask_first_reachable(coordinator: Coordinator, job: JobRequest, settings: Settings) -> Resolution | None:
    """Ask on rank 0, and if it has no route to the origins, on the other leaders: one gateway node is enough."""
    other_leaders = [leader for leader in job.leaders if leader != 0]
    ask = partial(_ask_origins_if_reachable, coordinator, job, settings)
    resolution = coordinator.run_phase("resolve", ask, _first_answer, (0,))
    if resolution is None:
        role = job.role(coordinator.rank)
        resolution = coordinator.run_phase("resolve", ask, _first_answer, other_leaders, role)
    return resolution


def _ask_origins_if_reachable(coordinator: Coordinator, job: JobRequest, settings: Settings) -> Resolution | None:
    several = len(job.leaders) > 1
    try:
        return _ask_origins(coordinator, job, settings, other_ranks_can_ask=several)
    except OriginUnreachable:
        if not several:
            raise
        return None


def _first_answer(answers: Mapping[int, Resolution | None]) -> Resolution | None:
    return next((answer for answer in answers.values() if answer is not None), None)


def _ask_origins(
    coordinator: Coordinator, job: JobRequest, settings: Settings, *, other_ranks_can_ask: bool = False
) -> Resolution:
    return pin_sources(job.requests, settings, coordinator, _origins(settings), other_ranks_can_ask=other_ranks_can_ask)


def _origins(settings: Settings) -> Callable[[str, Settings], Origin]:
    if not is_offline():
        return origin_for
    return HubCacheOrigin.replacing_the_hub([*(cache.hub for cache in _caches(settings)), user_hub_cache()])


def _read_lockfile(coordinator: Coordinator, job: JobRequest, settings: Settings, path: Path) -> Resolution:
    origins = Lockfile.load(path).origins(partial(_read_cached, _caches(settings)))
    return pin_sources(job.requests, settings, coordinator, origins)


def _read_cached(caches: tuple[CacheLayout, ...], pinned: PinnedSource, file: File) -> bytes | None:
    """Return the content of a file that must be read to resolve, if a cache has it.

    The checksum is compared when the file is staged.
    """
    cache = next((cache for cache in caches if is_complete(cache, pinned, file)), None)
    return cache.blob(pinned, file).read_bytes() if cache else None


def _caches(settings: Settings) -> tuple[CacheLayout, ...]:
    return (CacheLayout(settings.cache_dir), *map(CacheLayout, settings.cache_tiers))
