"""Hand a function or a command to submitit, with what ranks need around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import submitit

from weightferry.errors import BadRequest
from weightferry.launch.tasks import CommandTask, RankTask, is_torchrun


def submit(
    fn: Callable[..., Any],
    *args: Any,
    nodes: int = 1,
    tasks_per_node: int = 1,
    cluster: str = "slurm",
    folder: str | Path = "weightferry-jobs",
    timeout_min: int = 60,
    backend: str | None = None,
    stage: Iterable[str] = (),
    requeue: bool = True,
    **kwargs: Any,
) -> submitit.Job[Any]:
    """Run ``fn(*args, **kwargs)`` on every rank of a job.

    Every task has the variables of torchrun (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...), an initialised process
    group over an interface that leads to the other nodes, and the sources in `stage` on its node.

    Parameters
    ----------
    fn
        Pickled by cloudpickle.
    nodes, tasks_per_node
        How many.
    cluster
        ``slurm``; ``local``: processes on this machine; ``debug``: in this process.
    folder
        For scripts, logs and results; every node must see it.
    timeout_min
        Minutes until Slurm ends the job. It is warned before; see `requeue`.
    backend
        Of the process group; None: nccl where there is a GPU, else gloo.
    stage
        Sources, as for `weightferry.stage`.
    requeue
        On time-out or preemption, start the job again under the same id: `fn` runs again from its beginning, and finds
        what its first life staged and saved.
    **kwargs
        Those that start with ``slurm_`` go to submitit's executor (``slurm_partition="gpu"``), the others to `fn`.

    Returns
    -------
    submitit.Job
        When one rank raises, its ``exception()`` names that rank and holds the text.
    """
    options = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("slurm_")}
    task = RankTask(fn, args, kwargs, backend, tuple(stage), requeue)
    return _executor(cluster, folder, nodes, tasks_per_node, timeout_min, requeue, options).submit(task)


def submit_command(
    command: Sequence[str],
    *,
    nodes: int = 1,
    tasks_per_node: int = 1,
    cluster: str = "slurm",
    folder: str | Path = "weightferry-jobs",
    timeout_min: int = 60,
    stage: Iterable[str] = (),
    requeue: bool = True,
    **options: Any,
) -> submitit.Job[int]:
    """Run a command in every task of a job, with requeue.

    A command that is no torchrun is a rank, with the variables of torchrun set. A torchrun makes ranks of its own: it
    runs once a node, meets the other nodes by itself, and sees no rank variables of ours.

    Parameters
    ----------
    command
        Program and arguments; no shell.
    **options
        ``slurm_...``, for submitit's executor. The others as for `submit`.

    Raises
    ------
    BadRequest
        The command is empty, or a torchrun with several tasks a node.
    """
    if not command:
        raise BadRequest("no command to run")
    if is_torchrun(command) and tasks_per_node != 1:
        raise BadRequest("torchrun starts the ranks of a node itself: use one task a node, and its --nproc-per-node")
    task = CommandTask(tuple(command), tuple(stage), requeue)
    return _executor(cluster, folder, nodes, tasks_per_node, timeout_min, requeue, options).submit(task)


def _executor(
    cluster: str,
    folder: str | Path,
    nodes: int,
    tasks_per_node: int,
    timeout_min: int,
    requeue: bool,
    options: dict[str, Any],
) -> submitit.AutoExecutor:
    unknown = [name for name in options if not name.startswith("slurm_")]
    if unknown:
        raise BadRequest(f"not an option: {', '.join(unknown)}; options for Slurm start with slurm_")
    if cluster == "slurm":
        # A rank that fails ends the step; without it srun waits for the others for ever.
        srun_args = ["--kill-on-bad-exit=1", *options.pop("slurm_srun_args", ())]
        # Slurm itself starts a job again when one of its nodes dies.
        again = {"requeue" if requeue else "no-requeue": True} | options.pop("slurm_additional_parameters", {})
        options = {"slurm_srun_args": srun_args, "slurm_additional_parameters": again, **options}
    executor = submitit.AutoExecutor(folder=Path(folder).expanduser().absolute(), cluster=cluster)
    executor.update_parameters(nodes=nodes, tasks_per_node=tasks_per_node, timeout_min=timeout_min, **options)
    return executor
