"""All paths in a testbed's folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import TestbedError

# Fixed, not $TMPDIR: `down` must find the folder of `up` from another shell. munged needs parent folders that other
# users cannot write to (/tmp is sticky). The path of a unix socket must be shorter than 108 bytes.
_BASE = Path("/tmp")  # noqa: S108
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

LOCAL = Path("/local")
"""The node-local disk, on every host."""

ENTER = Path(__file__).with_name("enter.py")
SACCT = Path(__file__).with_name("sacct.py")
REPOSITORY = Path(__file__).parents[2]


def base_folder() -> Path:
    """Return the folder that holds the folders of all this user's testbeds."""
    return _BASE / f"weightferry-testbed-{os.geteuid()}"


@dataclass(frozen=True)
class Layout:
    """The paths of one testbed; it creates no file."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise TestbedError(f"a testbed's name must be 1 to 32 characters of a-z, 0-9 and '-', not {self.name!r}")

    @property
    def folder(self) -> Path:
        """The folder of the testbed; it is removed with the testbed."""
        return base_folder() / self.name

    @property
    def lock(self) -> Path:
        """The file that is locked (flock) while the testbed runs."""
        return self.folder / "lock"

    @property
    def state(self) -> Path:
        """The running processes, as JSON; see `State`."""
        return self.folder / "state.json"

    @property
    def spec(self) -> Path:
        """The requested shape, as JSON, for the testbed's own processes; see `Spec`."""
        return self.folder / "spec.json"

    @property
    def shared(self) -> Path:
        """A folder that all nodes share, for the user of the testbed."""
        return self.folder / "shared"

    @property
    def root(self) -> Path:
        """The mount point of the hosts' root file system."""
        return self.folder / "root"

    @property
    def etc(self) -> Path:
        """The folder that is mounted at /etc/slurm on every host."""
        return self.folder / "etc"

    @property
    def slurm_conf(self) -> Path:
        """slurm.conf of the cluster."""
        return self.etc / "slurm.conf"

    @property
    def controller_state(self) -> Path:
        """The state folder of slurmctld."""
        return self.folder / "slurmctld"

    @property
    def munge(self) -> Path:
        """Key, socket and state of munged; owned by user munge."""
        return self.folder / "munge"

    @property
    def munge_socket(self) -> Path:
        """The socket of munged; all hosts of a testbed share it."""
        return self.munge / "socket"

    @property
    def sacct(self) -> Path:
        """The script that is mounted over the command sacct on every host."""
        return self.folder / "sacct"

    @property
    def clients(self) -> Path:
        """Slurm's commands for processes outside; with this folder first in PATH, they run on the head."""
        return self.folder / "clients"

    @property
    def logs(self) -> Path:
        """One log file for each daemon."""
        return self.folder / "log"

    def log(self, daemon: str) -> Path:
        """Return the log of a daemon: ``supervisor``, ``munged``, ``slurmctld`` or ``slurmd-node1``."""
        return self.logs / f"{daemon}.log"

    def hosts(self, host: str) -> Path:
        """Return the file that is mounted at /etc/hosts on `host`."""
        return self.folder / "hosts" / host

    def spool(self, host: str) -> Path:
        """Return the spool folder of the slurmd on `host`."""
        return self.folder / "spool" / host
