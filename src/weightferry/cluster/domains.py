"""Which ranks share a folder, and who leads them.

What `stat` says proves it within one running kernel: the same device and inode is the same folder, whatever path, link
or mount led there. Across machines these numbers mean nothing. A folder on a local file system is then not shared; for
all others it is tried: each group of ranks creates the same new file in its folder, which succeeds for one of them, and
who finds it made reads by whom. So nobody waits for a file that will never appear.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from weightferry.cluster.flock import try_flock
from weightferry.cluster.topology import boot_id
from weightferry.errors import CollectError, ranges

T = TypeVar("T")

# Of the kernel's own file systems those that one machine has to itself. All others may be seen by several.
_LOCAL = frozenset(
    {
        *("bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660", "jfs", "nilfs2", "ntfs3"),
        *("overlay", "ramfs", "reiserfs", "rootfs", "squashfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"),
    }
)
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOOKS = (0.02, 0.5)  # seconds between two looks for a file that must appear: the first, the longest


@dataclass(frozen=True)
class FolderIdentity:
    """A folder as one rank sees it, named so that equal names mean the same folder.

    Attributes
    ----------
    machine : str
        The running kernel; device and inode numbers mean nothing across machines.
    device, inode : int
        What `stat` says: the same mount of the same folder, whatever path or link led there.
    local : bool
        Whether no other machine can see it.
    """

    machine: str
    device: int
    inode: int
    local: bool = True

    @classmethod
    def of(cls, folder: Path) -> FolderIdentity:
        """Look at an existing folder."""
        seen = folder.stat()
        return cls(boot_id(), seen.st_dev, seen.st_ino, is_local(folder))


@dataclass(frozen=True)
class StorageDomain:
    """Ranks that provably see one folder.

    Attributes
    ----------
    leader : int
        The lowest rank: it reads for the others.
    ranks : tuple of int
        All, the leader too.
    host : str
        The leader's host name.
    local : bool
        Whether no other machine can see the folder.
    names : tuple of int
        The ranks as the job counts them.
    excludes : bool
        False: machines of it were seen to hold one `flock` at once.
    """

    leader: int
    ranks: tuple[int, ...]
    host: str
    local: bool = True
    names: tuple[int, ...] = ()
    excludes: bool = True

    @property
    def role(self) -> str:
        """What the leader is, for readers of an error."""
        return f"leader of ranks {ranges(list(self.names))}" if len(self.ranks) > 1 else "leader of its own cache"


def group(
    places: Mapping[int, FolderIdentity], hosts: Mapping[int, str], names: Sequence[int] | None = None
) -> tuple[StorageDomain, ...]:
    """Group ranks by what is proven without trying; every rank computes the same from the same."""
    together: dict[FolderIdentity, list[int]] = {}
    for rank in sorted(places):
        together.setdefault(places[rank], []).append(rank)
    return tuple(_domain(ranks, hosts, place.local, names) for place, ranks in together.items())


def merge(
    domains: Sequence[StorageDomain], met: Mapping[int, ProbeResult], names: Sequence[int] | None = None
) -> tuple[StorageDomain, ...]:
    """Join domains whose leaders met in one folder.

    Parameters
    ----------
    met
        By leader, whose file it found; see `StorageProbe`. Leaders that are not in it met nobody.
    """
    together: dict[int, list[StorageDomain]] = {}
    for domain in domains:
        found = met.get(domain.leader, ProbeResult(domain.leader))
        together.setdefault(found.maker, []).append(replace(domain, excludes=found.excludes))
    hosts = {domain.leader: domain.host for domain in domains}
    joined = [
        replace(
            _domain(sorted(rank for domain in same for rank in domain.ranks), hosts, same[0].local, names),
            excludes=all(domain.excludes for domain in same),
        )
        for same in together.values()
    ]
    return tuple(sorted(joined, key=lambda domain: domain.leader))


def _domain(ranks: list[int], hosts: Mapping[int, str], local: bool, names: Sequence[int] | None) -> StorageDomain:
    named = tuple(ranks if names is None else (names[rank] for rank in ranks))
    return StorageDomain(ranks[0], tuple(ranks), hosts[ranks[0]], local, named)


def is_local(folder: Path, mounts: str | None = None) -> bool:
    """Whether the file system of an existing folder belongs to this machine alone; parameters as of `mount_of`."""
    return mount_of(folder, mounts).kind in _LOCAL


class Mount(NamedTuple):
    """A mounted file system: its kind and its options, empty where nobody knows."""

    kind: str = ""
    options: frozenset[str] = frozenset()


def mount_of(folder: Path, mounts: str | None = None) -> Mount:
    """Find the file system of an existing folder.

    Parameters
    ----------
    mounts
        What ``/proc/self/mountinfo`` says (proc(5)); None: to be read.
    """
    try:
        text = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    except OSError:
        return Mount()
    path, best, found = os.path.realpath(folder), "", Mount()
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        # Spaces and the like are written in octal.
        point = before.split(" ")[4].encode().decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # the later of two mounts at one point hides the other
            kind, *said = after.split(" ")
            best, found = point, Mount(kind, frozenset(",".join([*said[-1:], before.split(" ")[5]]).split(",")))
    return found


@dataclass(frozen=True)
class ProbeResult:
    """What a leader found in its folder.

    Attributes
    ----------
    maker : int
        The rank that made the file.
    excludes : bool
        Whether the lock of its maker kept this rank out.
    """

    maker: int
    excludes: bool = True


@dataclass(frozen=True)
class StorageProbe:
    """How leaders find out whether they see one folder.

    Attributes
    ----------
    token : str
        Names the file; never used before.
    patience : float
        Seconds to wait for a file that is there to be seen: network file systems show new files late, up to a minute
        has been reported.
    """

    token: str
    patience: float
    _made: dict[Path, IO[str]] = field(default_factory=dict, compare=False)

    def file(self, folder: Path) -> Path:
        """The file that is made in `folder`, and removed by whoever made it."""
        return folder / f".weightferry-{self.token}"

    def at(self, folder: Path, rank: int, check: Callable[[], None]) -> ProbeResult:
        """Make the file and lock it, or read who made it, and see whether that lock excludes.

        Raises
        ------
        CollectError
            Somebody made it, but it does not show in time.
        """
        file = self.file(folder)
        try:
            made = self._made[folder] = file.open("x")
        except FileExistsError:
            return ProbeResult(self._read(file, check), _is_locked(file))
        with contextlib.suppress(OSError):
            try_flock(made.fileno())
        made.write(f"{rank}\n")
        made.flush()
        return ProbeResult(rank)

    def _read(self, file: Path, check: Callable[[], None]) -> int:
        def look() -> int:
            text = file.read_text()
            if not text.endswith("\n"):
                raise FileNotFoundError(errno.ENOENT, "not written yet", str(file))
            return int(text)

        try:
            return wait_until_visible(look, file, self.patience, check)
        except FileNotFoundError as error:
            raise CollectError(
                f"another rank made a file here that does not show within {self.patience:.0f} s; say with "
                "WEIGHTFERRY_DOMAIN which ranks share this folder",
                subject=str(file),
            ) from error

    def end(self) -> None:
        """Remove the files that were made here."""
        while self._made:
            folder, made = self._made.popitem()
            made.close()
            with contextlib.suppress(OSError):
                self.file(folder).unlink()


def _is_locked(file: Path) -> bool:
    try:
        with file.open("r+") as opened:
            return not try_flock(opened.fileno())
    except OSError as error:
        return error.errno in READ_ONLY  # who cannot write here takes no locks


def wait_until_visible(look: Callable[[], T], path: Path, patience: float, check: Callable[[], None]) -> T:
    """Look at something that must be there until it shows; network file systems let one wait, or lose their handle.

    Parameters
    ----------
    path
        Its folder is listed before each further look: that makes clients ask their server again.
    patience
        Seconds.

    Raises
    ------
    OSError
        What the last look said.
    """
    until, (pause, longest) = time.monotonic() + patience, _LOOKS
    while True:
        try:
            return look()
        except OSError as error:
            passing = isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE
            if not passing or time.monotonic() > until:
                raise
        check()
        time.sleep(pause)
        pause = min(2 * pause, longest)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())
