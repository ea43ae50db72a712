"""The process that holds a lock: its note beside the lock, what the kernel knows, and the proof that it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from weightferry.cluster.machine import boot_id

_JOB_VARIABLES = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
# The start time is field 22 of proc_pid_stat(5). The fields are split after the process name, which is field 2.
_START_TIME_INDEX = 21 - 2


@dataclass(frozen=True)
class LockHolder:
    """A process that holds locks.

    Attributes
    ----------
    host : str
    pid : int
    job : str
        The Slurm job id, or the run id of torchrun; empty without either.
    machine : str
        The running kernel and the PID namespace in which `pid` is valid.
    started : str
        The start time of the process, to tell it from a later process with the same number.
    claims : tuple of str
        Names of the claim files, where files replace the kernel's lock.
    """

    host: str
    pid: int
    job: str = ""
    machine: str = ""
    started: str = ""
    claims: tuple[str, ...] = ()

    @classmethod
    def this_process(cls) -> LockHolder:
        """Describe this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _job_id(os.environ), _machine_id(), _start_time(pid))

    @classmethod
    def read(cls, note: Path) -> LockHolder | None:
        """Read a note that contains `json_text`; None when there is no valid note."""
        try:
            fields = json.loads(note.read_text())
            return cls(**{**fields, "claims": tuple(fields.get("claims", ()))})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @property
    def json_text(self) -> str:
        """The content of a note, for `read`."""
        return json.dumps(asdict(self))

    @property
    def is_dead(self) -> bool:
        """Whether it is proven that the process has ended. False for a process of another machine: no proof exists."""
        if self.machine != _machine_id():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # the process belongs to another user
        # With the mount option hidepid, /proc shows no process of another user: the start time is empty then.
        return _start_time(self.pid) not in ("", self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")


def local_lock_holder(lock: Path) -> LockHolder | None:
    """Return the process of this machine that holds a `flock` on a file; None when the kernel knows none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = str(lock.stat().st_ino)
        # proc_locks(5): "1: FLOCK  ADVISORY  WRITE 1234 fd:00:1234567 0 EOF". A waiting process has an arrow in front.
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, pid, device_and_inode, *_ = line.split()
            if kind == "FLOCK" and device_and_inode.rpartition(":")[2] == inode and int(pid) > 0:
                return LockHolder(socket.gethostname(), int(pid), _job_id(_environ_of(int(pid))))
    return None


def _job_id(environ: Mapping[str, str]) -> str:
    return next((environ[name] for name in _JOB_VARIABLES if environ.get(name, "none") != "none"), "")


def _environ_of(pid: int) -> Mapping[str, str]:
    with contextlib.suppress(OSError):  # another user's process, or it has ended
        pairs = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}


def _machine_id() -> str:
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{boot_id()} {namespace}"


def _start_time(pid: int) -> str:
    """Return the start time of a process in the kernel's clock ticks; empty when there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_TIME_INDEX]
    return ""
