"""Who holds a lock: said by holders beside it, or by the kernel, for those who wait; and the proof that one died."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from weightferry.cluster.topology import boot_id

_JOB = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
_START = 21 - 2  # the place of a process's start time (proc_pid_stat(5), field 22) behind its name (field 2)


@dataclass(frozen=True)
class LockHolder:
    """A process that holds locks.

    Attributes
    ----------
    host : str
    pid : int
    job : str
        Of Slurm, or the run of torchrun; empty where there is none.
    machine : str
        The running kernel and the PID namespace in which `pid` means something.
    started : str
        When the process did, so that another one with its number is not taken for it.
    claims : tuple of str
        Names of what it put in place of the kernel's lock.
    """

    host: str
    pid: int
    job: str = ""
    machine: str = ""
    started: str = ""
    claims: tuple[str, ...] = ()

    @classmethod
    def me(cls) -> LockHolder:
        """Describe this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _job(os.environ), _machine(), _start_of(pid))

    @classmethod
    def read(cls, note: Path) -> LockHolder | None:
        """Read what `text` wrote; None where nobody says anything."""
        try:
            said = json.loads(note.read_text())
            return cls(**{**said, "claims": tuple(said.get("claims", ()))})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @property
    def text(self) -> str:
        """For `read`."""
        return json.dumps(asdict(self))

    @property
    def is_dead(self) -> bool:
        """Whether it is proven that the process has ended; of another machine's nothing is."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it is somebody else's
        # With hidepid nothing is told of other users' processes.
        return _start_of(self.pid) not in ("", self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")


def local_lock_holder(lock: Path) -> LockHolder | None:
    """Ask the kernel of this machine who holds a `flock` on a file; None where it does not know."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = str(lock.stat().st_ino)
        # proc_locks(5): "1: FLOCK  ADVISORY  WRITE 1234 fd:00:1234567 0 EOF"; waiters have an arrow in front.
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, pid, place, *_ = line.split()
            if kind == "FLOCK" and place.rpartition(":")[2] == inode and int(pid) > 0:
                return LockHolder(socket.gethostname(), int(pid), _job(_environ_of(int(pid))))
    return None


def _job(environ: Mapping[str, str]) -> str:
    return next((environ[name] for name in _JOB if environ.get(name, "none") != "none"), "")


def _environ_of(pid: int) -> Mapping[str, str]:
    with contextlib.suppress(OSError):  # somebody else's process, or none any more
        said = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in said if "=" in pair)
    return {}


def _machine() -> str:
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{boot_id()} {namespace}"


def _start_of(pid: int) -> str:
    """When a process started, as the kernel counts; empty when there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START]
    return ""
