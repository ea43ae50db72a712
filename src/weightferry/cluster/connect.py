"""Open a coordinator: of this process alone, of the caller's process group, or of the ranks that a launcher started."""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from subprocess import run
from typing import TYPE_CHECKING

from weightferry.cluster.coordinator import Coordinator, LocalCoordinator
from weightferry.cluster.launchers import Topology, read_topology
from weightferry.errors import BadRequest, NotDistributed
from weightferry.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

    from weightferry.cluster.store import StoreClients

# The clients of the store that was used last. A process has one default group at a time.
_clients: StoreClients | None = None

# How many operations this process has opened, by the ranks that take part. All ranks open the same operations in the
# same order, so equal numbers name the same operation. A new process group in this process may use the same store, so
# the count goes on.
_operations: Counter[tuple[int, ...]] = Counter()


@contextlib.contextmanager
def process_group_coordinator(
    settings: Settings, name: str, *, group: ProcessGroup | None = None, alone: bool = False
) -> Iterator[Coordinator]:
    """Open an operation of the ranks of a process group, or of this process alone.

    Parameters
    ----------
    name
        Name of the operation, for errors: ``collect``, ``stage``, ``load``, ...
    group
        The ranks that take part. None: all ranks of the default process group. Only the store of the default group is
        used, so any backend works.
    alone
        Only this process takes part, even if the environment says that there are more ranks.

    Raises
    ------
    NotDistributed
        The environment says that there are several ranks, but there is no process group.
    BadRequest
        This process is not in `group`.
    """
    topology = read_topology()
    store, ranks = _members(group) if not alone else (None, (topology.rank,))
    if not ranks and topology.world_size > 1:
        raise NotDistributed(
            f"{topology.launcher} started {topology.world_size} ranks, but torch.distributed is not initialised in "
            "this one. Add this line before the call:\n"
            '    torch.distributed.init_process_group("gloo")    # or "nccl"\n'
            "or, to work in this process alone, call collect_files(internal_ddp_handling=False)."
        )
    coordinator = (
        LocalCoordinator(topology.host, topology.rank)
        if store is None
        else _distributed_coordinator(store, ranks, topology, settings, name)
    )
    coordinator.operation = name
    with coordinator:
        yield coordinator


@contextlib.contextmanager
def launcher_coordinator(settings: Settings, topology: Topology, name: str) -> Iterator[Coordinator]:
    """Open an operation of all processes that a launcher started together; no process group is needed.

    For the command line. The ranks meet on a `torch.distributed` store at ``MASTER_ADDR`` and ``MASTER_PORT``, as
    torchrun sets them. Under Slurm and MPI missing variables are derived.
    """
    if topology.world_size == 1:
        with LocalCoordinator(topology.host) as coordinator:
            coordinator.operation = name
            yield coordinator
        return
    store = _rendezvous(topology, settings)
    try:
        ranks = tuple(range(topology.world_size))
        with _distributed_coordinator(store, ranks, topology, settings, name, topology.rank) as coordinator:
            yield coordinator
    finally:
        _leave_together(store, topology, settings)


def _members(group: ProcessGroup | None) -> tuple[Store | None, tuple[int, ...]]:
    """Return the store that connects the ranks of a group, and these ranks.

    A group of one rank has no store. Without a process group there are no ranks either.
    """
    # A process that has not imported torch has no process group, so torch need not be imported here.
    if "torch.distributed" not in sys.modules:
        return None, ()
    from torch import distributed as dist

    if not dist.is_available() or not dist.is_initialized() or (group is None and dist.get_world_size() == 1):
        return None, ()
    # For a rank outside the group, torch passes a number in place of the group.
    if group is not None and dist.get_rank(group) < 0:
        raise BadRequest(f"rank {dist.get_rank()} is not in the process group that it passes as `group`")
    ranks = tuple(range(dist.get_world_size())) if group is None else tuple(dist.get_process_group_ranks(group))
    if len(ranks) == 1:
        return None, ranks
    # There is no public access to the store of the default group. torch's own checkpointing and vLLM use this function.
    store: Store = dist.distributed_c10d._get_default_store()  # noqa: SLF001
    return store, ranks


def _distributed_coordinator(
    store: Store, ranks: tuple[int, ...], topology: Topology, settings: Settings, name: str, rank: int | None = None
) -> Coordinator:
    global _clients
    from torch import distributed as dist

    from weightferry.cluster.distributed import DistributedCoordinator
    from weightferry.cluster.store import StoreClients

    if _clients is None or _clients.store is not store or _clients.lost:
        _clients = StoreClients(store)
    # An elastic restart may reuse the store of the previous attempt.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    members = zlib.crc32(",".join(map(str, ranks)).encode())
    prefix = f"weightferry/{attempt}/{members:08x}/{_operations[ranks]}"
    _operations[ranks] += 1
    place = ranks.index(dist.get_rank() if rank is None else rank)
    return DistributedCoordinator(_clients, prefix, place, ranks, topology, settings, name)


def _rendezvous(topology: Topology, settings: Settings) -> Store:
    # Our errors describe a lost peer better than the log of the store's client. torch reads this variable at import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch import distributed as dist

    os.environ.update(master(topology, os.environ))
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        found: Store
        found, _, _ = next(
            dist.rendezvous(
                "env://", topology.rank, topology.world_size, timeout=timedelta(seconds=settings.agree_timeout)
            )
        )
    except (dist.DistError, RuntimeError) as error:
        raise NotDistributed(
            f"rank {topology.rank} on {topology.host} could not connect to the other {topology.world_size - 1} ranks "
            f"at {where} (MASTER_ADDR:MASTER_PORT): {error}"
        ) from error
    return found


def _leave_together(store: Store, topology: Topology, settings: Settings) -> None:
    """Wait for the other ranks: the store may be in rank 0, and a launcher ends all ranks as soon as one rank fails."""
    from torch import distributed as dist

    mine, first = f"weightferry/bye/{topology.rank}", "weightferry/bye/0"
    others = [f"weightferry/bye/{rank}" for rank in range(1, topology.world_size)]
    limit = timedelta(seconds=settings.beat_timeout)
    with contextlib.suppress(dist.DistError):
        if topology.rank == 0:
            store.wait(others, limit)
            store.set(first, "")
            store.wait([f"{first}/read"], limit)
        else:
            store.set(mine, "")
            store.wait([first], limit)
            if store.add("weightferry/bye", 1) == topology.world_size - 1:
                store.set(f"{first}/read", "")


def master(topology: Topology, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the address of the store on rank 0: ``MASTER_ADDR`` and ``MASTER_PORT``, derived if they are not set.

    Raises
    ------
    NotDistributed
        The launcher does not tell which node has rank 0.
    """
    address = environ.get("MASTER_ADDR") or _address(topology, environ)
    port = environ.get("MASTER_PORT") or str(_port(environ))
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _address(topology: Topology, environ: Mapping[str, str]) -> str:
    if topology.local_world_size == topology.world_size:
        return "127.0.0.1"
    # Under mpirun the Slurm step is that of its daemons. Its ranks start on the first node of the job.
    nodes = environ.get("SLURM_STEP_NODELIST" if topology.launcher == "slurm" else "SLURM_JOB_NODELIST")
    if nodes:
        return _first_node(nodes)
    raise NotDistributed(
        f"{topology.launcher} does not say which node has rank 0: set MASTER_ADDR to its address "
        "(mpirun -x MASTER_ADDR=...)"
    )


def _first_node(nodes: str) -> str:
    if "[" not in nodes:
        return nodes.partition(",")[0]
    # Only Slurm's own tool expands its short form, w[0-3,7].
    listed = run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout.split():
        raise BadRequest(f"scontrol could not expand {nodes!r}: {listed.stderr.strip()}; set MASTER_ADDR")
    return listed.stdout.split()[0]


def _port(environ: Mapping[str, str]) -> int:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
    return port_for("/".join(environ.get(name, "") for name in names))


def port_for(job: str) -> int:
    """Return a port that all ranks of one job choose, and hardly any other job; below the ephemeral ports."""
    return 20000 + zlib.crc32(job.encode()) % 10000
