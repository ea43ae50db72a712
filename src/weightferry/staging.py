"""The seven phases of one call, in their order; every rank runs all of this."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightferry.cache.layout import CacheLayout
from weightferry.cache.publish import record_staged, show
from weightferry.cache.survey import is_complete
from weightferry.cache.trust import check, prepare
from weightferry.cache.usage import hold_sources
from weightferry.cache.verified_notes import is_on_local_disk
from weightferry.cluster.connect import operation
from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import BadRequest, OriginUnreachable, at
from weightferry.manifest import File, Manifest, Pinned
from weightferry.origins.base import Origin, origin_for
from weightferry.origins.hub_cache import HubCacheOrigin, is_offline, user_hub_cache
from weightferry.origins.lockfile import Lockfile
from weightferry.origins.pin_sources import Resolution, resolve
from weightferry.phases.agree import JobRequest, RankRequest, agree
from weightferry.phases.delivery import deliver
from weightferry.phases.link import LinkPlan, VisibilityCheck, agree_on_blocks, check_readable, first_blocks, make_links
from weightferry.report.run import RunReport
from weightferry.report.summary import DomainResult, summarise
from weightferry.settings import Settings
from weightferry.sources import SourceLike, SourceRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Collected:
    """What an operation gives to one rank.

    Attributes
    ----------
    paths : mapping of str to Path
        By name, the local file or folder.
    report : RunReport
        The same on every rank.
    manifest : Manifest
        All that was wanted, pinned; the same on every rank.
    """

    paths: Mapping[str, Path]
    report: RunReport
    manifest: Manifest


def stage(
    source: SourceLike,
    *,
    revision: str | None = None,
    allow_patterns: str | Iterable[str] | None = None,
    ignore_patterns: str | Iterable[str] | None = None,
    cache_dir: str | Path | None = None,
    to: str | Path | None = None,
    group: ProcessGroup | None = None,
    lockfile: str | Path | None = None,
) -> Path:
    """Bring a whole source onto every node; collective: every rank calls it.

    Parameters
    ----------
    source
        ``org/name``, ``hf://org/name@revision/path``, ``http(s)://...``, ``s3://...`` and every other URL that fsspec
        knows, ``file://...``, or a path. An existing local folder wins over a Hub repository of the same name.
    revision
        Branch, tag or commit, for the Hub.
    allow_patterns, ignore_patterns
        Shell patterns on paths below the source, as in `huggingface_hub.snapshot_download`.
    cache_dir
        The cache folder of this rank; default: `Settings`.
    to
        A folder in which links show the files under their own paths.
    group
        The ranks that take part; None: all of the default process group.
    lockfile
        As ``weightferry prefetch`` wrote it: what it pins is not asked for again, and what is neither in a cache nor
        can be read fails at once.

    Returns
    -------
    Path
        On this rank, the folder that shows the files: `to`, or the snapshot in the cache, or a local source itself.
        Of a source that is one file, that file.

    Raises
    ------
    CollectError
        The same on every rank, whatever failed and wherever.
    """
    settings = Settings.from_environ(cache_dir=cache_dir)

    def wish() -> RankRequest:
        ask = SourceRequest.of(source, revision=revision, allow=allow_patterns, ignore=ignore_patterns)
        return RankRequest({"": ask}, into=_absolute(to))

    with operation(settings, "stage", group=group) as coordinator:
        return collect(wish, coordinator, settings, lockfile=_absolute(lockfile)).paths[""]


def _absolute(path: str | Path | None) -> Path | None:
    if path == "":
        raise BadRequest("the folder for links has an empty name")
    return None if path is None else Path(path).expanduser().absolute()


def collect(
    wish: Callable[[], RankRequest], coordinator: Coordinator, settings: Settings, *, lockfile: Path | None = None
) -> Collected:
    """Run one operation from agree to link.

    Parameters
    ----------
    wish
        Makes what this rank wants; what it raises fails the operation on every rank.
    control
        Connects the ranks.
    settings
        Limits, and this rank's cache folder.
    lockfile
        Resolve from this file, on rank 0, and ask no origin.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    began = time.monotonic()
    layout = CacheLayout(settings.cache_dir)

    def checked() -> RankRequest:
        # A cache that cannot be made is no error while nothing needs it: local sources are used where they are.
        with contextlib.suppress(OSError):
            prepare(layout, settings.cache_group)
        for tier in settings.cache_tiers:
            with contextlib.suppress(OSError):
                check(CacheLayout(tier))
        return _outside_cache(wish(), layout)

    mine, job = agree(coordinator, checked, settings)
    if lockfile is None:
        resolved = _resolve(coordinator, job, layout, settings)
    else:
        resolved = coordinator.once("resolve", lambda: _unlock(lockfile, job, layout, settings, coordinator))
    manifest, leaders = resolved.manifest, job.leaders
    delivered = deliver(coordinator, manifest, job, layout, settings, sure=lockfile is None)
    linking = time.monotonic()
    shown = LinkPlan.of(mine, resolved, layout)

    def link() -> tuple[int, ...] | None:
        if coordinator.rank in leaders:
            _show(layout, manifest, delivered.places)
        if coordinator.rank in job.links:
            make_links(LinkPlan.of(replace(mine, requests=job.links[coordinator.rank]), resolved, layout))

        return first_blocks(layout, manifest) if coordinator.rank in leaders else None

    def compare(said: Mapping[int, tuple[int, ...] | None]) -> tuple[int, ...]:
        return agree_on_blocks(manifest, {coordinator.names[rank]: blocks for rank, blocks in said.items()})

    blocks = coordinator.round("link", link, compare, {*leaders, *job.links}, job.role(coordinator.rank))
    sight = VisibilityCheck(blocks, settings.visibility_timeout if job.lag else 0.0, coordinator.check)

    def read_back() -> DomainResult | None:
        # A leader did so before it looked, and still is here. Elsewhere one lock for each of thousands of ranks would
        # be too many: there the leader's counts.
        if coordinator.rank not in leaders and is_on_local_disk(layout):
            tiers = [tier for tier in map(CacheLayout, settings.cache_tiers) if is_on_local_disk(tier)]
            hold_sources(layout, tiers, manifest, coordinator.check, settings.stall_timeout)
        check_readable(shown, resolved, sight)
        if coordinator.rank not in leaders:
            return None
        seconds = {**coordinator.seconds, "link": time.monotonic() - linking}
        return DomainResult.of(layout, manifest, delivered, seconds)

    report = coordinator.round(
        "link",
        read_back,
        lambda parts: summarise(coordinator.operation, job, manifest, parts, time.monotonic() - began),
    )
    return Collected(shown.paths, report, manifest)


def _unlock(
    path: Path, job: JobRequest, layout: CacheLayout, settings: Settings, coordinator: Coordinator
) -> Resolution:
    """Resolve from a lock file; what must be read for it comes from the cache if it is there."""

    def held(pinned: Pinned, file: File) -> bytes | None:
        # Its checksum is compared where it is staged.
        caches = (layout, *map(CacheLayout, settings.cache_tiers))
        there = next((cache for cache in caches if is_complete(cache, pinned, file)), None)
        return there.blob(pinned, file).read_bytes() if there else None

    return resolve(job.requests, settings, coordinator, Lockfile.load(path).origins(held))


def _resolve(coordinator: Coordinator, job: JobRequest, layout: CacheLayout, settings: Settings) -> Resolution:
    """Ask the origins on rank 0; when there is no way to them from there, on the leaders: one gateway is enough."""
    elsewhere = len(job.leaders) > 1
    origins = _origins(layout, settings)

    def ask() -> Resolution | None:
        try:
            return resolve(job.requests, settings, coordinator, origins, elsewhere=elsewhere)
        except OriginUnreachable:
            if not elsewhere:
                raise
            return None

    def first(found: Mapping[int, Resolution | None]) -> Resolution | None:
        return next((one for one in found.values() if one is not None), None)

    resolved = coordinator.round("resolve", ask, first, (0,))
    if resolved is None:
        others = [leader for leader in job.leaders if leader != 0]
        resolved = coordinator.round("resolve", ask, first, others, job.role(coordinator.rank))
    # Nobody gets there: rank 0 tries for as long as the settings say, and tells why not.
    return resolved or coordinator.once("resolve", lambda: resolve(job.requests, settings, coordinator, origins))


def _origins(layout: CacheLayout, settings: Settings) -> Callable[[str, Settings], Origin]:
    if not is_offline():
        return origin_for
    caches = (layout, *map(CacheLayout, settings.cache_tiers))
    return HubCacheOrigin.instead_of_the_hub([*(cache.hub for cache in caches), user_hub_cache()])


def _outside_cache(wish: RankRequest, layout: CacheLayout) -> RankRequest:
    if wish.into is not None and layout.owns(wish.into):
        raise BadRequest("the links would lie inside the cache, among its own files", subject=str(wish.into))
    return wish


def _show(layout: CacheLayout, manifest: Manifest, places: Mapping[Path, Path]) -> None:
    """Let the snapshots show what was published."""
    for pinned in manifest.sources:
        if not pinned.in_place:
            with at(phase="publish", subject=pinned.name):
                show(layout, pinned, places)
            record_staged(layout, pinned)
