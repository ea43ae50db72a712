"""Storage domains: which ranks share a folder, and which rank leads them.

Within one running kernel `stat` proves it: the same device and inode is the same folder, whatever path, link or mount
leads there. Across machines these numbers mean nothing. There, a folder on a local file system is never shared; for any
other folder a `StorageProbe` finds out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weightferry.cluster.machine import boot_id
from weightferry.cluster.mounts import is_local
from weightferry.cluster.storage_probe import ProbeResult
from weightferry.errors import format_ranks


@dataclass(frozen=True)
class FolderIdentity:
    """Identifies a folder as one rank sees it: equal values mean the same folder.

    Attributes
    ----------
    machine : str
        Boot id of the running kernel. Device and inode numbers mean nothing across machines.
    device, inode : int
        As `stat` gives them.
    local : bool
        Whether only this machine can see the folder.
    """

    machine: str
    device: int
    inode: int
    local: bool = True

    @classmethod
    def of(cls, folder: Path) -> FolderIdentity:
        """Identify an existing folder."""
        stat = folder.stat()
        return cls(boot_id(), stat.st_dev, stat.st_ino, is_local(folder))


@dataclass(frozen=True)
class StorageDomain:
    """Ranks that provably see one folder.

    Attributes
    ----------
    leader : int
        The lowest rank: it reads for the other ranks.
    ranks : tuple of int
        All ranks, the leader too.
    host : str
        Host name of the leader.
    local : bool
        Whether only one machine can see the folder.
    job_ranks : tuple of int
        The same ranks as the job numbers them.
    flock_excludes : bool
        False: two machines of the domain held one `flock` at the same time.
    """

    leader: int
    ranks: tuple[int, ...]
    host: str
    local: bool = True
    job_ranks: tuple[int, ...] = ()
    flock_excludes: bool = True

    @property
    def role(self) -> str:
        """The role of the leader, for errors."""
        return (
            f"leader of ranks {format_ranks(list(self.job_ranks))}"
            if len(self.ranks) > 1
            else "leader of its own cache"
        )


def group_by_folder(
    folders: Mapping[int, FolderIdentity], hosts: Mapping[int, str], job_ranks: Sequence[int] | None = None
) -> tuple[StorageDomain, ...]:
    """Group ranks that have the same folder identity; every rank computes the same from the same values."""
    groups: dict[FolderIdentity, list[int]] = {}
    for rank in sorted(folders):
        groups.setdefault(folders[rank], []).append(rank)
    return tuple(_domain(ranks, hosts, folder.local, job_ranks) for folder, ranks in groups.items())


def merge_domains(
    domains: Sequence[StorageDomain], probed: Mapping[int, ProbeResult], job_ranks: Sequence[int] | None = None
) -> tuple[StorageDomain, ...]:
    """Join domains whose leaders found the same file in their folders.

    Parameters
    ----------
    probed
        By leader, what its `StorageProbe` found. A leader that is not in it shares its folder with no other leader.
    """
    groups: dict[int, list[StorageDomain]] = {}
    for domain in domains:
        found = probed.get(domain.leader, ProbeResult(domain.leader))
        groups.setdefault(found.creator, []).append(replace(domain, flock_excludes=found.flock_excludes))
    hosts = {domain.leader: domain.host for domain in domains}
    joined = [
        replace(
            _domain(sorted(rank for domain in same for rank in domain.ranks), hosts, same[0].local, job_ranks),
            flock_excludes=all(domain.flock_excludes for domain in same),
        )
        for same in groups.values()
    ]
    return tuple(sorted(joined, key=lambda domain: domain.leader))


def _domain(ranks: list[int], hosts: Mapping[int, str], local: bool, job_ranks: Sequence[int] | None) -> StorageDomain:
    in_job = tuple(ranks if job_ranks is None else (job_ranks[rank] for rank in ranks))
    return StorageDomain(ranks[0], tuple(ranks), hosts[ranks[0]], local, in_job)
