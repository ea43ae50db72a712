"""What ranks want of an operation: as each rank says it, and as all ranks agreed on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightferry.cluster.domains import FolderIdentity, StorageDomain
from weightferry.sources import SourceRequest


@dataclass(frozen=True)
class RankRequest:
    """What one rank wants of an operation.

    Attributes
    ----------
    requests : mapping of str to SourceRequest
        By name.
    link_folder : Path or None
        Absolute path of the folder for links. None: no links.
    link_suffix : str or None
        The link of a request is its name and this suffix. None: the files are linked under their own paths.
    copy : bool
        Whether real files with equal content take the place of the links.
    """

    requests: Mapping[str, SourceRequest]
    link_folder: Path | None = None
    link_suffix: str | None = None
    copy: bool = False


@dataclass(frozen=True)
class RankDescription:
    """What one rank tells rank 0 in the phase agree.

    Attributes
    ----------
    host, node
        Its host name, and the name of its node.
    cache, link_folder
        Its cache folder, and its folder for links.
    requests
        By name, what it wants.
    domain
        Name of the storage domain of its cache, where the user sets one.
    tiers
        The read-only caches that it sees.
    copy
        Whether it wants real files in place of links.
    """

    host: str
    node: str
    cache: FolderIdentity
    link_folder: FolderIdentity | None
    requests: Mapping[str, SourceRequest]
    domain: str = ""
    tiers: Mapping[Path, FolderIdentity] = field(default_factory=dict)
    copy: bool = False


@dataclass(frozen=True)
class JobRequest:
    """What all ranks know after the phase agree.

    Attributes
    ----------
    requests : tuple of SourceRequest
        The union of what the ranks want, in the order of the ranks.
    domains : tuple of StorageDomain
        By cache folder.
    links : mapping of int to (mapping of str to SourceRequest)
        By the one rank that makes the links of a folder: all requests that any rank wants linked there.
    ranks, nodes : int
        How many.
    may_show_late : bool
        Whether files may show late: other machines see the file system of some folder too.
    tiers : mapping of int to (tuple of Path)
        By leader, the read-only caches that every rank of its domain sees.
    copies : bool
        Whether any rank wants real files in place of links.
    probe_token : str
        Token of the `StorageProbe` that is needed; empty when all folders are known.
    probe_caches, probe_link_folders : tuple of int
        The leaders that probe their cache folders, and the ranks that probe their folders for links.
    """

    requests: tuple[SourceRequest, ...]
    domains: tuple[StorageDomain, ...]
    links: Mapping[int, Mapping[str, SourceRequest]]
    ranks: int
    nodes: int
    may_show_late: bool = False
    copies: bool = False
    tiers: Mapping[int, tuple[Path, ...]] = field(default_factory=dict)
    probe_token: str = ""
    probe_caches: tuple[int, ...] = ()
    probe_link_folders: tuple[int, ...] = ()

    @property
    def leaders(self) -> tuple[int, ...]:
        """The leader of each domain."""
        return tuple(domain.leader for domain in self.domains)

    def domain_of(self, rank: int) -> StorageDomain:
        """Return the domain of `rank`."""
        return next(domain for domain in self.domains if rank in domain.ranks)

    def role(self, rank: int) -> str:
        """Return the role of `rank`, for errors; empty for followers."""
        return next((domain.role for domain in self.domains if domain.leader == rank), "")
