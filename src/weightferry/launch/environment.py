"""From submitit's environment to the variables that torch and gloo read."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import submitit

from weightferry.cluster.connect import port_for
from weightferry.cluster.interfaces import interface_towards

# What torchrun sets for its ranks; a command that makes ranks of its own must not see those of the task it runs in.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")


@dataclass(frozen=True)
class TaskEnvironment:
    """One task's place in its job.

    Attributes
    ----------
    rank, world_size, local_rank, local_world_size, node, nodes : int
        As in torchrun.
    master_address : str
        Name or address of the node of rank 0.
    job_id : str
        submitit's.
    restarts : int
        How often the job was requeued.
    interface : str
        The network interface on the way to the other nodes; empty when it could not be told.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    nodes: int
    master_address: str
    job_id: str
    restarts: int
    interface: str

    @classmethod
    def here(cls) -> TaskEnvironment:
        """Look around in a running task."""
        env = submitit.JobEnvironment()
        nodes = list(env.hostnames)
        alone = env.num_nodes == 1
        # Many machines resolve their own name to 127.0.1.1: the way to another node shows the interface that others
        # can reach.
        other = nodes[1] if env.node == 0 and len(nodes) > 1 else nodes[0]
        return cls(
            rank=env.global_rank,
            world_size=env.num_tasks,
            local_rank=env.local_rank,
            local_world_size=env.num_tasks // env.num_nodes,
            node=env.node,
            nodes=env.num_nodes,
            master_address="127.0.0.1" if alone else nodes[0],
            job_id=env.job_id,
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            interface="lo" if alone else interface_towards(other),
        )

    def port(self, purpose: str) -> int:
        """Choose a port for one purpose; all tasks of a job choose the same one."""
        return port_for(f"{self.job_id}/{self.restarts}/{purpose}")

    def variables(self, purpose: str, environ: Mapping[str, str]) -> dict[str, str]:
        """Name what torch reads; interfaces only where the user has not chosen."""
        chosen = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "GROUP_RANK": self.node,
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": self.port(purpose),
        }
        if self.interface:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                if name not in environ:
                    chosen[name] = self.interface
        return {name: str(value) for name, value in chosen.items()}

    def export(self, purpose: str, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set them."""
        environ.update(self.variables(purpose, environ))
