"""Open a coordinator: of this process alone, of the caller's process group, or of the ranks that a launcher started."""

from __future__ import annotations

import contextlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from weightferry.cluster.call_site import CallSite, caller_of_package, find_call_site
from weightferry.cluster.coordinator import Coordinator, LocalCoordinator
from weightferry.cluster.launchers import Topology, read_hints, read_topology
from weightferry.cluster.rendezvous import (
    StoreAddress,
    address_beside_process_group,
    connect_store,
    leave_together,
    master,
)
from weightferry.errors import BadRequest
from weightferry.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

    from weightferry.cluster.store import StoreClients

# The clients of the store that was used last. A process has one default group at a time.
_clients: StoreClients | None = None

# The store on which the ranks of a launcher met before there was a process group.
_launcher_store: Store | None = None

# How many operations this process has opened, by the ranks that take part. All ranks open the same operations in the
# same order, so equal numbers name the same operation. A new process group in this process may use the same store, so
# the count goes on.
_operations: Counter[tuple[int, ...]] = Counter()


@contextlib.contextmanager
def process_group_coordinator(
    settings: Settings, name: str, *, group: ProcessGroup | None = None, alone: bool = False
) -> Iterator[Coordinator]:
    """Open an operation of the ranks of a process group, of the ranks of a launcher, or of this process alone.

    Without a process group, the ranks that a launcher (torchrun, srun, submitit, MPI) started together meet on a store:
    that of torchrun's agent, or one on a port of its own, so that a later `init_process_group` finds its port free.

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
        The environment says that there are several ranks, but there is no process group and the ranks cannot meet.
    BadRequest
        This process is not in `group`.
    """
    caller = caller_of_package()
    store, ranks = _members(group) if not alone else (None, (read_hints().rank,))
    topology = read_hints() if ranks else read_topology()
    with contextlib.ExitStack() as stack:
        if not ranks and topology.world_size > 1:
            store = _meet_before_process_group(topology, settings, name, caller)
            ranks = tuple(range(topology.world_size))
            key = f"weightferry/bye-{_operations[ranks]}"
            stack.enter_context(_leaving_together(store, topology, settings, key))
        coordinator = (
            LocalCoordinator(topology.host, topology.rank)
            if store is None
            else _distributed_coordinator(store, ranks, topology, settings, name, caller)
        )
        coordinator.operation = name
        stack.enter_context(coordinator)
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
    store = _rendezvous(topology, settings, name)
    ranks = tuple(range(topology.world_size))
    with (
        _leaving_together(store, topology, settings, "weightferry/bye"),
        _distributed_coordinator(store, ranks, topology, settings, name) as coordinator,
    ):
        yield coordinator


def _members(group: ProcessGroup | None) -> tuple[Store | None, tuple[int, ...]]:
    """Return the store that connects the ranks of a group, and these ranks.

    A group of one rank has no store. Without a process group there are no ranks either.

    Raises
    ------
    BadRequest
        This process is not in the group.
    """
    # A process that has not imported torch has no process group, so torch need not be imported here.
    if "torch.distributed" not in sys.modules:
        return None, ()
    from torch import distributed as dist

    if not dist.is_available() or not dist.is_initialized():
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


def has_other_ranks() -> bool:
    """Return whether this process is one of several ranks: of the default process group, or of a launcher."""
    store, ranks = _members(None)
    return store is not None or (not ranks and read_topology().world_size > 1)


def _distributed_coordinator(
    store: Store,
    ranks: tuple[int, ...],
    topology: Topology,
    settings: Settings,
    name: str,
    caller: FrameType | None = None,
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
    rank = ranks.index(dist.get_rank() if dist.is_initialized() else topology.rank)
    return DistributedCoordinator(_clients, prefix, rank, ranks, topology, settings, name, caller)


def _rendezvous(topology: Topology, settings: Settings, name: str) -> Store:
    """Return the store at ``MASTER_ADDR`` and ``MASTER_PORT``, for a process that needs this port for nothing else."""
    # Our errors describe a lost peer better than the log of the store's client. torch reads this variable at import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.update(master(topology, os.environ))
    address = StoreAddress(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return connect_store(topology, settings, address, lambda: CallSite(name))


def _meet_before_process_group(topology: Topology, settings: Settings, name: str, caller: FrameType | None) -> Store:
    """Return the store of a launcher's ranks, kept for the life of the process."""
    global _launcher_store
    if _launcher_store is None:
        address = address_beside_process_group(topology, os.environ)
        _launcher_store = connect_store(topology, settings, address, lambda: find_call_site(name, caller))
    return _launcher_store


@contextlib.contextmanager
def _leaving_together(store: Store, topology: Topology, settings: Settings, key: str) -> Iterator[None]:
    """Keep this rank until the other ranks have left too; after a failure, only until they must have learned of it."""
    try:
        yield
    except BaseException:
        leave_together(store, topology, key, 2 * settings.beat_interval)
        raise
    leave_together(store, topology, key, settings.beat_timeout)
