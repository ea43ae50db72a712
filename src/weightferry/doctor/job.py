"""Submits the measurement as a job, waits for its end, and fetches the findings."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from weightferry import launch
from weightferry.doctor.findings import Findings
from weightferry.doctor.measure import measure
from weightferry.doctor.request import CheckRequest
from weightferry.doctor.text import node_count

_POLL_INTERVAL = 0.5  # seconds
_SQUEUE_INTERVAL = 5.0
# Seconds from the moment when a job leaves the queue until its result must be visible on this machine.
_RESULT_TIMEOUT = 20.0


class NoFindings(Exception):
    """The job ended without findings."""


@dataclass(frozen=True)
class JobOptions:
    """How to run the job.

    Attributes
    ----------
    nodes : int
        The job has one task on each.
    cluster : str
        ``slurm`` or ``local``.
    folder : Path
        For scripts, logs and results; every node must see it. It is removed when the job succeeds.
    minutes, queue_minutes : int
        The job's time limit, and the longest wait for its start.
    sbatch : dict of str to (str or bool)
        Options of sbatch.
    """

    nodes: int
    cluster: str
    folder: Path
    minutes: int
    queue_minutes: int
    sbatch: dict[str, str | bool]


def run_job(request: CheckRequest, options: JobOptions, log: Callable[[str], None]) -> Findings:
    """Run the measurement as a job to its end, and return the findings.

    Parameters
    ----------
    log
        Gets the job's id when it is submitted, and the full text of an error.

    Raises
    ------
    NoFindings
        The job was refused, failed, or did not end in time; with the reason and the folder of its logs.
    """
    # Without accounting, submitit warns at every poll. The result files and squeue show the end of the job instead.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    job = _submit(request, options)
    log(f"job {job.job_id} on {node_count(options.nodes)}, logs in {options.folder}")
    with _cancelled_on_error(job):
        _wait(job, options)
        error = job.exception()
        if error is not None:
            log(str(error))
            raise NoFindings(f"{_last_error(str(error))}\nlogs: {options.folder}")
        findings: Findings = job.results()[0]
    shutil.rmtree(options.folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        options.folder.parent.rmdir()  # only if it is empty
    return findings


def _submit(request: CheckRequest, options: JobOptions) -> submitit.Job[Findings]:
    slurm: dict[str, Any] = {"slurm_additional_parameters": options.sbatch} if options.cluster == "slurm" else {}
    try:
        return launch.submit(
            measure,
            request,
            nodes=options.nodes,
            cluster=options.cluster,
            folder=options.folder,
            timeout_min=options.minutes,
            backend="gloo",
            requeue=False,
            **slurm,
        )
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError, submitit.core.utils.FailedJobError) as error:
        raise NoFindings(f"the job could not be submitted: {error}") from error


@contextlib.contextmanager
def _cancelled_on_error(job: submitit.Job[Findings]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # Also on control-C. Slurm ignores the cancellation of a job that has ended.
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            job.cancel(check=False)
        raise


def _wait(job: submitit.Job[Findings], options: JobOptions) -> None:
    """Wait until every task has a result; raise `NoFindings` when none can come, or after the time limits."""
    deadline = time.monotonic() + 60 * (options.minutes + options.queue_minutes)
    last_squeue, left_queue_at = time.monotonic(), None
    while not job.done():
        now = time.monotonic()
        if options.cluster == "slurm" and left_queue_at is None and now - last_squeue > _SQUEUE_INTERVAL:
            last_squeue = now
            left_queue_at = now if _has_left_queue(job.job_id) else None
        if left_queue_at is not None and now - left_queue_at > _RESULT_TIMEOUT:
            raise NoFindings(f"job {job.job_id} ended without a result\n{_log_tail(job)}\nlogs: {options.folder}")
        if now > deadline:
            minutes = options.minutes + options.queue_minutes
            raise NoFindings(f"job {job.job_id} did not end within {minutes} min; cancelled it. logs: {options.folder}")
        time.sleep(_POLL_INTERVAL)


def _last_error(text: str) -> str:
    """Return the last exception's own text from submitit's text about a failed task."""
    trace = text.rpartition("\n----------------------\n")[0] if "Traceback (most" in text else ""
    starts = list(re.finditer(r"^[A-Za-z_][\w.]*: ", trace, re.MULTILINE))
    return trace[starts[-1].start() :].strip() if starts else text


def _has_left_queue(job_id: str) -> bool:
    command = ["squeue", "--noheader", "--jobs", job_id]
    try:
        squeue = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    # squeue fails with "Invalid job id" when slurmctld no longer knows the job. Another error means that slurmctld does
    # not answer, which says nothing about the job.
    return not squeue.stdout.strip() if squeue.returncode == 0 else "Invalid job id" in squeue.stderr


def _log_tail(job: submitit.Job[Findings]) -> str:
    log = job.stderr() or job.stdout()
    return (log or "its log is empty; check that every node sees the folder of the logs")[-2000:]
