"""What runs in each task of a job: submitit pickles one of these and calls it on every rank."""

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
from weightferry.launch.environment import RANK_VARIABLES, TaskEnvironment
from weightferry.launch.watchdog import watchdog

# Seconds that rank 0 stays after it asked Slurm to requeue the job: Slurm ends the whole step within moments, and a
# rank that leaves first would make its peers fail over its closed connections.
_UNTIL_KILLED = 60.0
# Seconds for all ranks to notice a failure, or for their watchdogs to end them.
_UNTIL_ALL_KNOW = 20.0


class CommandFailed(CollectError):
    """A command ended with another code than 0."""


class JobCut(CollectError):
    """The job is ended before its time and does not start again."""


@dataclass
class RankTask:
    """Ranks, a process group, staged sources, then the function.

    Attributes
    ----------
    fn, args, kwargs
        What to run.
    backend : str or None
        Of the process group; None: nccl where there is a GPU, else gloo.
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
        """Run on one rank; the group is destroyed whatever happens.

        Raises
        ------
        CollectError
            On every rank, naming the rank that failed first.
        """
        _forget_former_life()
        place = TaskEnvironment.here()
        place.export("ranks")
        with process_group(self.backend, place):
            stage_all(self.sources)
            return run_together(lambda: self.fn(*self.args, **self.kwargs))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Tell submitit how the job goes on; it asks on rank 0 before the time is up, or on preemption."""
        return _next_life(self, self.requeue)


@dataclass
class CommandTask:
    """Staged sources, then a command.

    Attributes
    ----------
    command : tuple of str
        Run without a shell.
    """

    command: tuple[str, ...]
    sources: tuple[str, ...] = ()
    requeue: bool = True

    def __call__(self) -> int:
        """Run in one task.

        Raises
        ------
        CommandFailed
            The command did not end with 0.
        """
        _forget_former_life()
        place = TaskEnvironment.here()
        if self.sources:
            place.export("stage")
            with process_group("gloo", place):
                stage_all(self.sources)
        command, environ = prepared(self.command, place, os.environ)
        with staying_until_killed():
            code = _run(command, environ)
        _exit_code_file(submitit.JobEnvironment().paths.folder, place.job_id, place.rank).write_text(str(code))
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            raise CommandFailed(f"task {place.rank} on {submitit.JobEnvironment().hostname}: {self.command[0]}: {how}")
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """See `RankTask.checkpoint`."""
        return _next_life(self, self.requeue)


def _next_life(task: Any, requeue: bool) -> submitit.helpers.DelayedSubmission:
    if not requeue:
        raise JobCut("the time limit of the job is near, or it is preempted; it was submitted with requeue=False")
    return submitit.helpers.DelayedSubmission(task)


def _exit_code_file(folder: Path, job_id: str, rank: int) -> Path:
    return folder / f"{job_id}_{rank}_exit_code"


def exit_codes(job: submitit.Job[Any]) -> dict[int, int]:
    """Read, by task, what the commands of a job ended with; a signal is a negative number."""
    files = {rank: _exit_code_file(job.paths.folder, job.job_id, rank) for rank in range(job.num_tasks)}
    return {rank: int(file.read_text()) for rank, file in files.items() if file.exists()}


def is_torchrun(command: Sequence[str]) -> bool:
    """Whether a command makes ranks of its own."""
    return os.path.basename(command[0]) == "torchrun" or "torch.distributed.run" in command  # noqa: PTH119


def prepared(
    command: Sequence[str], place: TaskEnvironment, environ: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment of one task.

    A torchrun gets the job's nodes to meet on, unless it names a meeting point itself, and no rank variables of ours;
    every other command is a rank.
    """
    clean = {name: value for name, value in environ.items() if name not in RANK_VARIABLES}
    variables = place.variables("command", environ)
    if not is_torchrun(command):
        return list(command), clean | variables
    clean |= {name: value for name, value in variables.items() if name not in RANK_VARIABLES}
    given = {word.partition("=")[0].replace("_", "-") for word in command}
    if given & {"--rdzv-endpoint", "--master-addr", "--standalone"}:
        return list(command), clean
    meet = [f"--nnodes={place.nodes}", f"--node-rank={place.node}", f"--master-addr={place.master_address}"]
    meet.append(f"--master-port={variables['MASTER_PORT']}")
    at = 1 if "torch.distributed.run" not in command else command.index("torch.distributed.run") + 1
    return [*command[:at], *meet, *command[at:]], clean


def _run(command: Sequence[str], environ: Mapping[str, str]) -> int:
    # Slurm sends the signal for requeue to every process of the step, and it ends those that do not expect it; ignoring
    # is inherited, and a command that wants the signal can still ask for it.
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, env=dict(environ))
    finally:
        signal.signal(signal.SIGUSR2, before)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _forget_former_life() -> None:
    """Remove the result of the life before a requeue: it would be taken for this one's."""
    submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)


@contextlib.contextmanager
def process_group(backend: str | None, place: TaskEnvironment) -> Iterator[None]:
    """Hold an initialised process group."""
    import torch
    from torch import distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    dist.init_process_group(backend or ("nccl" if gpu else "gloo"))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def staying_until_killed() -> Iterator[None]:
    """After a requeue under Slurm, keep the connections to the peers until Slurm ends them all."""
    try:
        yield
    except SystemExit:
        if submitit.JobEnvironment().cluster == "slurm":
            sys.stderr.flush()
            time.sleep(_UNTIL_KILLED)
        raise


def stage_all(sources: Sequence[str]) -> None:
    """Stage every source on every node."""
    from weightferry.staging import stage

    for source in sources:
        stage(source)


def run_together(work: Callable[[], Any]) -> Any:
    """Run `work` on every rank; when it fails on one, end all, with that failure's name."""
    from torch.distributed import destroy_process_group

    from weightferry.cluster.connect import operation
    from weightferry.settings import Settings

    value: list[Any] = []

    def held() -> None:
        # Inside the round: the others must not learn of a rank that leaves because the job starts again.
        with staying_until_killed():
            value.append(work())

    with operation(Settings.from_environ(), "run") as coordinator:
        try:
            with watchdog(coordinator):
                coordinator.round("run", held, lambda _: None)
        except CollectError:
            # Peers inside a collective notice by the closed connections. And srun ends the whole step as soon as one
            # rank fails: not before the others could say why.
            destroy_process_group()
            coordinator.all_told(_UNTIL_ALL_KNOW)
            raise
    return value[0]
