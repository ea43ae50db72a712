"""From a process to its place in an operation: alone, in the caller's process group, or by joining the others."""

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
from weightferry.cluster.topology import Topology, read_topology
from weightferry.errors import BadRequest, NotDistributed
from weightferry.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

    from weightferry.cluster.store import StoreClients

# The clients of the store that was used last: a process has one default group at a time.
_clients: StoreClients | None = None

# Operations of this process so far, by the ranks that take part. All of those call the same ones in the same order, so
# equal numbers name the same operation; a new process group in the same process, on the same store, goes on counting.
_operations: Counter[tuple[int, ...]] = Counter()


@contextlib.contextmanager
def operation(
    settings: Settings, name: str, *, group: ProcessGroup | None = None, alone: bool = False
) -> Iterator[Coordinator]:
    """Open an operation among the ranks of a process group, or of this process alone.

    Parameters
    ----------
    name
        What it does, for errors: ``collect``, ``stage``, ``load``, ...
    group
        Its ranks take part; None: those of the default process group. Whatever its back end, only the store of the
        default group is used.
    alone
        This process alone, whatever the environment says.

    Raises
    ------
    NotDistributed
        The environment says that there are several ranks, and no process group connects them.
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
        else _shared(store, ranks, topology, settings, name)
    )
    coordinator.operation = name
    try:
        yield coordinator
    finally:
        coordinator.close()


@contextlib.contextmanager
def joined(settings: Settings, topology: Topology, name: str) -> Iterator[Coordinator]:
    """Open an operation among the processes that a launcher started together, without any process group.

    For the command line. The store is `torch.distributed`'s own, found by ``MASTER_ADDR`` and ``MASTER_PORT`` as
    torchrun sets them; under Slurm and MPI they are derived when they are missing.
    """
    if topology.world_size == 1:
        with contextlib.closing(LocalCoordinator(topology.host)) as coordinator:
            coordinator.operation = name
            yield coordinator
        return
    store = _rendezvous(topology, settings)
    try:
        ranks = tuple(range(topology.world_size))
        with contextlib.closing(_shared(store, ranks, topology, settings, name, topology.rank)) as coordinator:
            yield coordinator
    finally:
        _part(store, topology, settings)


def _members(group: ProcessGroup | None) -> tuple[Store | None, tuple[int, ...]]:
    """Find the store that connects the ranks of a group, and these; no store for one rank, no ranks for no group."""
    # A process that has not imported torch has no process group: no reason to import it.
    if "torch.distributed" not in sys.modules:
        return None, ()
    from torch import distributed as dist

    if not dist.is_available() or not dist.is_initialized() or (group is None and dist.get_world_size() == 1):
        return None, ()
    # torch gives a number in place of the group to those that are not in it.
    if group is not None and dist.get_rank(group) < 0:
        raise BadRequest(f"rank {dist.get_rank()} is not in the group that it calls for")
    ranks = tuple(range(dist.get_world_size())) if group is None else tuple(dist.get_process_group_ranks(group))
    if len(ranks) == 1:
        return None, ranks
    # There is no public way to the default group's store; torch's own checkpointing and vLLM use this one.
    store: Store = dist.distributed_c10d._get_default_store()  # noqa: SLF001
    return store, ranks


def _shared(
    store: Store, ranks: tuple[int, ...], topology: Topology, settings: Settings, name: str, rank: int | None = None
) -> Coordinator:
    global _clients
    from torch import distributed as dist

    from weightferry.cluster.distributed import DistributedCoordinator
    from weightferry.cluster.store import StoreClients

    if _clients is None or _clients.store is not store or _clients.lost:
        _clients = StoreClients(store)
    # An elastic restart may find the store of the attempt before it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    members = zlib.crc32(",".join(map(str, ranks)).encode())
    prefix = f"weightferry/{attempt}/{members:08x}/{_operations[ranks]}"
    _operations[ranks] += 1
    place = ranks.index(dist.get_rank() if rank is None else rank)
    return DistributedCoordinator(_clients, prefix, place, ranks, topology, settings, name)


def _rendezvous(topology: Topology, settings: Settings) -> Store:
    # What the store's client says of a peer that left is said better by us; torch reads it when it is imported.
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
            f"rank {topology.rank} on {topology.host} could not meet the other {topology.world_size - 1} ranks at "
            f"{where} (MASTER_ADDR:MASTER_PORT): {error}"
        ) from error
    return found


def _part(store: Store, topology: Topology, settings: Settings) -> None:
    """Leave together: the store may live in rank 0, and a launcher that sees one rank fail ends the others at once."""
    from torch import distributed as dist

    mine, first = f"weightferry/bye/{topology.rank}", "weightferry/bye/0"
    everybody = [f"weightferry/bye/{rank}" for rank in range(1, topology.world_size)]
    limit = timedelta(seconds=settings.beat_timeout)
    with contextlib.suppress(dist.DistError):
        if topology.rank == 0:
            store.wait(everybody, limit)
            store.set(first, "")
            store.wait([f"{first}/read"], limit)
        else:
            store.set(mine, "")
            store.wait([first], limit)
            if store.add("weightferry/bye", 1) == topology.world_size - 1:
                store.set(f"{first}/read", "")


def master(topology: Topology, environ: Mapping[str, str]) -> dict[str, str]:
    """Find where rank 0 holds the store: ``MASTER_ADDR`` and ``MASTER_PORT``, derived where they are not set.

    Raises
    ------
    NotDistributed
        The launcher does not say which node has rank 0.
    """
    address = environ.get("MASTER_ADDR") or _address(topology, environ)
    port = environ.get("MASTER_PORT") or str(_port(environ))
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _address(topology: Topology, environ: Mapping[str, str]) -> str:
    if topology.local_world_size == topology.world_size:
        return "127.0.0.1"
    # Below mpirun the step is the one of its daemons; its ranks begin on the first node of the job.
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
    # Slurm's own tool knows its own short form, w[0-3,7].
    listed = run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout.split():
        raise BadRequest(f"scontrol could not expand {nodes!r}: {listed.stderr.strip()}; set MASTER_ADDR")
    return listed.stdout.split()[0]


def _port(environ: Mapping[str, str]) -> int:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
    return port_for("/".join(environ.get(name, "") for name in names))


def port_for(job: str) -> int:
    """Choose a port that all ranks of one job, and hardly those of any other, choose too; below the ephemeral ports."""
    return 20000 + zlib.crc32(job.encode()) % 10000
