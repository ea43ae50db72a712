"""The store on which the ranks of a launcher meet: where it is, who holds it, and why a rank cannot join it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from subprocess import run
from typing import TYPE_CHECKING

from weightferry.cluster.call_site import CallSite
from weightferry.cluster.launchers import Topology
from weightferry.errors import BadRequest, CollectError, NotDistributed
from weightferry.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

_WARN_AFTER = 8.0  # seconds without a connection to the store
_SLACK = 1.0  # seconds for the store's client to give up by itself: its error says more
_PROBE = 1.0  # seconds to connect, to find out why the store's client could not
# Variables that are equal in all ranks of one job, and different in two jobs.
_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
# Keys of the store.
_JOB, _MEMBER = "weightferry/job", "weightferry/member"


@dataclass(frozen=True)
class StoreAddress:
    """Where the store of the job is: ``MASTER_ADDR``, and ``MASTER_PORT`` or a port that follows from it."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def master(topology: Topology, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the address of the store on rank 0: ``MASTER_ADDR`` and ``MASTER_PORT``, derived if they are not set.

    Raises
    ------
    NotDistributed
        The launcher does not tell which node has rank 0.
    BadRequest
        ``MASTER_PORT`` is not the number of a port.
    """
    address = environ.get("MASTER_ADDR") or _first_host(topology, environ)
    port = environ.get("MASTER_PORT") or str(_port(environ))
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise BadRequest(f"MASTER_PORT must be a number from 1 to 65535, it is {port!r}: set it, equal on all ranks")
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def address_beside_process_group(topology: Topology, environ: Mapping[str, str]) -> StoreAddress:
    """Return the address of a store that leaves ``MASTER_PORT`` free for a later `init_process_group`.

    torchrun's agent holds a store at ``MASTER_PORT``, which all of its ranks may use.
    """
    found = master(topology, environ)
    if has_agent_store():
        return StoreAddress(found["MASTER_ADDR"], int(found["MASTER_PORT"]))
    return StoreAddress(
        found["MASTER_ADDR"], port_for("/".join((found["MASTER_ADDR"], found["MASTER_PORT"], "weightferry")))
    )


def has_agent_store() -> bool:
    """Return whether the agent of torchrun holds a store for its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def connect_store(
    topology: Topology, settings: Settings, address: StoreAddress, call_site: Callable[[], CallSite]
) -> Store:
    """Connect to the store at an address; rank 0 holds it, unless the agent of torchrun does.

    Does not wait until all ranks have connected: the first phase does, and can say which ranks are missing.

    Parameters
    ----------
    call_site
        Returns where the user's code makes the call, for a warning.

    Raises
    ------
    NotDistributed
        Within `agree_timeout` this rank could not connect to a store of its job.
    BadRequest
        Another process has the rank of this one.
    """
    from torch import distributed as dist

    from weightferry.cluster.store import call_abandonable

    began, warned = time.monotonic(), False

    def connect() -> Store:
        timeout = timedelta(seconds=settings.agree_timeout)
        store = dist.TCPStore(
            address.host, address.port, topology.world_size, _holds_store(topology), timeout, wait_for_workers=False
        )
        join_job(store, topology, address)
        return store

    def check() -> None:
        nonlocal warned
        waited = time.monotonic() - began
        if waited > settings.agree_timeout + _SLACK:
            # The client has a timeout of its own. It does not end when the peer accepts and then says nothing.
            raise _not_connected(topology, settings, address, "")
        if waited > min(_WARN_AFTER, settings.agree_timeout / 2) and not warned:
            warned = True
            logger.warning(
                "waiting for %.0f s for the store of rank 0 at %s: rank %d calls %s; rank 0 did not call yet, or "
                "cannot be reached there",
                waited,
                address,
                topology.rank,
                call_site(),
            )

    try:
        return call_abandonable(connect, check)
    except CollectError:
        raise
    except (dist.DistError, RuntimeError) as error:
        raise _not_connected(topology, settings, address, str(error).partition("\n")[0]) from error


def join_job(store: Store, topology: Topology, address: StoreAddress) -> None:
    """Make sure that a store is of the job of this rank, and that no other process has this rank; may wait for rank 0.

    Raises
    ------
    NotDistributed
        The store is of another job, or the ranks disagree on the size of the job.
    BadRequest
        Another process has the rank of this one.
    """
    job, agent = _job(topology), has_agent_store()
    # An elastic restart may reuse the store, with another number of ranks.
    key = f"{_JOB}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    found = (store.compare_set(key, "", job) if agent or topology.rank == 0 else store.get(key)).decode()
    if found != job:
        raise NotDistributed(
            f"rank {topology.rank} on {topology.host} found the store of another job at {address}: it is of {found}, "
            f"and this rank of {job}. Set MASTER_PORT to a port that no other job uses, and WORLD_SIZE to the same "
            "number on all ranks."
        )
    if agent:
        return  # it outlives a process: a rank may run a command, and then a script
    process = f"process {os.getpid()} on {topology.host}"
    owner = store.compare_set(f"{_MEMBER}/{topology.rank}", "", process).decode()
    if owner != process:
        raise BadRequest(
            f"{process} and {owner} both are rank {topology.rank} of the job at {address}. Give each process a number "
            "of its own in RANK (under srun: RANK=$SLURM_PROCID), and each job a MASTER_PORT of its own."
        )


def _job(topology: Topology) -> str:
    """Return a text that is equal on all ranks of a job; it differs between jobs where the launcher numbers them."""
    text = f"{topology.world_size} ranks under {topology.launcher}"
    # Ranks whose variables are set by hand may be in several steps of Slurm.
    names = () if topology.launcher == "torchrun" else _JOB_VARIABLES
    numbers = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return " ".join([text, *numbers])


def _not_connected(topology: Topology, settings: Settings, address: StoreAddress, error: str) -> NotDistributed:
    reason = _reason_at_holder(address, error) if _holds_store(topology) else _reason_at_client(address)
    text = (
        f"rank {topology.rank} on {topology.host} could not connect to the other {topology.world_size - 1} ranks at "
        f"{address} within {settings.agree_timeout:g} s: {reason}"
    )
    return NotDistributed(f"{text} ({error})" if error else text)


def _holds_store(topology: Topology) -> bool:
    return topology.rank == 0 and not has_agent_store()


def _reason_at_holder(address: StoreAddress, error: str) -> str:
    """Find out why rank 0 could not hold the store, or could not reach its own."""
    if error and not _is_free(address.port):  # without an error, this process still has the port
        return (
            "another program uses this port, or another process of this node has rank 0 too. Set MASTER_PORT to a free "
            "port, and RANK to another number in each process."
        )
    return "this node has no such address. Set MASTER_ADDR to an address of the node of rank 0."


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def _reason_at_client(address: StoreAddress) -> str:
    """Find out why the client of a store could not connect."""
    try:
        socket.create_connection((address.host, address.port), _PROBE).close()
    except socket.gaierror:
        return f"this host cannot resolve {address.host}. Set MASTER_ADDR to the IP address of the node of rank 0."
    except OSError:
        return (
            "nothing answers there. Rank 0 must make the same call, and MASTER_ADDR must lead to its node; to work in "
            "this process alone, pass coordinate=False."
        )
    return (
        "a program that is no store of this job listens there, or stopped answering. Set MASTER_ADDR and MASTER_PORT "
        "to the node of rank 0 and to a free port on it."
    )


def leave_together(store: Store, topology: Topology, key: str, seconds: float) -> None:
    """Wait for the other ranks: the store may be in rank 0, and a launcher ends all ranks as soon as one rank fails."""
    from torch import distributed as dist

    others = [f"{key}/{rank}" for rank in range(1, topology.world_size)]
    limit = timedelta(seconds=seconds)
    with contextlib.suppress(dist.DistError):
        if topology.rank == 0:
            store.wait(others, limit)
            store.set(f"{key}/0", "")
            store.wait([f"{key}/0/read"], limit)
        else:
            store.set(f"{key}/{topology.rank}", "")
            store.wait([f"{key}/0"], limit)
            if store.add(key, 1) == topology.world_size - 1:
                store.set(f"{key}/0/read", "")


def _first_host(topology: Topology, environ: Mapping[str, str]) -> str:
    if topology.local_world_size == topology.world_size:
        return "127.0.0.1"
    # Under mpirun the Slurm step is that of its daemons. Its ranks start on the first node of the job.
    nodes = environ.get("SLURM_STEP_NODELIST" if topology.launcher == "slurm" else "SLURM_JOB_NODELIST")
    if nodes:
        return _first_node(nodes)
    raise NotDistributed(
        f"{topology.launcher} started {topology.world_size} ranks and does not say which node has rank 0: set "
        "MASTER_ADDR to its address (mpirun -x MASTER_ADDR=...)"
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
    return port_for("/".join(environ.get(name, "") for name in _JOB_VARIABLES))


def port_for(job: str) -> int:
    """Return a port that all ranks of one job choose, and hardly any other job; below the ephemeral ports."""
    return 20000 + zlib.crc32(job.encode()) % 10000
