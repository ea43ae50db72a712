"""What every rank wants, and who shares storage with whom: compared, and contradictions are an error."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from weightferry.cluster.coordinator import Coordinator
from weightferry.cluster.domains import (
    READ_ONLY,
    FolderIdentity,
    ProbeResult,
    StorageDomain,
    StorageProbe,
    group,
    merge,
)
from weightferry.cluster.topology import boot_id
from weightferry.errors import PlanMismatch, ranges
from weightferry.settings import Settings
from weightferry.sources import SourceRequest


@dataclass(frozen=True)
class RankRequest:
    """What one rank wants of an operation.

    Attributes
    ----------
    asks : mapping of str to Ask
        By name.
    into : Path or None
        Absolute path of the folder for links; None: no links.
    suffix : str or None
        The link of an ask is its name and this; None: the files are linked under their own paths.
    """

    requests: Mapping[str, SourceRequest]
    into: Path | None = None
    suffix: str | None = None


@dataclass(frozen=True)
class RankDescription:
    """What one rank tells the others.

    Attributes
    ----------
    host, node
        Its host name, and the name of its node.
    cache, into
        Its cache folder, and the folder for its links.
    asks
        What it wants, by name.
    domain
        Of its cache, where the user says it.
    tiers
        The other caches that it sees.
    """

    host: str
    node: str
    cache: FolderIdentity
    into: FolderIdentity | None
    requests: Mapping[str, SourceRequest]
    domain: str = ""
    tiers: Mapping[Path, FolderIdentity] = field(default_factory=dict)


@dataclass(frozen=True)
class JobRequest:
    """What all ranks know after the phase agree.

    Attributes
    ----------
    asks : tuple of Ask
        The union of what is wanted, in the order of ranks.
    domains : tuple of Domain
        By cache folder.
    links : mapping of int to (mapping of str to Ask)
        By the one rank that makes the links of a folder: what all ranks together want linked there.
    ranks, nodes : int
        How many.
    lag : bool
        Whether files may show late: some folder is on a file system that other machines see too.
    tiers : mapping of int to (tuple of Path)
        By leader, the other caches that every rank of its domain sees.
    token : str
        Names a meeting; empty when nothing is left to find out.
    caches, folders : tuple of int
        Leaders that are to find out whether they see one cache folder, and ranks that are to find out whether they see
        one folder of links.
    """

    requests: tuple[SourceRequest, ...]
    domains: tuple[StorageDomain, ...]
    links: Mapping[int, Mapping[str, SourceRequest]]
    ranks: int
    nodes: int
    lag: bool = False
    tiers: Mapping[int, tuple[Path, ...]] = field(default_factory=dict)
    token: str = ""
    caches: tuple[int, ...] = ()
    folders: tuple[int, ...] = ()

    @property
    def leaders(self) -> tuple[int, ...]:
        """The leader of each domain."""
        return tuple(domain.leader for domain in self.domains)

    def domain_of(self, rank: int) -> StorageDomain:
        """The domain that `rank` belongs to."""
        return next(domain for domain in self.domains if rank in domain.ranks)

    def role(self, rank: int) -> str:
        """What `rank` is, for readers of an error."""
        return next((domain.role for domain in self.domains if domain.leader == rank), "")


def agree(
    coordinator: Coordinator, wish: Callable[[], RankRequest], settings: Settings
) -> tuple[RankRequest, JobRequest]:
    """Introduce this rank, and find out with the others who shares storage; every rank calls it.

    Parameters
    ----------
    wish
        Makes what this rank wants; what it raises fails the operation on every rank.

    Returns
    -------
    Wish, Agreed
        What this rank wants, and what all know.

    Raises
    ------
    CollectError
        The same on every rank; `PlanMismatch` when two of them contradict each other.
    """
    mine, comparing = RankProbe(coordinator, settings), RequestComparison(coordinator.names)
    job: JobRequest = coordinator.round("agree", lambda: mine.introduce(wish), comparing.introduced)
    if job.token:
        # Folders that several machines may see: whether they do is tried.
        meeting = StorageProbe(job.token, settings.visibility_timeout)
        try:
            askers, meet = {*job.caches, *job.folders}, partial(mine.meet, job, meeting)
            job = coordinator.round("agree", meet, comparing.met, askers)
        finally:
            meeting.end()
    return mine.wish, job


class RankProbe:
    """What one rank does in it."""

    def __init__(self, coordinator: Coordinator, settings: Settings) -> None:
        self._coordinator, self._settings = coordinator, settings
        self._cache_dir = settings.cache_dir
        self.wish = RankRequest({})

    def introduce(self, wish: Callable[[], RankRequest]) -> RankDescription:
        """Make the wish, and look at the folders."""
        self.wish = wish()
        into = self.wish.into
        if into is not None:
            into.mkdir(parents=True, exist_ok=True)
        return RankDescription(
            self._coordinator.host,
            self._coordinator.node,
            self._cache_place(),
            None if into is None else FolderIdentity.of(into),
            self.wish.requests,
            self._settings.domain,
            self._tiers(),
        )

    def _tiers(self) -> dict[Path, FolderIdentity]:
        found = {}
        for tier in self._settings.cache_tiers:
            with contextlib.suppress(OSError):
                found[tier] = FolderIdentity.of(tier)
        return found

    def _cache_place(self) -> FolderIdentity:
        # A cache that cannot be made is no error while nothing needs it: local sources are used where they are.
        with contextlib.suppress(OSError):
            self._cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return FolderIdentity.of(self._cache_dir)
        except OSError:
            return FolderIdentity(boot_id(), -1, self._coordinator.rank)

    def meet(self, job: JobRequest, meeting: StorageProbe) -> tuple[ProbeResult | None, ProbeResult | None]:
        """Find out whose file is in this rank's cache folder, and in its folder of links; None where nobody asks."""
        rank, into = self._coordinator.rank, self.wish.into
        cache = self._at(self._cache_dir, meeting) if rank in job.caches else None
        return cache, self._at(into, meeting) if into is not None and rank in job.folders else None

    def _at(self, folder: Path, meeting: StorageProbe) -> ProbeResult | None:
        try:
            return meeting.at(folder, self._coordinator.rank, self._coordinator.check)
        except OSError as error:
            if error.errno in READ_ONLY:
                return None  # who cannot write here brings nothing, and makes no links
            raise


class RequestComparison:
    """Rank 0's part: what follows from what all ranks said.

    Parameters
    ----------
    names
        By rank of the operation, the rank in the job.
    """

    def __init__(self, names: Sequence[int]) -> None:
        self._names = names
        self._said: Mapping[int, RankDescription] = {}
        self._agreed = JobRequest((), (), {}, 0, 0)
        self._folders: tuple[StorageDomain, ...] = ()

    def introduced(self, said: Mapping[int, RankDescription]) -> JobRequest:
        """Group ranks by what is proven, and say what is to be found out."""
        self._said = said
        hosts = {rank: one.host for rank, one in said.items()}
        domains = group({rank: one.cache for rank, one in said.items()}, hosts, self._names)
        folders = group({rank: one.into for rank, one in said.items() if one.into}, hosts, self._names)
        _check_domains(domains, said, final=False)
        caches, into = (_in_question(each) for each in (domains, folders))
        self._agreed = JobRequest(
            requests=tuple(dict.fromkeys(request for one in said.values() for request in one.requests.values())),
            domains=domains,
            links=self._links(folders),
            ranks=len(said),
            nodes=len({one.node for one in said.values()}),
            lag=not all(domain.local for domain in (*domains, *folders)),
            tiers=_seen_by_all(domains, said),
            token=secrets.token_hex(8) if caches or into else "",
            caches=caches,
            folders=into,
        )
        self._folders = folders
        return self._agreed

    def met(self, found: Mapping[int, tuple[ProbeResult | None, ProbeResult | None]]) -> JobRequest:
        """Join what turned out to be one folder."""
        caches = {rank: cache for rank, (cache, _) in found.items() if cache is not None}
        folders = {rank: folder for rank, (_, folder) in found.items() if folder is not None}
        domains = merge(self._agreed.domains, caches, self._names)
        _check_domains(domains, self._said, final=True)
        links = self._links(merge(self._folders, folders, self._names))
        return replace(self._agreed, domains=domains, links=links, tiers=_seen_by_all(domains, self._said), token="")

    def _links(self, folders: Sequence[StorageDomain]) -> dict[int, Mapping[str, SourceRequest]]:
        return {domain.leader: _union(domain, self._said) for domain in folders}


def _seen_by_all(domains: Sequence[StorageDomain], said: Mapping[int, RankDescription]) -> dict[int, tuple[Path, ...]]:
    """By leader, the tiers that all ranks of its domain see: links into others would lead nowhere for some."""

    def same(one: FolderIdentity, other: FolderIdentity | None) -> bool:
        return one == other or (other is not None and not one.local and not other.local)

    return {
        domain.leader: tuple(
            path
            for path, place in said[domain.leader].tiers.items()
            if place != said[domain.leader].cache
            and all(same(place, said[rank].tiers.get(path)) for rank in domain.ranks)
        )
        for domain in domains
    }


def _in_question(domains: Sequence[StorageDomain]) -> tuple[int, ...]:
    shareable = tuple(domain.leader for domain in domains if not domain.local)
    return shareable if len(shareable) > 1 else ()


def _check_domains(domains: Sequence[StorageDomain], said: Mapping[int, RankDescription], *, final: bool) -> None:
    """Compare what the user says of domains with what is known.

    Parameters
    ----------
    final
        Whether folders that are not in one domain are known to be different.
    """
    by_name: dict[str, StorageDomain] = {}
    for domain in domains:
        named = sorted({said[rank].domain for rank in domain.ranks})
        if len(named) > 1:
            raise PlanMismatch(
                f"ranks {ranges(list(domain.names))} on {domain.host} see one cache folder, but WEIGHTFERRY_DOMAIN "
                f"says {' and '.join(repr(name) for name in named)}"
            )
        other = by_name.setdefault(named[0], domain)
        if named[0] and other is not domain and (final or domain.local or other.local):
            raise PlanMismatch(
                f"WEIGHTFERRY_DOMAIN is {named[0]!r} for ranks {ranges(list(other.names))} on {other.host} and ranks "
                f"{ranges(list(domain.names))} on {domain.host}, but their cache folders are different ones"
            )


def _union(domain: StorageDomain, introductions: Mapping[int, RankDescription]) -> dict[str, SourceRequest]:
    """Join what the ranks of one folder of links want there."""
    wanted: dict[str, tuple[int, SourceRequest]] = {}
    for rank, name_of in zip(domain.ranks, domain.names, strict=True):
        for name, request in introductions[rank].requests.items():
            first, other = wanted.setdefault(name, (rank, request))
            if other != request:
                first_name = domain.names[domain.ranks.index(first)]
                raise PlanMismatch(
                    f"one link, two sources: {name or 'the folder'} is {other} on rank {first_name} "
                    f"({introductions[first].host}) and {request} on rank {name_of} ({introductions[rank].host})"
                )
    return {name: request for name, (_, request) in wanted.items()}
