"""What every rank wants, compared: the union is staged, contradictions are an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightferry.cluster.control import Control
from weightferry.cluster.domains import Domain, Place, group
from weightferry.cluster.topology import boot_id
from weightferry.errors import PlanMismatch
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
    """

    host: str
    node: str
    cache: Place
    into: Place | None
    asks: Mapping[str, Ask]

    @classmethod
    def maker(cls, wish: Callable[[], Wish], cache_dir: Path, control: Control) -> _Maker:
        """Prepare an introduction, to be made inside the round so that its errors travel."""
        return _Maker(wish, cache_dir, control)


class _Maker:
    def __init__(self, wish: Callable[[], Wish], cache_dir: Path, control: Control) -> None:
        self._make, self._cache_dir, self._control = wish, cache_dir, control
        self.wish = Wish({})

    def introduce(self) -> Introduction:
        self.wish = self._make()
        into = self.wish.into
        if into is not None:
            into.mkdir(parents=True, exist_ok=True)
        return Introduction(
            self._control.host,
            self._control.node,
            self._cache_place(),
            None if into is None else Place.of(into),
            self.wish.asks,
        )

    def _cache_place(self) -> Place:
        # A cache that cannot be made is no error while nothing needs it: local sources are used where they are.
        with contextlib.suppress(OSError):
            self._cache_dir.mkdir(parents=True, exist_ok=True)
        try:
            return Place.of(self._cache_dir)
        except OSError:
            return Place(boot_id(), -1, self._control.rank)


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
    """

    asks: tuple[Ask, ...]
    domains: tuple[Domain, ...]
    links: Mapping[int, Mapping[str, Ask]]
    ranks: int
    nodes: int

    @property
    def leaders(self) -> tuple[int, ...]:
        """The leader of each domain."""
        return tuple(domain.leader for domain in self.domains)

    def role(self, rank: int) -> str:
        """What `rank` is, for readers of an error."""
        return next((domain.role for domain in self.domains if domain.leader == rank), "")


def agree(introductions: Mapping[int, Introduction]) -> Agreed:
    """Compare what all ranks say.

    Raises
    ------
    PlanMismatch
        Two ranks want different things under one name in one folder of links.
    """
    hosts = {rank: said.host for rank, said in introductions.items()}
    into = {rank: said.into for rank, said in introductions.items() if said.into}
    return Agreed(
        asks=tuple(dict.fromkeys(ask for said in introductions.values() for ask in said.asks.values())),
        domains=group({rank: said.cache for rank, said in introductions.items()}, hosts),
        links={domain.leader: _union(domain, introductions) for domain in group(into, hosts)},
        ranks=len(introductions),
        nodes=len({said.node for said in introductions.values()}),
    )


def _union(domain: Domain, introductions: Mapping[int, Introduction]) -> dict[str, Ask]:
    """Join what the ranks of one folder of links want there."""
    wanted: dict[str, tuple[int, Ask]] = {}
    for rank in domain.ranks:
        for name, ask in introductions[rank].asks.items():
            first, other = wanted.setdefault(name, (rank, ask))
            if other != ask:
                raise PlanMismatch(
                    f"one link, two sources: {name or 'the folder'} is {other} on rank {first} "
                    f"({introductions[first].host}) and {ask} on rank {rank} ({introductions[rank].host})"
                )
    return {name: ask for name, (_, ask) in wanted.items()}
