"""Phase 2, resolve: one rank asks the origins, or a lock file, and every rank gets the manifest.

What the caches know of a commit is not asked for again. Where the Hub gives no answer, a branch is at the commit that
the caches of the job know.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.manifests import read_listings
from weightferry.cache.survey import is_complete, known_sha256
from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import OriginError, OriginUnreachable, Stalled
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.origins.access import DEFAULT_ACCESS, OriginAccess
from weightferry.origins.base import Origin, Unreachable
from weightferry.origins.hub_cache import HubCacheOrigin
from weightferry.origins.known_commits import KnownCommits, LookupRules, staged_on
from weightferry.origins.listing import KnownListings, Listing
from weightferry.origins.lockfile import Lockfile
from weightferry.origins.pin_sources import Resolution, pin_sources, requested_paths
from weightferry.phases.job_request import JobRequest
from weightferry.settings import Settings
from weightferry.sources import Source

logger = logging.getLogger(__name__)

_PATIENCE, _NEXT_PATIENCE = 1.5, 2.0
"""Seconds for the Hub to say to rank 0, then to the other leaders, at which commit a branch is that a cache knows. A
single leader has both together. Over a slow link (0.3 s for a round trip) name lookup, TCP, TLS and the answer take
1.5 s."""
_MAX_UNREQUESTED = 2000
"""Files of a listing that the ranks get although no rank wants them. A data set may have 100,000."""


def resolve(
    coordinator: Coordinator,
    job: JobRequest,
    settings: Settings,
    lockfile: Path | None,
    access: OriginAccess = DEFAULT_ACCESS,
) -> Resolution:
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
    resolution = _ask_leaders(coordinator, job, LeaderResolver(coordinator, job, settings, access))
    for fallback in resolution.fallbacks if coordinator.rank == 0 else ():
        source = fallback.listing.pinned.source
        logger.warning(
            "%s: the Hub gave no answer about %s (%s); using commit %s, staged on %s. To fail instead, set "
            "WEIGHTFERRY_OFFLINE_FALLBACK=0",
            replace(source, revision=None),
            source.revision or "main",
            fallback.reason,
            fallback.listing.pinned.commit,
            staged_on(fallback.listing),
        )
    return resolution


def _ask_leaders(coordinator: Coordinator, job: JobRequest, resolver: LeaderResolver) -> Resolution:
    """Ask on rank 0; without an answer on the other leaders, since one may have a network; then use the caches."""
    role, others = job.role(coordinator.rank), [leader for leader in job.leaders if leader != 0]
    answer = coordinator.run_phase("resolve", resolver.ask_first, _join, (0,))
    if answer.resolution is None:
        ask = partial(resolver.ask_next, answer)
        answer = coordinator.run_phase("resolve", ask, partial(_join, first=answer), others, role)
    if answer.resolution is None and answer.may_fall_back:
        fall_back = partial(resolver.fall_back, answer)
        answer = coordinator.run_phase("resolve", fall_back, partial(_join, first=answer), job.leaders, role)
    # No rank can resolve: rank 0 retries as often as the settings say, and reports why it failed.
    return answer.resolution or coordinator.run_on_rank0("resolve", partial(resolver.ask_with_retries, answer))


@dataclass(frozen=True)
class LeaderAnswer:
    """What one leader, or several together, found out.

    Attributes
    ----------
    resolution : Resolution or None
        None: an origin could not be reached.
    known : tuple of Listing
        What the caches know of the sources.
    hub_failure : str
        Why the Hub gave no answer; empty if it did, or was not asked.
    others_can_ask : bool
        Whether another leader may get an answer. False: the Hub itself failed.
    fallback_allowed : bool
        Whether the settings allow to use the commit of a branch that a cache knows.
    """

    resolution: Resolution | None
    known: tuple[Listing, ...] = ()
    hub_failure: str = ""
    others_can_ask: bool = True
    fallback_allowed: bool = True

    @property
    def may_fall_back(self) -> bool:
        """Whether the caches may have what the Hub did not answer."""
        return bool(self.known and self.hub_failure and self.fallback_allowed)


def _join(answers: Mapping[int, LeaderAnswer], first: LeaderAnswer | None = None) -> LeaderAnswer:
    """Join the answers of several leaders. A resolution of any of them is the resolution of the job."""
    each = [*([first] if first else ()), *answers.values()]
    resolution = next((answer.resolution for answer in each if answer.resolution), None)
    if resolution:
        return LeaderAnswer(resolution)  # the rest is of no use, and every rank would read it
    return LeaderAnswer(
        None,
        tuple(chain.from_iterable(answer.known for answer in each)),
        next((answer.hub_failure for answer in each if answer.hub_failure), ""),
        all(answer.others_can_ask for answer in each),
        all(answer.fallback_allowed for answer in each),
    )


class LeaderResolver:
    """One leader's part of the phase."""

    def __init__(self, coordinator: Coordinator, job: JobRequest, settings: Settings, access: OriginAccess) -> None:
        self._coordinator, self._job, self._settings, self._access = coordinator, job, settings, access
        self._several = len(job.leaders) > 1
        self._patience = min(settings.connect_timeout, _PATIENCE if self._several else _PATIENCE + _NEXT_PATIENCE)
        self._next_patience = min(settings.connect_timeout, _NEXT_PATIENCE)

    def ask_first(self) -> LeaderAnswer:
        """Ask on rank 0. Without an answer raise, unless there are other leaders."""
        hub = self._hub(LookupRules(self._patience, others_may_answer=self._several))
        try:
            return LeaderAnswer(self._pin(hub, other_ranks_can_ask=self._several))
        except OriginUnreachable:
            if not self._several:
                raise
            return self._no_answer(hub)

    def ask_next(self, first: LeaderAnswer) -> LeaderAnswer:
        """Ask on another leader, after rank 0 got no answer."""
        hub = self._hub(LookupRules(self._next_patience, others_may_answer=True), first.known)
        if first.others_can_ask:
            with contextlib.suppress(OriginUnreachable):
                return LeaderAnswer(self._pin(hub, other_ranks_can_ask=True))
        return self._no_answer(hub)

    def fall_back(self, answer: LeaderAnswer) -> LeaderAnswer:
        """Resolve from what the caches of all leaders know; no answer if an index of shards is in no cache here."""
        rules = LookupRules(self._next_patience, others_may_answer=True, hub_failure=answer.hub_failure)
        hub = self._hub(rules, answer.known)
        with contextlib.suppress(OriginError, Stalled):
            return LeaderAnswer(self._pin(hub, other_ranks_can_ask=True))
        return LeaderAnswer(None)

    def ask_with_retries(self, answer: LeaderAnswer) -> Resolution:
        """Ask on rank 0 as often as the settings say, and raise if there is no answer."""
        rules = LookupRules(self._next_patience, answer.fallback_allowed, hub_failure=answer.hub_failure)
        return self._pin(self._hub(rules, answer.known))

    def _no_answer(self, hub: KnownCommits) -> LeaderAnswer:
        sources = requested_paths(self._job.requests)
        found = [hub.known.find(source, paths) for source, paths in sources.items() if source.scheme == "hf"]
        return LeaderAnswer(
            None,
            tuple(listing.restricted() for listing in found if listing),
            str(hub.failure or ""),
            not hub.failure or isinstance(hub.failure, Unreachable),
            self._settings.offline_fallback,
        )

    def _hub(self, rules: LookupRules, known: Sequence[Listing] = ()) -> KnownCommits:
        caches = _caches(self._settings)
        listings = KnownListings(partial(_read_listings, caches), known)
        if not self._settings.offline_fallback:
            rules = replace(rules, use_known_branches=False)
        read_cached, create = partial(_read_cached, caches), self._access.create_origin
        return KnownCommits(listings, read_cached, rules, self._coordinator.check, create)

    def _pin(self, hub: KnownCommits, *, other_ranks_can_ask: bool = False) -> Resolution:
        requests, settings = self._job.requests, self._settings
        origins: Callable[[str, Settings], Origin] = hub.origins
        if reason := self._access.offline_reason:
            folders = [*(cache.hub for cache in _caches(settings)), self._access.user_cache]
            origins = HubCacheOrigin.replacing_the_hub(folders, reason, self._access.create_origin)
        with _advice(hub):
            resolution = pin_sources(
                requests, settings, self._coordinator, origins, other_ranks_can_ask=other_ranks_can_ask
            )
        return replace(
            resolution,
            listings=tuple(limit_listing(listing, resolution.manifest) for listing in hub.listings),
            fallbacks=tuple(hub.fallbacks),
            origin_answered=hub.origin_answered,
        )


@contextlib.contextmanager
def _advice(hub: KnownCommits) -> Iterator[None]:
    """Add to an error about the Hub what the user can change."""
    try:
        yield
    except (OriginError, Stalled) as error:
        if not (advice := hub.advice()):
            raise
        raise type(error)(f"{error}. {advice}", subject=error.subject) from error


def limit_listing(listing: Listing, manifest: Manifest, most: int = _MAX_UNREQUESTED) -> Listing:
    """Return a listing without the files that no rank wants, if they are more than `most`. Every rank receives it."""
    requested = {file for pinned in manifest.sources for file in pinned.files}
    wanted = tuple(file for file in listing.pinned.files if file in requested)
    if len(listing.pinned.files) - len(wanted) <= most:
        return listing
    paths = tuple(file.path for file in wanted)  # of the other paths nothing is said any more
    return replace(listing, pinned=replace(listing.pinned, files=wanted), paths=paths)


def _read_lockfile(coordinator: Coordinator, job: JobRequest, settings: Settings, path: Path) -> Resolution:
    origins = Lockfile.load(path).origins(partial(_read_cached, _caches(settings)))
    return replace(pin_sources(job.requests, settings, coordinator, origins), origin_answered=False)


def _read_cached(caches: Sequence[CacheLayout], pinned: PinnedSource, file: File) -> bytes | None:
    """Return the content of a file that must be read to resolve, if a cache has it with the right checksum."""
    for cache in caches:
        if is_complete(cache, pinned, file) and known_sha256(cache, pinned, file) is not None:
            return cache.blob(pinned, file).read_bytes()
    return None


def _read_listings(caches: Sequence[CacheLayout], source: Source) -> Iterator[Listing]:
    return chain.from_iterable(read_listings(cache, source) for cache in caches)


def _caches(settings: Settings) -> tuple[CacheLayout, ...]:
    return (CacheLayout(settings.cache_dir), *map(CacheLayout, settings.cache_tiers))
