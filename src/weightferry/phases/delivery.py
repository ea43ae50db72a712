"""Survey, plan, transfer and publish: until every domain has every file, and the right one."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import exclusion
from weightferry.cache.locks import FileLocks, LockTimeouts
from weightferry.cache.space import make_room
from weightferry.cache.survey import CacheSurveyor, DomainSurvey
from weightferry.cache.usage import hold_sources
from weightferry.cluster.coordinator import Coordinator
from weightferry.manifest import File, Manifest, Pinned
from weightferry.origins.hub_cache import cached_blob, is_offline, user_hub_cache
from weightferry.phases.agree import JobRequest
from weightferry.report.progress import shown
from weightferry.settings import Settings
from weightferry.transfer.origin_reader import unreachable
from weightferry.transfer.plan import TransferTask, plan
from weightferry.transfer.task import TransferResult, bring
from weightferry.transfer.verify_results import verify_results

logger = logging.getLogger(__name__)

_ATTEMPTS = 2  # wrong bytes are asked for once more


@dataclass
class DomainState:
    """What one leader found in its cache and did about the rest; empty on other ranks.

    Attributes
    ----------
    held : mapping of int to str
        The files that were whole, by their place in `Manifest.staged()`, with their SHA-256 or an empty text.
    brought : Brought
        All transfers together.
    places : mapping of Path to Path
        By where content would be in the cache, where it is instead, in a tier.
    locks : str
        By what others were kept out: ``flock``, or why not by that.
    """

    held: Mapping[int, str] = field(default_factory=dict)
    results: TransferResult = field(default_factory=TransferResult)
    places: Mapping[Path, Path] = field(default_factory=dict)
    locks: str = ""


def deliver(
    coordinator: Coordinator,
    manifest: Manifest,
    job: JobRequest,
    layout: CacheLayout,
    settings: Settings,
    *,
    sure: bool = True,
) -> DomainState:
    """Bring to every domain what it lacks; every rank calls it.

    Parameters
    ----------
    sure
        The origins were reached just now. Otherwise each leader asks before anything starts, also one alone.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    tiers = [CacheLayout(tier) for tier in job.tiers.get(coordinator.rank, ())]
    surveyor = CacheSurveyor(layout, manifest, _locks(coordinator, job, layout, settings), tiers, _users(layout))
    delivery = _Delivery(coordinator, manifest, job, surveyor, settings, sure=sure)
    with contextlib.ExitStack() as over:
        over.callback(surveyor.release)
        if coordinator.rank == 0:
            over.enter_context(shown(coordinator.seen, delivery.hosts))
        doubted: Collection[int] = ()
        for attempt in range(1, _ATTEMPTS + 1):
            surveys = delivery.survey(doubted)
            if delivery.is_complete(surveys):
                break
            doubted = delivery.transfer(surveys, attempt)
            if not doubted:
                break
    return delivery.mine


def _locks(coordinator: Coordinator, job: JobRequest, layout: CacheLayout, settings: Settings) -> FileLocks:
    patience = LockTimeouts(
        settings.lock_timeout, settings.beat_timeout + settings.visibility_timeout, settings.beat_interval
    )
    found = None
    if coordinator.rank in job.leaders:
        found = exclusion(layout, across=job.domain_of(coordinator.rank).excludes)
        if not found.by_flock:
            logger.warning("%s: %s: files take the place of locks, and nothing is evicted", layout.root, found.why)
    return FileLocks(patience, coordinator.check, found)


def _users(layout: CacheLayout) -> Callable[[Pinned, File], Path | None]:
    """Return what says where the user's Hugging Face cache would have a file; nowhere when that is this cache."""
    folder = user_hub_cache()
    own = folder.resolve() == layout.hub.resolve()

    def path(pinned: Pinned, file: File) -> Path | None:
        there = not own and pinned.source.scheme == "hf" and file.checksum
        return cached_blob(folder, pinned.source, file.key) if there else None

    return path


class _Delivery:
    """The rounds of a delivery, as one rank takes part in them."""

    def __init__(
        self,
        coordinator: Coordinator,
        manifest: Manifest,
        job: JobRequest,
        surveyor: CacheSurveyor,
        settings: Settings,
        *,
        sure: bool,
    ) -> None:
        self._coordinator, self._manifest, self._surveyor, self._settings = coordinator, manifest, surveyor, settings
        self._leaders, self._role = job.leaders, job.role(coordinator.rank)
        self.hosts = {domain.leader: domain.host for domain in job.domains}
        self._who = {leader: f"rank {coordinator.names[leader]} ({host})" for leader, host in self.hosts.items()}
        self._asks = not sure or is_offline() or len(self._leaders) > 1
        self.mine = DomainState(locks=str(surveyor.exclusion))
        self._whole: Mapping[int, str] = {}

    def survey(self, doubted: Collection[int]) -> Mapping[int, DomainSurvey]:
        """Survey every domain at once; when another job holds locks, one after the other.

        The order is one that all jobs share. So no two of them ever wait for each other: whoever waits holds only
        locks of domains that come before.
        """
        surveys: Mapping[int, DomainSurvey] = self._coordinator.round(
            "survey", lambda: self._look(doubted), _compact, self._leaders, self._role
        )
        if any(survey.busy for survey in surveys.values()):
            self._surveyor.release()
            for leader in sorted(surveys, key=lambda leader: surveys[leader].cache):
                surveys = {**surveys, **self._coordinator.round("survey", self._wait, dict, (leader,), self._role)}
        self.mine.held = self.mine.held or self._whole
        own = self._surveyor.layout
        self.mine.places = {own.blob(*self._surveyor.files[i]): path for i, path in self._surveyor.places.items()}
        self._coordinator.seconds.setdefault("transfer", 0.0)
        return surveys

    def _wait(self) -> DomainSurvey:
        with self._coordinator.paused("waits for another job that brings the same files"):
            return self._look((), wait=True)

    def _look(self, doubted: Collection[int], *, wait: bool = False) -> DomainSurvey:
        # Before anything is looked at: nobody evicts it from here on.
        surveyor, limit = self._surveyor, self._settings.stall_timeout
        hold_sources(surveyor.layout, surveyor.tiers, self._manifest, self._coordinator.check, limit)
        seen = self._surveyor.survey(wait=wait, doubted=doubted)
        self._whole = seen.whole
        there = {*seen.whole, *seen.nearby}
        missing = [index for index in range(len(self._surveyor.files)) if index not in there]
        if not seen.busy:  # else another job takes the space, and brings them
            lacking = [self._surveyor.files[index] for index in self._lacking()]
            make_room(self._surveyor, lacking, self._settings, self._coordinator.check)
        cannot = unreachable(self._manifest, missing, self._settings) if self._asks else {}
        # The others need the SHA-256 only where the manifest promises nothing.
        whole = {i: "" if self._surveyor.files[i][1].checksum else text for i, text in seen.whole.items()}
        return replace(seen, whole=whole, unreachable=cannot)

    def _lacking(self) -> tuple[int, ...]:
        return tuple(index for index in self._manifest.contents() if index not in self._whole)

    def is_complete(self, surveys: Mapping[int, DomainSurvey]) -> bool:
        """Whether every domain has every file, and the same bytes; every rank concludes the same from the same."""
        whole = all(len(survey.whole) == len(self._surveyor.files) for survey in surveys.values())
        nothing = dict.fromkeys(surveys, TransferResult())
        return whole and not verify_results(self._manifest, surveys, nothing, self._who, final=False)

    def transfer(self, surveys: Mapping[int, DomainSurvey], attempt: int) -> tuple[int, ...]:
        """Bring what is missing; return the files that came wrong, and are to be brought once more."""

        def work() -> TransferResult:
            task = TransferTask(plan(self._manifest, surveys), self._lacking(), self.hosts, attempt)
            results = bring(task, self._surveyor, self._settings, self._coordinator)
            self.mine.results += results
            return results

        def verdict(results: Mapping[int, TransferResult]) -> tuple[int, ...]:
            return verify_results(self._manifest, surveys, results, self._who, final=attempt == _ATTEMPTS)

        return self._coordinator.round("transfer", work, verdict, self._leaders, self._role)


def _compact(surveys: Mapping[int, DomainSurvey]) -> dict[int, DomainSurvey]:
    """Let equal surveys be one object: thousands of ranks read the pickle of all of them."""
    seen: dict[bytes, DomainSurvey] = {}
    return {leader: seen.setdefault(pickle.dumps(survey), survey) for leader, survey in surveys.items()}
