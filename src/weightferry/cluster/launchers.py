"""Rank and world size of this process, from the launcher's environment variables.

These variables are hints. An existing process group knows better and wins.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weightferry.errors import BadRequest


@dataclass(frozen=True)
class Launcher:
    """The variables that a launcher sets.

    Attributes
    ----------
    name
        Name of the launcher, for errors.
    rank, world_size, local_rank, local_world_size, node_rank
        Names of variables. The launcher always sets the first two; the others may be missing.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    node_rank: str = ""


# The first launcher that matches wins. torchrun and mpirun come before Slurm: inside an allocation, SLURM_PROCID is the
# rank of their agent or daemon. For Slurm the size of the step counts, not SLURM_NTASKS: a batch script outside srun
# has SLURM_PROCID=0 and SLURM_NTASKS=N, yet is a single process (seen with Slurm 22.05).
LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    Launcher(
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher(
        "slurm",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NODEID",
    ),
    # submitit's local executor uses one node only.
    Launcher(
        "submitit",
        "SUBMITIT_LOCAL_GLOBALID",
        "SUBMITIT_LOCAL_NTASKS",
        "SUBMITIT_LOCAL_LOCALID",
        "SUBMITIT_LOCAL_NTASKS",
    ),
    Launcher("pmix", "PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE"),
)

_CORRECT = "Correct them, or start the ranks with torchrun, srun or mpirun, which set them."
_COMPLETE = (
    "Set both in each process of a job, as torchrun does; in a process that is no rank of a job, remove it, or pass "
    "coordinate=False."
)


@dataclass(frozen=True)
class Topology:
    """The place of one process in the job.

    Attributes
    ----------
    rank, world_size : int
        As in torchrun.
    local_rank : int
        Rank among the ranks of the node, as the launcher counts.
    local_world_size : int or None
        Number of ranks on this node; None if the launcher does not tell.
    launcher : str
        Name of the launcher; ``alone`` if there is none.
    host : str
        Host name.
    node_rank : str
        The launcher's number of the node, or empty. Two agents of torchrun on one host are two nodes.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = 1
    launcher: str = "alone"
    host: str = "localhost"
    node_rank: str = ""


def read_topology(environ: Mapping[str, str] | None = None, host: Callable[[], str] = socket.gethostname) -> Topology:
    """Return the place of this process, read from the environment.

    Raises
    ------
    BadRequest
        The variables of a launcher contradict each other, or only a part of them is set.
    """
    environ = os.environ if environ is None else environ
    for launcher in LAUNCHERS:
        if launcher.rank in environ and launcher.world_size in environ:
            return _read(launcher, environ, host())
    _check_half_set(environ)
    return Topology(host=host())


def read_hints(environ: Mapping[str, str] | None = None, host: Callable[[], str] = socket.gethostname) -> Topology:
    """Return the same for a process whose ranks are known otherwise; variables that make no sense count as not set."""
    try:
        return read_topology(environ, host)
    except BadRequest:
        return Topology(host=host())


def _read(launcher: Launcher, environ: Mapping[str, str], host: str) -> Topology:
    rank, size = _int(environ, launcher.rank), _int(environ, launcher.world_size)
    _check_below(launcher.rank, rank, launcher.world_size, size)
    local_rank = _int(environ, launcher.local_rank) if environ.get(launcher.local_rank) else 0
    local_size = environ.get(launcher.local_world_size, "")
    # Slurm writes "2(x4),1" when nodes differ. That is no number, and is not needed.
    known_local_size = int(local_size) if local_size.isdigit() else None
    if known_local_size is not None:
        _check_below(launcher.local_rank, local_rank, launcher.local_world_size, known_local_size)
        if known_local_size > size:
            raise BadRequest(
                f"{launcher.local_world_size}={known_local_size} ranks on one node are more than {launcher.world_size}="
                f"{size} ranks of the job. {_CORRECT}"
            )
    return Topology(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=known_local_size,
        launcher=launcher.name,
        host=host,
        node_rank=environ.get(launcher.node_rank, ""),
    )


def _check_below(rank_name: str, rank: int, size_name: str, size: int) -> None:
    if not 0 <= rank < size:
        raise BadRequest(
            f"{rank_name}={rank} is not a rank of {size_name}={size}: ranks are numbered from 0 to {size_name}-1. "
            f"{_CORRECT}"
        )


def _check_half_set(environ: Mapping[str, str]) -> None:
    """Raise an error if ``RANK`` or ``WORLD_SIZE`` is missing: each rank would take itself for a whole job."""
    if "RANK" in environ:
        raise BadRequest(f"RANK={environ['RANK']} is set, and WORLD_SIZE is not. {_COMPLETE}")
    # A batch script of Slurm often sets the size for its ranks, and has no rank itself.
    if environ.get("WORLD_SIZE", "1") != "1" and "SLURM_JOB_ID" not in environ:
        raise BadRequest(f"WORLD_SIZE={environ['WORLD_SIZE']} is set, and RANK is not. {_COMPLETE}")


def _int(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise BadRequest(f"{name} must be a whole number, it is {environ[name]!r}. {_CORRECT}") from None
