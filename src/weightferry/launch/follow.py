"""Follow a submitted job: its output as it comes, and at the end its exit code."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import submitit

from weightferry.launch.tasks import exit_codes

_LOOK_EVERY = 0.5  # seconds, at the logs
_ASK_EVERY = 5.0  # seconds, at the queue
_SETTLE = 10.0  # seconds for results to show on a network file system after the job has left the queue


def follow(job: submitit.Job[Any], say: Callable[[str], None]) -> int:
    """Pass on what the tasks of a job print until it ends.

    Parameters
    ----------
    job
        As `submit` or `submit_command` returned it.
    say
        Takes one line, in front of it the task's number when there are several.

    Returns
    -------
    int
        0; or what the command of the first failed task ended with; or 1.
    """
    tails = [
        _LogTail(path, f"[{number}] " if job.num_tasks > 1 else "")
        for number in range(job.num_tasks)
        for path in (job.task(number).paths.stdout, job.task(number).paths.stderr)
    ]
    asked = time.monotonic()
    ended = False
    while not ended:
        ended = all(_has_result(job, number) for number in range(job.num_tasks))
        if not ended and time.monotonic() - asked > _ASK_EVERY:
            asked = time.monotonic()
            ended = _left_queue(job)
        for tail in tails:
            for line in tail.new_lines(whole=not ended):
                say(line)
        if not ended:
            time.sleep(_LOOK_EVERY)
    errors = _errors(job)
    if not errors:
        return 0
    say(errors[0])
    failed = [code for _, code in sorted(exit_codes(job).items()) if code]
    # When one task fails, Slurm ends the others: their signals are not what went wrong.
    return next((code for code in failed if code > 0), 1)


def _has_result(job: submitit.Job[Any], number: int) -> bool:
    return job.task(number).paths.result_pickle.exists()


def _left_queue(job: submitit.Job[Any]) -> bool:
    """Ask whether the job is over, results or not.

    submitit asks sacct, once a minute; sacct knows nothing where there is no accounting, the queue always does.
    """
    if not isinstance(job, submitit.SlurmJob):
        return bool(job.done())
    answer = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True, check=False)
    # A job that left long ago is no job to squeue: it says so, and exits with 1. A slurmctld that does not answer
    # says nothing of the job.
    return not answer.stdout.strip() if answer.returncode == 0 else "Invalid job id" in answer.stderr


def _errors(job: submitit.Job[Any]) -> list[str]:
    """What went wrong, by task; a rank that names another one says most and comes first."""
    until = time.monotonic() + _SETTLE
    while not all(_has_result(job, n) for n in range(job.num_tasks)) and time.monotonic() < until:
        time.sleep(_LOOK_EVERY)
    errors, silent = [], []
    for number in range(job.num_tasks):
        if not _has_result(job, number):
            silent.append(str(number))
        elif (error := job.task(number).exception()) is not None:
            errors.append(str(error))
    if silent:
        errors.append(f"tasks {', '.join(silent)} of job {job.job_id} were ended before they could say anything")
    return errors


class _LogTail:
    """The lines that were added to a file since the last look."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix, self._read = path, prefix, 0

    def new_lines(self, *, whole: bool) -> Iterator[str]:
        """Yield them; a last line without its end only when not `whole`."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return
        if whole:
            text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        for line in text.decode(errors="replace").splitlines():
            yield f"{self._prefix}{line}"
