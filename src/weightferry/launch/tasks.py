"""The callables that run in each task of a job: submitit pickles one of them and calls it on every rank."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit

from weightferry.errors import CollectError
from weightferry.launch.submitit_environment import RANK_VARIABLES, TaskEnvironment
from weightferry.launch.watchdog import watchdog

# Seconds that rank 0 stays after it asked Slurm to requeue the job. Slurm ends the whole step within moments. If a rank
# ended before, its closed connections would make its peers fail.
_STEP_END_TIMEOUT = 60.0
# Seconds for all ranks to learn of a failure, or for their watchdogs to end them.
_FAILURE_NOTICE_TIMEOUT = 20.0


class CommandFailed(CollectError):
    """A command ended with an exit code other than 0."""


class JobEndedEarly(CollectError):
    """The job ends before its work is complete, and is not requeued."""


@dataclass
class RankTask:
    """Joins the process group, stages the sources, then calls the function; one rank.

    Attributes
    ----------
    fn, args, kwargs
        The function and its arguments.
    backend : str or None
        Of the process group; None: nccl if there is a GPU, else gloo.
    sources : tuple of str
        Staged on every node before `fn` runs.
    requeue : bool
        Whether a time-out or preemption starts the job again.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    backend: str | None = None
    sources: tuple[str, ...] = ()
    requeue: bool = True

    def __call__(self) -> Any:
        """Run on one rank; the process group is destroyed in every case.

        Raises
        ------
        CollectError
            On every rank; it names the rank that failed first.
        """
        _remove_previous_result()
        environment = TaskEnvironment.from_submitit()
        environment.export("ranks")
        with process_group(self.backend, environment):
            stage_all(self.sources)
            return run_on_all_ranks(lambda: self.fn(*self.args, **self.kwargs))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return what submitit submits again; it calls this on rank 0 before a time-out, or on preemption."""
        return _resubmission(self, self.requeue)


@dataclass
class CommandTask:
    """Stages the sources, then runs a command.

    Attributes
    ----------
    command : tuple of str
        Program and arguments; it runs without a shell.
    sources : tuple of str
        Staged on every node before the command runs.
    requeue : bool
        Whether a time-out or preemption starts the job again.
    """

    command: tuple[str, ...]
    sources: tuple[str, ...] = ()
    requeue: bool = True

    def __call__(self) -> int:
        """Run the command in one task and return 0.

        Raises
        ------
        CommandFailed
            The exit code of the command is not 0.
        """
        _remove_previous_result()
        environment = TaskEnvironment.from_submitit()
        if self.sources:
            environment.export("stage")
            with process_group("gloo", environment):
                stage_all(self.sources)
        command, variables = command_for_task(self.command, environment, os.environ)
        with stay_on_requeue():
            code = _run(command, variables)
        _exit_code_file(submitit.JobEnvironment().paths.folder, environment.job_id, environment.rank).write_text(
            str(code)
        )
        if code:
            reason = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            raise CommandFailed(
                f"task {environment.rank} on {submitit.JobEnvironment().hostname}: {self.command[0]}: {reason}; "
                "the log of this task has its output"
            )
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """See `RankTask.checkpoint`."""
        return _resubmission(self, self.requeue)


def _resubmission(task: Any, requeue: bool) -> submitit.helpers.DelayedSubmission:
    if not requeue:
        raise JobEndedEarly(
            "the job ends early: its time limit is near or Slurm preempts it, and it was submitted with requeue=False. "
            "Submit it with requeue=True, or with a longer time limit"
        )
    return submitit.helpers.DelayedSubmission(task)


def _exit_code_file(folder: Path, job_id: str, rank: int) -> Path:
    return folder / f"{job_id}_{rank}_exit_code"


def exit_codes(job: submitit.Job[Any]) -> dict[int, int]:
    """Return, by task, the exit code of the command; a signal is a negative number."""
    files = {rank: _exit_code_file(job.paths.folder, job.job_id, rank) for rank in range(job.num_tasks)}
    return {rank: int(file.read_text()) for rank, file in files.items() if file.exists()}


def is_torchrun(command: Sequence[str]) -> bool:
    """Whether a command is torchrun, which starts ranks of its own."""
    return os.path.basename(command[0]) == "torchrun" or "torch.distributed.run" in command  # noqa: PTH119


def command_for_task(
    command: Sequence[str], environment: TaskEnvironment, environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment variables for one task.

    torchrun gets the job's nodes and a rendezvous address, unless the command has one, and no rank variables. Every
    other command is one rank.
    """
    base = {name: value for name, value in environ.items() if name not in RANK_VARIABLES}
    variables = environment.variables("command", environ)
    if not is_torchrun(command):
        return list(command), base | variables
    base |= {name: value for name, value in variables.items() if name not in RANK_VARIABLES}
    options = {word.partition("=")[0].replace("_", "-") for word in command}
    if options & {"--rdzv-endpoint", "--master-addr", "--standalone"}:
        return list(command), base
    rendezvous = [
        f"--nnodes={environment.nodes}",
        f"--node-rank={environment.node}",
        f"--master-addr={environment.master_address}",
        f"--master-port={variables['MASTER_PORT']}",
    ]
    position = 1 if "torch.distributed.run" not in command else command.index("torch.distributed.run") + 1
    return [*command[:position], *rendezvous, *command[position:]], base


def _run(command: Sequence[str], environ: Mapping[str, str]) -> int:
    # Slurm sends the requeue signal to every process of the step, and it kills those that do not handle it. A child
    # inherits an ignored signal; a command that wants the signal can still install a handler.
    previous = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, env=dict(environ))
    finally:
        signal.signal(signal.SIGUSR2, previous)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _remove_previous_result() -> None:
    """Remove the result from before a requeue, so that it is not taken for the result of this run."""
    submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)


@contextlib.contextmanager
def process_group(backend: str | None, environment: TaskEnvironment) -> Iterator[None]:
    """Initialize the default process group, and destroy it at the end of this context."""
    import torch
    from torch import distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(environment.local_rank % torch.cuda.device_count())
    dist.init_process_group(backend or ("nccl" if gpu else "gloo"))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def stay_on_requeue() -> Iterator[None]:
    """After a requeue under Slurm, keep the connections to the peers open until Slurm ends all ranks."""
    try:
        yield
    except SystemExit:
        if submitit.JobEnvironment().cluster == "slurm":
            sys.stderr.flush()
            time.sleep(_STEP_END_TIMEOUT)
        raise


def stage_all(sources: Sequence[str]) -> None:
    """Stage every source on every node."""
    from weightferry.staging import stage

    for source in sources:
        stage(source)


def run_on_all_ranks(work: Callable[[], Any]) -> Any:
    """Run `work` on every rank and return its value; if one rank fails, every rank raises an error that names it."""
    from torch.distributed import destroy_process_group

    from weightferry.cluster.connect import process_group_coordinator
    from weightferry.settings import Settings

    value: list[Any] = []

    def run_and_stay() -> None:
        # Inside the phase: a rank that ends because of a requeue must not be reported to its peers as failed.
        with stay_on_requeue():
            value.append(work())

    with process_group_coordinator(Settings.from_environ(), "run") as coordinator:
        try:
            with watchdog(coordinator):
                coordinator.run_phase("run", run_and_stay, lambda _: None)
        except CollectError:
            # The closed connections end the collectives of the peers. srun ends the whole step as soon as one rank
            # fails, so this rank stays until its peers have logged the reason.
            destroy_process_group()
            coordinator.wait_until_all_informed(_FAILURE_NOTICE_TIMEOUT)
            raise
    return value[0]
