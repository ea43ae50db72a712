"""``weightferry doctor``: checks whether a cluster is fit for weightferry."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightferry.cli.errors import exit_on_error

if TYPE_CHECKING:
    from weightferry.doctor.job import JobOptions
    from weightferry.doctor.request import CheckRequest

_path = click.Path(path_type=Path)


@click.command(
    short_help="Check whether a cluster is fit for weightferry.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Number of nodes to check.")
@click.option("--partition", metavar="P", help="Slurm partition.")
@click.option("--cache-dir", type=_path, help="Cache folder to check.  [default: weightferry's own]")
@click.option("--shared", type=_path, multiple=True, help="A folder that all nodes share; repeatable.")
@click.option("--collect-in", type=_path, help="The folder in which your jobs link their files.")
@click.option(
    "--size-mb", type=click.IntRange(min=1), default=256, show_default=True, help="Size of the file to stage, in MB."
)
@click.option("--origin", metavar="SOURCE", help="Measure this origin: an http(s) URL or a file of the Hub.")
@click.option(
    "--cluster",
    type=click.Choice(["slurm", "local"]),
    default="slurm",
    show_default=True,
    help="Where the job runs; local: on this machine.",
)
@click.option("--json", "json_file", type=_path, metavar="FILE", help="Write the findings to FILE as JSON.")
@click.option(
    "--slurm", "sbatch", multiple=True, metavar="NAME[=VALUE]", help="An sbatch option, such as account=A; repeatable."
)
@click.option(
    "--folder",
    type=_path,
    default="weightferry-jobs",
    show_default=True,
    help="Folder for the job's logs; all nodes must see it.",
)
@click.option("--minutes", type=click.IntRange(min=1), default=10, show_default=True, help="The job's time limit.")
@click.option("--queue-minutes", default=60, show_default=True, help="Longest wait for the job's start.")
def doctor(
    nodes: int,
    partition: str | None,
    cache_dir: Path | None,
    shared: tuple[Path, ...],
    collect_in: Path | None,
    size_mb: int,
    origin: str | None,
    cluster: str,
    json_file: Path | None,
    sbatch: tuple[str, ...],
    folder: Path,
    minutes: int,
    queue_minutes: int,
) -> None:
    """Check whether a cluster is fit for weightferry, and print what to expect.

    Run it on a login node. It submits a job with one task on each node. The job checks the folders and their locks,
    measures disks and network, and stages a generated file. At its end it removes its files from the checked folders;
    a job that is killed (SIGKILL) leaves folders named .weightferry-qualify-*.

    Example: weightferry doctor --nodes 4 --cache-dir /local/$USER/weightferry --shared /scratch/$USER

    Exit code: 0 if the cluster is fit, 1 if it is not fit or the job failed, 2 for wrong arguments.
    """
    if cluster == "local" and nodes != 1:
        raise click.UsageError("--cluster local runs on this machine: use --nodes 1")
    _check_origin(origin)

    from weightferry.doctor.job import JobOptions
    from weightferry.doctor.request import CheckRequest
    from weightferry.settings import Settings

    run = secrets.token_hex(4)
    with exit_on_error():
        cache = Settings.from_environ(cache_dir=cache_dir).cache_dir
    request = CheckRequest(run, cache, _folder_roles(cache, shared, collect_in), size_mb * 1_000_000, origin)
    options = JobOptions(
        nodes,
        cluster,
        folder.expanduser().absolute() / f"qualify-{run}",
        minutes,
        queue_minutes,
        _sbatch_options(partition, sbatch),
    )
    sys.exit(_run(request, options, json_file))


def _check_origin(origin: str | None) -> None:
    from weightferry.errors import BadRequest
    from weightferry.sources import SourceRequest, parse_source

    if origin is None:
        return
    try:
        source = parse_source(SourceRequest.of(origin), lambda text: Path(text).is_dir())
    except BadRequest as error:
        raise click.UsageError(f"--origin: {error}") from error
    if source.scheme == "file":
        raise click.UsageError(f"--origin: {origin} is a local path; give an http(s) URL or a file of the Hub")


def _folder_roles(cache: Path, shared: tuple[Path, ...], collect_in: Path | None) -> dict[str, list[str]]:
    named = [(cache, "cache"), *((path, "shared") for path in shared), (Path.home(), "home")]
    if collect_in is not None:
        named.append((collect_in, "collect_in"))
    roles: dict[str, list[str]] = {}
    for path, role in named:
        roles.setdefault(str(path.expanduser().absolute()), []).append(role)
    return roles


def _sbatch_options(partition: str | None, texts: tuple[str, ...]) -> dict[str, str | bool]:
    # Slurm requeues the job of a failed node, and would wait for a node that may not come back.
    options: dict[str, str | bool] = {"no-requeue": True, **({"partition": partition} if partition else {})}
    for text in texts:
        name, equals, value = text.removeprefix("--").partition("=")
        options[name] = value if equals else True
    return options


def _run(request: CheckRequest, options: JobOptions, json_file: Path | None) -> int:
    """Run the job, print the findings and the conclusion, and return the exit code."""
    from weightferry.doctor.conclusion import conclude, conclude_failure
    from weightferry.doctor.findings import Findings, json_report
    from weightferry.doctor.job import NoFindings, run_job
    from weightferry.doctor.text import conclusion_text, findings_text

    findings: Findings | None = None
    try:
        findings = run_job(request, options, lambda text: click.echo(text, err=True))
        conclusion = conclude(findings)
        click.echo(findings_text(findings) + "\n")
    except NoFindings as error:
        conclusion = conclude_failure(str(error))
    click.echo(conclusion_text(conclusion))
    if json_file is not None:
        json_file.write_text(json.dumps(json_report(findings, conclusion), indent=2) + "\n")
    return 0 if conclusion["fit"] else 1
