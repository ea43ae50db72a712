"""Submit a function or a command to Slurm through submitit."""

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

    Every task has the environment variables of torchrun (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...), a process
    group over a network interface that reaches the other nodes, and the sources in `stage` on its node.

    Parameters
    ----------
    fn
        The function; cloudpickle pickles it and its arguments.
    nodes, tasks_per_node
        Number of nodes, and of tasks on each of them. Each task is one rank.
    cluster
        ``slurm``; ``local``: processes on this machine; ``debug``: in this process.
    folder
        Folder for scripts, logs and results, on storage that every node can access.
    timeout_min
        Time limit of the job in minutes. Slurm sends a signal before it; see `requeue`.
    backend
        Of the process group; None: nccl if there is a GPU, else gloo.
    stage
        Sources to stage on every node before `fn` runs, as for `weightferry.stage`.
    requeue
        Start the job again with the same id after a time-out or preemption. `fn` then runs again from its beginning;
        the staged files and the checkpoints that it saved are still there.
    **kwargs
        Arguments that start with ``slurm_`` go to submitit's executor (``slurm_partition="gpu"``), all other ones to
        `fn`.

    Returns
    -------
    submitit.Job
        If a rank raises an error, ``exception()`` names the rank and contains the text of the error.
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

    A command other than torchrun is one rank, with the environment variables of torchrun. torchrun starts ranks of its
    own: it runs once per node, gets the rendezvous address of the job, and sees no rank variables.

    Parameters
    ----------
    command
        Program and arguments; it runs without a shell.
    nodes, tasks_per_node, cluster, folder, timeout_min, stage, requeue
        As for `submit`.
    **options
        ``slurm_...``, for submitit's executor.

    Returns
    -------
    submitit.Job
        If a command fails, ``exception()`` names its task and its exit code.

    Raises
    ------
    BadRequest
        The command is empty, is torchrun with several tasks per node, or an option does not start with ``slurm_``.
    """
    if not command:
        raise BadRequest("no command to run: give a program and its arguments")
    if is_torchrun(command) and tasks_per_node != 1:
        raise BadRequest(
            f"torchrun starts the ranks of a node itself, but tasks_per_node is {tasks_per_node}: use one task a node, "
            "and torchrun's option --nproc-per-node"
        )
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
        raise BadRequest(f"unknown options: {', '.join(unknown)}; options for Slurm must start with slurm_")
    if cluster == "slurm":
        # A rank that fails must end the step: without this option, srun waits for the other ranks for ever.
        srun_args = ["--kill-on-bad-exit=1", *options.pop("slurm_srun_args", ())]
        # With "requeue", Slurm also starts the job again if one of its nodes fails.
        requeue_option = {"requeue" if requeue else "no-requeue": True} | options.pop("slurm_additional_parameters", {})
        options = {"slurm_srun_args": srun_args, "slurm_additional_parameters": requeue_option, **options}
    executor = submitit.AutoExecutor(folder=Path(folder).expanduser().absolute(), cluster=cluster)
    executor.update_parameters(nodes=nodes, tasks_per_node=tasks_per_node, timeout_min=timeout_min, **options)
    return executor
