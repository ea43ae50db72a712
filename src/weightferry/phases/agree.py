"""Phase 1, agree: every rank says what it wants, and all ranks learn which of them share storage."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.trust import check_cache_folder, prepare_cache_folder
from weightferry.cluster.coordinator import Coordinator
from weightferry.cluster.domains import FolderIdentity, StorageDomain, group_by_folder, merge_domains
from weightferry.cluster.machine import boot_id
from weightferry.cluster.storage_probe import READ_ONLY, ProbeResult, StorageProbe
from weightferry.errors import BadRequest, PlanMismatch, format_ranks
from weightferry.phases.job_request import JobRequest, RankDescription, RankRequest
from weightferry.settings import Settings
from weightferry.sources import SourceRequest


def agree(
    coordinator: Coordinator, make_request: Callable[[], RankRequest], settings: Settings
) -> tuple[RankRequest, JobRequest]:
    """Exchange what the ranks want, and find out which of them share storage; collective.

    Parameters
    ----------
    make_request
        Returns what this rank wants. An error that it raises fails the operation on every rank.

    Returns
    -------
    RankRequest, JobRequest
        What this rank wants, and what all ranks know.

    Raises
    ------
    CollectError
        The same on every rank; `PlanMismatch` when two ranks contradict each other.
    """
    rank, comparison = RankProbe(coordinator, settings), RequestComparison(coordinator.job_ranks)
    job: JobRequest = coordinator.run_phase("agree", lambda: rank.describe(make_request), comparison.compare)
    if job.probe_token:
        # Several machines may see some of the folders: a probe shows whether they do.
        probe = StorageProbe(job.probe_token, settings.visibility_timeout)
        try:
            probing = {*job.probe_caches, *job.probe_link_folders}
            job = coordinator.run_phase("agree", partial(rank.probe, job, probe), comparison.merge, probing)
        finally:
            probe.remove_files()
    return rank.request, job


def prepare_request(make_request: Callable[[], RankRequest], layout: CacheLayout, settings: Settings) -> RankRequest:
    """Prepare the cache folder of this rank, and return what this rank wants.

    Raises
    ------
    BadRequest
        The links would lie inside the cache, or the cache folder cannot be trusted.
    """
    # An unusable cache is no error until a file needs it: local sources are used where they are.
    with contextlib.suppress(OSError):
        prepare_cache_folder(layout, settings.cache_group)
    for tier in settings.cache_tiers:
        with contextlib.suppress(OSError):
            check_cache_folder(CacheLayout(tier))
    request = make_request()
    if request.link_folder is not None and layout.owns(request.link_folder):
        raise BadRequest(
            f"the links would lie inside the cache folder {layout.root}, among its own files; choose another folder",
            subject=str(request.link_folder),
        )
    return request


class RankProbe:
    """One rank's part of the phase."""

    def __init__(self, coordinator: Coordinator, settings: Settings) -> None:
        self._coordinator, self._settings = coordinator, settings
        self._cache_dir = settings.cache_dir
        self.request = RankRequest({})

    def describe(self, make_request: Callable[[], RankRequest]) -> RankDescription:
        """Make the request, and identify the folders of this rank."""
        self.request = make_request()
        link_folder = self.request.link_folder
        if link_folder is not None:
            link_folder.mkdir(parents=True, exist_ok=True)
        return RankDescription(
            self._coordinator.host,
            self._coordinator.node,
            self._identify_cache(),
            None if link_folder is None else FolderIdentity.of(link_folder),
            self.request.requests,
            self._settings.domain,
            self._identify_tiers(),
            self.request.copy,
        )

    def _identify_tiers(self) -> dict[Path, FolderIdentity]:
        found = {}
        for tier in self._settings.cache_tiers:
            with contextlib.suppress(OSError):
                found[tier] = FolderIdentity.of(tier)
        return found

    def _identify_cache(self) -> FolderIdentity:
        # An unusable cache is no error until a file needs it: local sources are used where they are.
        with contextlib.suppress(OSError):
            self._cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return FolderIdentity.of(self._cache_dir)
        except OSError:
            return FolderIdentity(boot_id(), -1, self._coordinator.rank)

    def probe(self, job: JobRequest, probe: StorageProbe) -> tuple[ProbeResult | None, ProbeResult | None]:
        """Probe this rank's cache folder and its folder for links; None for a folder that needs no probe."""
        rank, link_folder = self._coordinator.rank, self.request.link_folder
        cache = self._probe_folder(self._cache_dir, probe) if rank in job.probe_caches else None
        if link_folder is None or rank not in job.probe_link_folders:
            return cache, None
        return cache, self._probe_folder(link_folder, probe)

    def _probe_folder(self, folder: Path, probe: StorageProbe) -> ProbeResult | None:
        try:
            return probe.probe(folder, self._coordinator.rank, self._coordinator.check)
        except OSError as error:
            if error.errno in READ_ONLY:
                return None  # a rank that cannot write here downloads nothing and makes no links
            raise


class RequestComparison:
    """Rank 0's part of the phase: compare what the ranks said, and group the ranks by storage.

    Parameters
    ----------
    job_ranks
        By rank of the operation, the rank in the job.
    """

    def __init__(self, job_ranks: Sequence[int]) -> None:
        self._job_ranks = job_ranks
        self._descriptions: Mapping[int, RankDescription] = {}
        self._job = JobRequest((), (), {}, 0, 0)
        self._link_folders: tuple[StorageDomain, ...] = ()

    def compare(self, descriptions: Mapping[int, RankDescription]) -> JobRequest:
        """Group ranks by what is proven without a probe, and name the ranks that must probe."""
        self._descriptions = descriptions
        hosts = {rank: description.host for rank, description in descriptions.items()}
        domains = group_by_folder(
            {rank: description.cache for rank, description in descriptions.items()}, hosts, self._job_ranks
        )
        link_folders = group_by_folder(
            {rank: description.link_folder for rank, description in descriptions.items() if description.link_folder},
            hosts,
            self._job_ranks,
        )
        _check_domain_names(domains, descriptions, final=False)
        probe_caches, probe_link_folders = (_undecided(each) for each in (domains, link_folders))
        requests = (request for description in descriptions.values() for request in description.requests.values())
        self._job = JobRequest(
            requests=tuple(dict.fromkeys(requests)),
            domains=domains,
            links=self._links(link_folders),
            ranks=len(descriptions),
            nodes=len({description.node for description in descriptions.values()}),
            may_show_late=not all(domain.local for domain in (*domains, *link_folders)),
            copies=any(description.copy for description in descriptions.values()),
            tiers=_tiers_seen_by_all(domains, descriptions),
            probe_token=secrets.token_hex(8) if probe_caches or probe_link_folders else "",
            probe_caches=probe_caches,
            probe_link_folders=probe_link_folders,
        )
        self._link_folders = link_folders
        return self._job

    def merge(self, found: Mapping[int, tuple[ProbeResult | None, ProbeResult | None]]) -> JobRequest:
        """Join the domains whose probes met in one folder."""
        caches = {rank: cache for rank, (cache, _) in found.items() if cache is not None}
        link_folders = {rank: folder for rank, (_, folder) in found.items() if folder is not None}
        domains = merge_domains(self._job.domains, caches, self._job_ranks)
        _check_domain_names(domains, self._descriptions, final=True)
        links = self._links(merge_domains(self._link_folders, link_folders, self._job_ranks))
        tiers = _tiers_seen_by_all(domains, self._descriptions)
        return replace(self._job, domains=domains, links=links, tiers=tiers, probe_token="")

    def _links(self, link_folders: Sequence[StorageDomain]) -> dict[int, Mapping[str, SourceRequest]]:
        return {domain.leader: _union(domain, self._descriptions) for domain in link_folders}


def _tiers_seen_by_all(
    domains: Sequence[StorageDomain], descriptions: Mapping[int, RankDescription]
) -> dict[int, tuple[Path, ...]]:
    """Return by leader the tiers that all ranks of its domain see: links into any other tier would dangle for some."""

    def same(folder: FolderIdentity, other: FolderIdentity | None) -> bool:
        return folder == other or (other is not None and not folder.local and not other.local)

    return {
        domain.leader: tuple(
            path
            for path, folder in descriptions[domain.leader].tiers.items()
            if folder != descriptions[domain.leader].cache
            and all(same(folder, descriptions[rank].tiers.get(path)) for rank in domain.ranks)
        )
        for domain in domains
    }


def _undecided(domains: Sequence[StorageDomain]) -> tuple[int, ...]:
    """Return the leaders whose folders may be the same one: several, on file systems that other machines see."""
    shareable = tuple(domain.leader for domain in domains if not domain.local)
    return shareable if len(shareable) > 1 else ()


def _check_domain_names(
    domains: Sequence[StorageDomain], descriptions: Mapping[int, RankDescription], *, final: bool
) -> None:
    """Compare the names that users gave to domains with the domains that were found.

    Parameters
    ----------
    final
        Whether two domains are known to have different folders.
    """
    by_name: dict[str, StorageDomain] = {}
    for domain in domains:
        names = sorted({descriptions[rank].domain for rank in domain.ranks})
        if len(names) > 1:
            raise PlanMismatch(
                f"{_name(domain)} see one cache folder, but WEIGHTFERRY_DOMAIN "
                f"says {' and '.join(repr(name) for name in names)}"
            )
        other = by_name.setdefault(names[0], domain)
        if names[0] and other is not domain and (final or domain.local or other.local):
            raise PlanMismatch(
                f"WEIGHTFERRY_DOMAIN is {names[0]!r} for {_name(other)} and {_name(domain)}, but these are different "
                "cache folders"
            )


def _name(domain: StorageDomain) -> str:
    return f"ranks {format_ranks(list(domain.job_ranks))} on {domain.host}"


def _union(domain: StorageDomain, descriptions: Mapping[int, RankDescription]) -> dict[str, SourceRequest]:
    """Join what the ranks of one folder for links want there."""
    wanted: dict[str, tuple[int, SourceRequest]] = {}
    for rank, job_rank in zip(domain.ranks, domain.job_ranks, strict=True):
        if descriptions[rank].copy is not descriptions[domain.leader].copy:
            raise PlanMismatch(
                f"one folder, two strategies: ranks {format_ranks(sorted((domain.job_ranks[0], job_rank)))} on "
                f"{domain.host} use one collect_in, but only one of them wants copies; pass the same local_strategy"
            )
        for name, request in descriptions[rank].requests.items():
            first, other = wanted.setdefault(name, (rank, request))
            if other != request:
                first_job_rank = domain.job_ranks[domain.ranks.index(first)]
                raise PlanMismatch(
                    f"one link, two sources: {name or 'the folder'} is {other} on rank {first_job_rank} "
                    f"({descriptions[first].host}) and {request} on rank {job_rank} ({descriptions[rank].host})"
                )
    return {name: request for name, (_, request) in wanted.items()}
