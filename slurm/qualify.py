"""Tell whether this cluster is fit for weightferry, and what to expect of it.

Run on a login node, from a checkout::

    python slurm/qualify.py --nodes 4 --partition gpu --cache-dir /local/$USER/weightferry --shared /scratch/$USER

It submits a job of one task a node, prints what that saw, and exits with 0 (fit), 1 (not fit, or the job failed) or 2
(a wrong call). What the job writes into the folders it looks at is removed again, unless it is killed (SIGKILL): then
folders named ``.weightferry-qualify-...`` are left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cloudpickle  # type: ignore[import-untyped]
import submitit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from slurm import _qualify
from slurm._qualify.measure import measure
from slurm._qualify.text import concluded, counted, shown
from slurm._qualify.values import Findings, Question, report
from slurm._qualify.verdict import conclude, failed
from weightferry import launch
from weightferry.errors import BadRequest
from weightferry.settings import Settings
from weightferry.sources import SourceRequest, parse_source

_LOOK_EVERY = 0.5  # seconds
_ASK_SLURM_EVERY = 5.0
# Seconds for the result of a job that has left the queue to be seen on this machine.
_LATE = 20.0
_path = click.Path(path_type=Path)


class NoFindings(Exception):
    """The job ended without any."""


@dataclass(frozen=True)
class Plan:
    """How the job is run.

    Attributes
    ----------
    folder : Path
        For scripts, logs and results; every node sees it. Removed when the job succeeded.
    minutes, queue_minutes : int
        The job's limit, and how long it may wait to be started.
    options : dict of str to (str or bool)
        For sbatch.
    """

    nodes: int
    cluster: str
    folder: Path
    minutes: int
    queue_minutes: int
    options: dict[str, str | bool]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="How many nodes to look at.")
@click.option("--partition", metavar="P", help="Of Slurm.")
@click.option("--cache-dir", type=_path, help="The cache folder in question; default: weightferry's own.")
@click.option("--shared", type=_path, multiple=True, help="A folder that nodes share; may be repeated.")
@click.option("--collect-in", type=_path, help="The folder in which your jobs link their files.")
@click.option("--size-mb", type=click.IntRange(min=1), default=256, show_default=True, help="Of the file to stage.")
@click.option("--origin", metavar="SOURCE", help="An http(s) URL or a file of the Hub, to read from for a moment.")
@click.option("--cluster", type=click.Choice(["slurm", "local"]), default="slurm", show_default=True)
@click.option("--json", "to", type=_path, metavar="FILE", help="Write what was found here.")
@click.option(
    "--slurm", "extra", multiple=True, metavar="NAME[=VALUE]", help="An option for sbatch, such as account=A."
)
@click.option(
    "--folder", type=_path, default="weightferry-jobs", show_default=True, help="For logs; every node sees it."
)
@click.option("--minutes", type=click.IntRange(min=1), default=10, show_default=True, help="The job's time limit.")
@click.option("--queue-minutes", default=60, show_default=True, help="How long it may wait to be started.")
def main(
    nodes: int,
    partition: str | None,
    cache_dir: Path | None,
    shared: tuple[Path, ...],
    collect_in: Path | None,
    size_mb: int,
    origin: str | None,
    cluster: str,
    to: Path | None,
    extra: tuple[str, ...],
    folder: Path,
    minutes: int,
    queue_minutes: int,
) -> None:
    """Look at NODES nodes and say whether weightferry will work there."""
    if cluster == "local" and nodes != 1:
        raise click.UsageError("--cluster local is this machine: one node")
    _check_origin(origin)
    run = secrets.token_hex(4)
    cache = Settings.from_environ(cache_dir=cache_dir).cache_dir
    question = Question(run, cache, _roles(cache, shared, collect_in), size_mb * 1_000_000, origin)
    options = _options(partition, extra)
    plan = Plan(nodes, cluster, folder.expanduser().absolute() / f"qualify-{run}", minutes, queue_minutes, options)
    sys.exit(_conclude(question, plan, to))


def _check_origin(origin: str | None) -> None:
    if origin is None:
        return
    try:
        source = parse_source(SourceRequest.of(origin), lambda text: Path(text).is_dir())
    except BadRequest as error:
        raise click.UsageError(f"--origin: {error}") from error
    if source.scheme == "file":
        raise click.UsageError(f"--origin: {origin} is a local path, not an origin")


def _roles(cache: Path, shared: tuple[Path, ...], collect_in: Path | None) -> dict[str, list[str]]:
    named = [(cache, "cache"), *((path, "shared") for path in shared), (Path.home(), "home")]
    if collect_in is not None:
        named.append((collect_in, "collect_in"))
    roles: dict[str, list[str]] = {}
    for path, role in named:
        roles.setdefault(str(path.expanduser().absolute()), []).append(role)
    return roles


def _options(partition: str | None, extra: tuple[str, ...]) -> dict[str, str | bool]:
    # Slurm requeues the job of a node that fails; that node may not come back.
    options: dict[str, str | bool] = {"no-requeue": True, **({"partition": partition} if partition else {})}
    for text in extra:
        name, given, value = text.removeprefix("--").partition("=")
        options[name] = value if given else True
    return options


def _conclude(question: Question, plan: Plan, to: Path | None) -> int:
    findings: Findings | None = None
    try:
        findings = _findings(question, plan)
        verdict = conclude(findings)
        click.echo(shown(findings) + "\n")
    except NoFindings as error:
        verdict = failed(str(error))
    click.echo(concluded(verdict))
    if to is not None:
        to.write_text(json.dumps(report(findings, verdict), indent=2) + "\n")
    return 0 if verdict["fit"] else 1


def _findings(question: Question, plan: Plan) -> Findings:
    """Run the job to its end.

    Raises
    ------
    NoFindings
        With the text of what failed.
    """
    # Without accounting submitit warns at every look; who is done is then told by the result files and the queue.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    job = _submit(question, plan)
    with _cancelled_unless_done(job):
        _await(job, plan)
        error = job.exception()
        if error is not None:
            click.echo(str(error), err=True)
            raise NoFindings(f"{_essence(str(error))}\nlogs: {plan.folder}")
        findings: Findings = job.results()[0]
    shutil.rmtree(plan.folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        plan.folder.parent.rmdir()  # if it is empty
    return findings


def _submit(question: Question, plan: Plan) -> submitit.Job[Findings]:
    cloudpickle.register_pickle_by_value(_qualify)
    options: dict[str, Any] = {"slurm_additional_parameters": plan.options} if plan.cluster == "slurm" else {}
    try:
        job = launch.submit(
            measure,
            question,
            nodes=plan.nodes,
            cluster=plan.cluster,
            folder=plan.folder,
            timeout_min=plan.minutes,
            backend="gloo",
            requeue=False,
            **options,
        )
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError, submitit.core.utils.FailedJobError) as error:
        raise NoFindings(f"the job could not be submitted: {error}") from error
    click.echo(f"job {job.job_id} on {counted(plan.nodes)}, logs in {plan.folder}", err=True)
    return job


@contextlib.contextmanager
def _cancelled_unless_done(job: submitit.Job[Findings]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # Also when somebody presses control-C; a job that is over does not mind.
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            job.cancel(check=False)
        raise


def _await(job: submitit.Job[Findings], plan: Plan) -> None:
    """Wait until there is a result on every task, or no hope of one."""
    until = time.monotonic() + 60 * (plan.minutes + plan.queue_minutes)
    asked, gone = time.monotonic(), None
    while not job.done():
        now = time.monotonic()
        if plan.cluster == "slurm" and gone is None and now - asked > _ASK_SLURM_EVERY:
            asked = now
            gone = now if _left_the_queue(job.job_id) else None
        if gone is not None and now - gone > _LATE:
            raise NoFindings(f"job {job.job_id} ended without a result\n{_tail(job)}\nlogs: {plan.folder}")
        if now > until:
            raise NoFindings(f"job {job.job_id} did not end in time; it was cancelled. logs: {plan.folder}")
        time.sleep(_LOOK_EVERY)


def _essence(text: str) -> str:
    """Cut all but the last exception's own text out of what submitit says of a failed task."""
    trace = text.rpartition("\n----------------------\n")[0] if "Traceback (most" in text else ""
    named = list(re.finditer(r"^[A-Za-z_][\w.]*: ", trace, re.MULTILINE))
    return trace[named[-1].start() :].strip() if named else text


def _left_the_queue(job_id: str) -> bool:
    command = ["squeue", "--noheader", "--jobs", job_id]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    # Once slurmctld has forgotten the job, that is an error; one of a slurmctld that is away is none.
    return not asked.stdout.strip() if asked.returncode == 0 else "Invalid job id" in asked.stderr


def _tail(job: submitit.Job[Findings]) -> str:
    return (job.stderr() or job.stdout() or "it wrote nothing; does every node see the folder of its logs?")[-2000:]


if __name__ == "__main__":
    main()
