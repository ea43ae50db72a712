"""Find out whether leaders on several machines see one folder: each tries to create the same file in its folder."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from weightferry.cluster.flock import try_flock
from weightferry.cluster.visibility import wait_until_visible
from weightferry.errors import CollectError

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class ProbeResult:
    """What a leader found in its folder.

    Attributes
    ----------
    creator : int
        The rank that created the file.
    flock_excludes : bool
        Whether the creator's `flock` kept this rank out.
    """

    creator: int
    flock_excludes: bool = True


@dataclass(frozen=True)
class StorageProbe:
    """Probes folders that several machines may see.

    Each leader tries to create one file. In a folder that two leaders share, one of them creates it, and the other
    one reads from the file which rank that was. So no leader waits for a file that will never appear.

    Attributes
    ----------
    token : str
        Part of the file's name; unique to this probe.
    timeout : float
        Seconds to wait until the content of an existing file shows. Network file systems show new files late: users
        have reported up to a minute.
    """

    token: str
    timeout: float
    _created: dict[Path, IO[str]] = field(default_factory=dict, compare=False)

    def file(self, folder: Path) -> Path:
        """Return the path of the file in `folder`; the rank that creates it also removes it."""
        return folder / f".weightferry-{self.token}"

    def probe(self, folder: Path, rank: int, check: Callable[[], None]) -> ProbeResult:
        """Create the file and lock it; or read which rank created it, and test whether its lock excludes this rank.

        Raises
        ------
        CollectError
            Another rank created the file, but its content does not show in time.
        """
        file = self.file(folder)
        try:
            created = self._created[folder] = file.open("x")
        except FileExistsError:
            return ProbeResult(self._read(file, check), _is_locked(file))
        with contextlib.suppress(OSError):
            try_flock(created.fileno())
        created.write(f"{rank}\n")
        created.flush()
        return ProbeResult(rank)

    def _read(self, file: Path, check: Callable[[], None]) -> int:
        def look() -> int:
            text = file.read_text()
            if not text.endswith("\n"):
                raise FileNotFoundError(errno.ENOENT, "not written yet", str(file))
            return int(text)

        try:
            return wait_until_visible(look, file, self.timeout, check)
        except FileNotFoundError as error:
            raise CollectError(
                f"another rank created a file in this folder, but it does not show within {self.timeout:.0f} s. Set "
                "WEIGHTFERRY_DOMAIN to say which ranks share this folder, or raise `visibility_timeout`.",
                subject=str(file),
            ) from error

    def remove_files(self) -> None:
        """Remove the files that this process created."""
        while self._created:
            folder, created = self._created.popitem()
            created.close()
            with contextlib.suppress(OSError):
                self.file(folder).unlink()


def _is_locked(file: Path) -> bool:
    try:
        with file.open("r+") as opened:
            return not try_flock(opened.fileno())
    except OSError as error:
        return error.errno in READ_ONLY  # a user without write access takes no locks
