"""Read submitit's environment, and set the variables that torch and gloo read."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import submitit

from weightferry.cluster.interfaces import interface_towards
from weightferry.cluster.rendezvous import port_for

# torchrun sets these for its ranks. A command that starts ranks of its own must not see those of the task it runs in.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")


@dataclass(frozen=True)
class TaskEnvironment:
    """The ranks, addresses and job of one task.

    Attributes
    ----------
    rank, world_size, local_rank, local_world_size, node, nodes : int
        As in torchrun.
    master_address : str
        Name or address of the node of rank 0.
    job_id : str
        The id of the job in submitit.
    restarts : int
        How often the job was requeued.
    interface : str
        The network interface towards the other nodes; empty if it could not be determined.
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
    def from_submitit(cls) -> TaskEnvironment:
        """Return the environment of the running task."""
        env = submitit.JobEnvironment()
        nodes = list(env.hostnames)
        single_node = env.num_nodes == 1
        # Many machines resolve their own name to 127.0.1.1. The route to another node goes through an interface that
        # the other nodes can reach.
        other_node = nodes[1] if env.node == 0 and len(nodes) > 1 else nodes[0]
        return cls(
            rank=env.global_rank,
            world_size=env.num_tasks,
            local_rank=env.local_rank,
            local_world_size=env.num_tasks // env.num_nodes,
            node=env.node,
            nodes=env.num_nodes,
            master_address="127.0.0.1" if single_node else nodes[0],
            job_id=env.job_id,
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            interface="lo" if single_node else interface_towards(other_node),
        )

    def port(self, purpose: str) -> int:
        """Return the port for one purpose; it is the same in all tasks of a job."""
        return port_for(f"{self.job_id}/{self.restarts}/{purpose}")

    def variables(self, purpose: str, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that torch reads; the network interfaces only if `environ` does not set them."""
        variables = {
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
                    variables[name] = self.interface
        return {name: str(value) for name, value in variables.items()}

    def export(self, purpose: str, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set `variables` in `environ`."""
        environ.update(self.variables(purpose, environ))
