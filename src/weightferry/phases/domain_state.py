"""What one rank keeps from the survey of its cache to the end of the transfer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import detect_lock_support
from weightferry.cache.locks import FileLocks, LockTimeouts
from weightferry.cache.survey import CacheSurveyor
from weightferry.cluster.coordinator import Coordinator
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.origins.access import DEFAULT_ACCESS, OriginAccess
from weightferry.origins.hub_cache import cached_blob
from weightferry.phases.job_request import JobRequest
from weightferry.report.progress import show_progress
from weightferry.settings import Settings
from weightferry.transfer.run_transfer import TransferResult

logger = logging.getLogger(__name__)


@dataclass
class DomainState:
    """The cache of one leader's domain during an operation. Other ranks have one too, and do not change it.

    Attributes
    ----------
    job : JobRequest
        What the ranks agreed on.
    manifest : Manifest
        The files that every domain needs.
    surveyor : CacheSurveyor
        Of the cache folder of this rank; holds its locks.
    settings : Settings
    role : str
        Of this rank, for errors.
    probe_origins : bool
        Whether the leaders must test if they reach the origins: more than one leader could read, or no origin has
        answered in this call.
    peers_first : bool
        Whether they test it only for files that no domain has. So a job whose manifest came from a cache or a lock
        file, and whose files some domain has, asks nothing of an origin, and waits for none that is gone.
    complete : mapping of int to str
        The files that the last survey found complete, by their index in `Manifest.staged()`, with their SHA-256 or an
        empty text.
    in_user_cache : collection of int
        The missing files that the user's Hugging Face cache seems to have, as the last survey found.
    already_there : mapping of int to str
        The same, of the first survey.
    transferred : TransferResult
        All transfers together.
    tier_paths : mapping of Path to Path
        By the path that content would have in the cache, its path in a read-only tier.
    access : OriginAccess
        How this rank uses origins.
    """

    job: JobRequest
    manifest: Manifest
    surveyor: CacheSurveyor
    settings: Settings
    role: str
    probe_origins: bool
    peers_first: bool = False
    complete: Mapping[int, str] = field(default_factory=dict)
    in_user_cache: Collection[int] = ()
    already_there: Mapping[int, str] = field(default_factory=dict)
    transferred: TransferResult = field(default_factory=TransferResult)
    tier_paths: Mapping[Path, Path] = field(default_factory=dict)
    access: OriginAccess = DEFAULT_ACCESS

    @property
    def hosts(self) -> dict[int, str]:
        """By leader, its host name."""
        return {domain.leader: domain.host for domain in self.job.domains}

    def missing(self) -> tuple[int, ...]:
        """Return the files that this domain lacks, each content once."""
        return tuple(index for index in self.manifest.contents() if index not in self.complete)


@contextlib.contextmanager
def open_domain(
    coordinator: Coordinator,
    job: JobRequest,
    manifest: Manifest,
    settings: Settings,
    *,
    origin_reachable: bool,
    access: OriginAccess = DEFAULT_ACCESS,
) -> Iterator[DomainState]:
    """Open the cache of this rank's domain; its locks are released when the context ends.

    Rank 0 shows the progress of the job meanwhile.

    Parameters
    ----------
    origin_reachable
        An origin answered in this call, so a single leader need not test whether it reaches the origins.
    """
    layout = CacheLayout(settings.cache_dir)
    tiers = [CacheLayout(tier) for tier in job.tiers.get(coordinator.rank, ())]
    locks = _locks(coordinator, job, layout, settings)
    surveyor = CacheSurveyor(layout, manifest, locks, tiers, _user_cache(layout, access.user_cache))
    probe_origins = not origin_reachable or bool(access.offline_reason) or len(job.leaders) > 1
    role = job.role(coordinator.rank)
    state = DomainState(
        job, manifest, surveyor, settings, role, probe_origins, peers_first=not origin_reachable, access=access
    )
    with contextlib.ExitStack() as stack:
        stack.callback(surveyor.release)
        if coordinator.rank == 0:
            stack.enter_context(show_progress(coordinator.job_progress, state.hosts))
        yield state


def _locks(coordinator: Coordinator, job: JobRequest, layout: CacheLayout, settings: Settings) -> FileLocks:
    timeouts = LockTimeouts(
        settings.lock_timeout, settings.beat_timeout + settings.visibility_timeout, settings.beat_interval
    )
    support = None
    if coordinator.rank in job.leaders:
        support = detect_lock_support(layout, across_machines=job.domain_of(coordinator.rank).flock_excludes)
        if not support.flock_works:
            logger.warning(
                "%s: %s: files replace the locks of the kernel, and nothing is evicted", layout.root, support.reason
            )
    return FileLocks(timeouts, coordinator.check, support)


def _user_cache(layout: CacheLayout, folder: Path) -> Callable[[PinnedSource, File], Path | None]:
    """Return a function from a file to its path in the user's Hugging Face cache; None if this cache is that cache."""
    is_own = folder.resolve() == layout.hub.resolve()

    def path(pinned: PinnedSource, file: File) -> Path | None:
        usable = not is_own and pinned.source.scheme == "hf" and file.checksum
        return cached_blob(folder, pinned.source, file.key) if usable else None

    return path
