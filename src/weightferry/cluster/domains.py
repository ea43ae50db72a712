"""Which ranks share a folder, and who leads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightferry.cluster.topology import boot_id
from weightferry.errors import ranges


@dataclass(frozen=True)
class Place:
    """A folder as one rank sees it, named so that equal names mean the same folder.

    Attributes
    ----------
    machine : str
        The running kernel; device and inode numbers mean nothing across machines.
    device, inode : int
        What `stat` says: the same mount of the same folder, whatever path or link led there.
    """

    machine: str
    device: int
    inode: int

    @classmethod
    def of(cls, folder: Path) -> Place:
        """Look at an existing folder."""
        seen = folder.stat()
        return cls(boot_id(), seen.st_dev, seen.st_ino)


@dataclass(frozen=True)
class Domain:
    """Ranks that provably see one folder.

    Attributes
    ----------
    leader : int
        The lowest rank: it reads for the others.
    ranks : tuple of int
        All, the leader too.
    host : str
        The leader's host name.
    """

    leader: int
    ranks: tuple[int, ...]
    host: str

    @property
    def role(self) -> str:
        """What the leader is, for readers of an error."""
        return f"leader of ranks {ranges(list(self.ranks))}" if len(self.ranks) > 1 else "leader of its own cache"


def group(places: Mapping[int, Place], hosts: Mapping[int, str]) -> tuple[Domain, ...]:
    """Group ranks by the folder they see; every rank computes the same from the same.

    Two machines that share a folder over the network count as two domains here: both leaders then meet at the lock of
    a file, and the second finds it whole.
    """
    together: dict[Place, list[int]] = {}
    for rank in sorted(places):
        together.setdefault(places[rank], []).append(rank)
    return tuple(Domain(ranks[0], tuple(ranks), hosts[ranks[0]]) for ranks in together.values())
