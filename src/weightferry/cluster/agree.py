"""What every rank wants, and who shares storage with whom: compared, and contradictions are an error."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from weightferry.cluster.control import Control
from weightferry.cluster.domains import READ_ONLY, Domain, Meeting, Met, Place, group, merge
from weightferry.cluster.topology import boot_id
from weightferry.errors import PlanMismatch, ranges
from weightferry.settings import Settings
from weightferry.sources import Ask


@dataclass(frozen=True)
class Wish:
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

    asks: Mapping[str, Ask]
    into: Path | None = None
    suffix: str | None = None


@dataclass(frozen=True)
class Introduction:
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
    cache: Place
    into: Place | None
    asks: Mapping[str, Ask]
    domain: str = ""
    tiers: Mapping[Path, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreed:
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

    asks: tuple[Ask, ...]
    domains: tuple[Domain, ...]
    links: Mapping[int, Mapping[str, Ask]]
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

    def domain_of(self, rank: int) -> Domain:
        """The domain that `rank` belongs to."""
        return next(domain for domain in self.domains if rank in domain.ranks)

    def role(self, rank: int) -> str:
        """What `rank` is, for readers of an error."""
        return next((domain.role for domain in self.domains if domain.leader == rank), "")


def agree(control: Control, wish: Callable[[], Wish], settings: Settings) -> tuple[Wish, Agreed]:
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
    mine, comparing = Mine(control, settings), Comparing(control.names)
    agreed: Agreed = control.round("agree", lambda: mine.introduce(wish), comparing.introduced)
    if agreed.token:
        # Folders that several machines may see: whether they do is tried.
        meeting = Meeting(agreed.token, settings.visibility_timeout)
        try:
            askers, meet = {*agreed.caches, *agreed.folders}, partial(mine.meet, agreed, meeting)
            agreed = control.round("agree", meet, comparing.met, askers)
        finally:
            meeting.end()
    return mine.wish, agreed


class Mine:
    """What one rank does in it."""

    def __init__(self, control: Control, settings: Settings) -> None:
        self._control, self._settings = control, settings
        self._cache_dir = settings.cache_dir
        self.wish = Wish({})

    def introduce(self, wish: Callable[[], Wish]) -> Introduction:
        """Make the wish, and look at the folders."""
        self.wish = wish()
        into = self.wish.into
        if into is not None:
            into.mkdir(parents=True, exist_ok=True)
        return Introduction(
            self._control.host,
            self._control.node,
            self._cache_place(),
            None if into is None else Place.of(into),
            self.wish.asks,
            self._settings.domain,
            self._tiers(),
        )

    def _tiers(self) -> dict[Path, Place]:
        found = {}
        for tier in self._settings.cache_tiers:
            with contextlib.suppress(OSError):
                found[tier] = Place.of(tier)
        return found

    def _cache_place(self) -> Place:
        # A cache that cannot be made is no error while nothing needs it: local sources are used where they are.
        with contextlib.suppress(OSError):
            self._cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return Place.of(self._cache_dir)
        except OSError:
            return Place(boot_id(), -1, self._control.rank)

    def meet(self, agreed: Agreed, meeting: Meeting) -> tuple[Met | None, Met | None]:
        """Find out whose file is in this rank's cache folder, and in its folder of links; None where nobody asks."""
        rank, into = self._control.rank, self.wish.into
        cache = self._at(self._cache_dir, meeting) if rank in agreed.caches else None
        return cache, self._at(into, meeting) if into is not None and rank in agreed.folders else None

    def _at(self, folder: Path, meeting: Meeting) -> Met | None:
        try:
            return meeting.at(folder, self._control.rank, self._control.check)
        except OSError as error:
            if error.errno in READ_ONLY:
                return None  # who cannot write here brings nothing, and makes no links
            raise


class Comparing:
    """Rank 0's part: what follows from what all ranks said.

    Parameters
    ----------
    names
        By rank of the operation, the rank in the job.
    """

    def __init__(self, names: Sequence[int]) -> None:
        self._names = names
        self._said: Mapping[int, Introduction] = {}
        self._agreed = Agreed((), (), {}, 0, 0)
        self._folders: tuple[Domain, ...] = ()

    def introduced(self, said: Mapping[int, Introduction]) -> Agreed:
        """Group ranks by what is proven, and say what is to be found out."""
        self._said = said
        hosts = {rank: one.host for rank, one in said.items()}
        domains = group({rank: one.cache for rank, one in said.items()}, hosts, self._names)
        folders = group({rank: one.into for rank, one in said.items() if one.into}, hosts, self._names)
        _check_domains(domains, said, final=False)
        caches, into = (_in_question(each) for each in (domains, folders))
        self._agreed = Agreed(
            asks=tuple(dict.fromkeys(ask for one in said.values() for ask in one.asks.values())),
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

    def met(self, found: Mapping[int, tuple[Met | None, Met | None]]) -> Agreed:
        """Join what turned out to be one folder."""
        caches = {rank: cache for rank, (cache, _) in found.items() if cache is not None}
        folders = {rank: folder for rank, (_, folder) in found.items() if folder is not None}
        domains = merge(self._agreed.domains, caches, self._names)
        _check_domains(domains, self._said, final=True)
        links = self._links(merge(self._folders, folders, self._names))
        return replace(self._agreed, domains=domains, links=links, tiers=_seen_by_all(domains, self._said), token="")

    def _links(self, folders: Sequence[Domain]) -> dict[int, Mapping[str, Ask]]:
        return {domain.leader: _union(domain, self._said) for domain in folders}


def _seen_by_all(domains: Sequence[Domain], said: Mapping[int, Introduction]) -> dict[int, tuple[Path, ...]]:
    """By leader, the tiers that all ranks of its domain see: links into others would lead nowhere for some."""

    def same(one: Place, other: Place | None) -> bool:
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


def _in_question(domains: Sequence[Domain]) -> tuple[int, ...]:
    shareable = tuple(domain.leader for domain in domains if not domain.local)
    return shareable if len(shareable) > 1 else ()


def _check_domains(domains: Sequence[Domain], said: Mapping[int, Introduction], *, final: bool) -> None:
    """Compare what the user says of domains with what is known.

    Parameters
    ----------
    final
        Whether folders that are not in one domain are known to be different.
    """
    by_name: dict[str, Domain] = {}
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


def _union(domain: Domain, introductions: Mapping[int, Introduction]) -> dict[str, Ask]:
    """Join what the ranks of one folder of links want there."""
    wanted: dict[str, tuple[int, Ask]] = {}
    for rank, name_of in zip(domain.ranks, domain.names, strict=True):
        for name, ask in introductions[rank].asks.items():
            first, other = wanted.setdefault(name, (rank, ask))
            if other != ask:
                first_name = domain.names[domain.ranks.index(first)]
                raise PlanMismatch(
                    f"one link, two sources: {name or 'the folder'} is {other} on rank {first_name} "
                    f"({introductions[first].host}) and {ask} on rank {name_of} ({introductions[rank].host})"
                )
    return {name: ask for name, (_, ask) in wanted.items()}
