"""Owns every path of a testbed's folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import TestbedError

# Fixed, not $TMPDIR: `down` must find what `up` made in another shell, munged wants parents that others cannot write
# to (/tmp is sticky), and the path of a unix socket must stay under 108 bytes.
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
    """The paths of one testbed; makes nothing."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise TestbedError(f"a testbed's name is 1 to 32 of a-z, 0-9 and '-', not {self.name!r}")

    @property
    def folder(self) -> Path:
        """The testbed's own; gone when the testbed is."""
        return base_folder() / self.name

    @property
    def lock(self) -> Path:
        """Locked (flock) as long as the testbed lives."""
        return self.folder / "lock"

    @property
    def state(self) -> Path:
        """Who runs here, as JSON."""
        return self.folder / "state.json"

    @property
    def spec(self) -> Path:
        """What was asked for, as JSON; what the testbed's own processes read."""
        return self.folder / "spec.json"

    @property
    def shared(self) -> Path:
        """A folder that all nodes see, for whoever uses the testbed."""
        return self.folder / "shared"

    @property
    def root(self) -> Path:
        """Where the root file system of the hosts is put together."""
        return self.folder / "root"

    @property
    def etc(self) -> Path:
        """Becomes /etc/slurm on every host."""
        return self.folder / "etc"

    @property
    def slurm_conf(self) -> Path:
        """slurm.conf of the cluster."""
        return self.etc / "slurm.conf"

    @property
    def controller_state(self) -> Path:
        """Where slurmctld keeps its state."""
        return self.folder / "slurmctld"

    @property
    def munge(self) -> Path:
        """Key, socket and papers of munged, owned by user munge."""
        return self.folder / "munge"

    @property
    def munge_socket(self) -> Path:
        """Where munged listens; all hosts of a testbed share one."""
        return self.munge / "socket"

    @property
    def sacct(self) -> Path:
        """Becomes the command sacct on every host."""
        return self.folder / "sacct"

    @property
    def clients(self) -> Path:
        """Slurm's commands for processes outside: put first in PATH they run on the head."""
        return self.folder / "clients"

    @property
    def logs(self) -> Path:
        """One log file a daemon."""
        return self.folder / "log"

    def log(self, daemon: str) -> Path:
        """Return the log of a daemon: ``supervisor``, ``munged``, ``slurmctld`` or ``slurmd-node1``."""
        return self.logs / f"{daemon}.log"

    def hosts(self, host: str) -> Path:
        """Return what becomes /etc/hosts on `host`."""
        return self.folder / "hosts" / host

    def spool(self, host: str) -> Path:
        """Return the folder where the slurmd of `host` keeps its papers."""
        return self.folder / "spool" / host
