"""The shape of a testbed: number of nodes, link rates, disk sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from .errors import TestbedError

Role = Literal["head", "origin", "node"]

HEAD = "head"
ORIGIN = "origin"
# Every testbed has its own isolated network, so all testbeds use the same addresses.
_NETWORK = "10.77.0"
PREFIX_LENGTH = 24
_FIRST_NODE = 11
MAX_NODES = 64


@dataclass(frozen=True)
class Host:
    """One host of the cluster.

    Attributes
    ----------
    name, address
        Its host name, and the IPv4 address of its only interface besides ``lo``.
    role
        ``head`` runs slurmctld, a ``node`` runs slurmd, ``origin`` runs the server of `Testbed.start_origin`.
    mbit
        Rate of its link in each direction in 10^6 bit/s; None: no limit.
    """

    name: str
    address: str
    role: Role
    mbit: float | None = None


@dataclass(frozen=True)
class Spec:
    """The shape of a testbed.

    Attributes
    ----------
    nodes
        Compute nodes, 1 to 64.
    node_mbit, origin_mbit
        Rate of every node's link and of the origin's, in each direction, in 10^6 bit/s; None: no limit.
    cpus
        CPUs that each node reports. It may be more than the machine has: Slurm only counts them.
    disk_mb
        Size of each host's ``/local`` in 10^6 bytes, for tests with a full disk; None: half of the machine's memory,
        the default of tmpfs.
    accounting
        Whether ``sacct`` works. It is a replacement (see `sacct`) that reads from slurmctld instead of slurmdbd. False:
        a cluster without accounting. There, submitit learns of a job's end only from its result file, and warns at
        every poll, unless ``logging.getLogger("submitit").setLevel(logging.ERROR)`` is set.
    loopback_names
        Whether each host resolves its own name to 127.0.1.1, as on a machine from Debian's installer.
    """

    nodes: int = 2
    node_mbit: float | None = None
    origin_mbit: float | None = None
    cpus: int = 8
    disk_mb: int | None = None
    accounting: bool = True
    loopback_names: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise TestbedError(f"nodes must be 1 to {MAX_NODES}, not {self.nodes}")
        for rate in (self.node_mbit, self.origin_mbit):
            if rate is not None and rate <= 0:
                raise TestbedError(f"a link rate must be above 0 Mbit/s, not {rate}")

    @property
    def hosts(self) -> tuple[Host, ...]:
        """Head, origin, then the nodes in order."""
        head = Host(HEAD, f"{_NETWORK}.1", "head")
        origin = Host(ORIGIN, f"{_NETWORK}.2", "origin", self.origin_mbit)
        nodes = (
            Host(f"node{index + 1}", f"{_NETWORK}.{_FIRST_NODE + index}", "node", self.node_mbit)
            for index in range(self.nodes)
        )
        return (head, origin, *nodes)

    def host(self, name: str) -> Host:
        """Return the host of that name.

        Raises
        ------
        TestbedError
            There is none.
        """
        for host in self.hosts:
            if host.name == name:
                return host
        raise TestbedError(f"no host {name!r}: there are {', '.join(host.name for host in self.hosts)}")

    def to_json(self) -> dict[str, Any]:
        """Return a value for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Spec:
        """Return the spec from a value of `to_json`."""
        return cls(**values)
