"""Follow a submitted job: print the output of its tasks until it ends, then return its exit code."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import submitit

from weightferry.launch.tasks import exit_codes

_LOG_INTERVAL = 0.5  # seconds between reads of the logs
_QUEUE_INTERVAL = 5.0  # seconds between calls of squeue
_RESULT_TIMEOUT = 10.0  # seconds for results to appear on a network file system after the job has left the queue


def follow(job: submitit.Job[Any], print_line: Callable[[str], None]) -> int:
    """Print the output of the tasks of a job until the job ends.

    Parameters
    ----------
    job
        As `submit` or `submit_command` returned it.
    print_line
        Called with each line. If the job has several tasks, the line starts with the number of its task.

    Returns
    -------
    int
        0 if no task failed; else the exit code of the command of the first failed task, or 1.
    """
    tails = [
        _LogTail(path, f"[{number}] " if job.num_tasks > 1 else "")
        for number in range(job.num_tasks)
        for path in (job.task(number).paths.stdout, job.task(number).paths.stderr)
    ]
    last_check = time.monotonic()
    ended = False
    while not ended:
        ended = all(_has_result(job, number) for number in range(job.num_tasks))
        if not ended and time.monotonic() - last_check > _QUEUE_INTERVAL:
            last_check = time.monotonic()
            ended = _left_queue(job)
        for tail in tails:
            for line in tail.new_lines(only_complete=not ended):
                print_line(line)
        if not ended:
            time.sleep(_LOG_INTERVAL)
    errors = _errors(job)
    if not errors:
        return 0
    print_line(errors[0])
    failed = [code for _, code in sorted(exit_codes(job).items()) if code]
    # When one task fails, Slurm ends the other tasks with a signal: a negative code is not the cause.
    return next((code for code in failed if code > 0), 1)


def _has_result(job: submitit.Job[Any], number: int) -> bool:
    return job.task(number).paths.result_pickle.exists()


def _left_queue(job: submitit.Job[Any]) -> bool:
    """Return whether the job has ended, with or without results.

    submitit calls sacct, once a minute. sacct has no data on clusters without accounting; squeue always has.
    """
    if not isinstance(job, submitit.SlurmJob):
        return bool(job.done())
    answer = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True, check=False)
    # For a job that left the queue long ago, squeue exits with 1 and this text. If slurmctld does not answer, squeue
    # fails too, and the job may still run.
    return not answer.stdout.strip() if answer.returncode == 0 else "Invalid job id" in answer.stderr


def _errors(job: submitit.Job[Any]) -> list[str]:
    """Return the errors of the tasks, in the order of tasks, then one line for the tasks without a result."""
    deadline = time.monotonic() + _RESULT_TIMEOUT
    while not all(_has_result(job, n) for n in range(job.num_tasks)) and time.monotonic() < deadline:
        time.sleep(_LOG_INTERVAL)
    errors, without_result = [], []
    for number in range(job.num_tasks):
        if not _has_result(job, number):
            without_result.append(str(number))
        elif (error := job.task(number).exception()) is not None:
            errors.append(str(error))
    if without_result:
        errors.append(
            f"tasks {', '.join(without_result)} of job {job.job_id} ended without a result: they were killed, or their "
            f"node failed. See the logs in {job.paths.folder}, and `sacct --jobs={job.job_id}`"
        )
    return errors


class _LogTail:
    """Reads the lines that were added to a file since the last read."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix, self._position = path, prefix, 0

    def new_lines(self, *, only_complete: bool) -> Iterator[str]:
        """Yield the new lines; the last line without a line end is left for later if `only_complete`."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return
        if only_complete:
            text = text[: text.rfind(b"\n") + 1]
        self._position += len(text)
        for line in text.decode(errors="replace").splitlines():
            yield f"{self._prefix}{line}"
