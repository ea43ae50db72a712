"""``weightferry stage``: downloads a source onto every node of a job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightferry.cli.arguments import (
    NonEmptyPath,
    cache_dir_option,
    exclude_option,
    include_option,
    path_type,
    revision_option,
)
from weightferry.cli.errors import exit_on_error
from weightferry.errors import BadRequest, CollectError

if TYPE_CHECKING:
    from weightferry.phases.job_request import RankRequest
    from weightferry.report.run_report import RunReport


@click.command()
@click.argument("source")
@revision_option
@cache_dir_option
@click.option("--to", "link_folder", metavar="DIR", type=path_type, help="Link the files here under their own paths.")
@include_option
@exclude_option
@click.option(
    "--lockfile", metavar="FILE", type=path_type, help="Use the commits and checksums of this file; see prefetch."
)
@click.option(
    "--report", metavar="FILE", type=NonEmptyPath(path_type=Path, dir_okay=False), help="Write a JSON report to FILE."
)
def stage(
    source: str,
    revision: str | None,
    cache_dir: Path | None,
    link_folder: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    lockfile: Path | None,
    report: Path | None,
) -> None:
    """Download SOURCE onto every node of the job.

    SOURCE is org/name or hf://org/name@revision/path on the Hugging Face Hub, a URL (http, s3, gs, and every other
    scheme of fsspec), or a path. Run the command alone, or once per rank under torchrun, srun or mpirun; the ranks find
    each other through the environment variables of the launcher.

    Exit code: 0 on success, 1 if any rank failed, 2 for wrong arguments.
    """
    from weightferry.cluster.connect import launcher_coordinator
    from weightferry.cluster.launchers import read_topology
    from weightferry.phases.job_request import RankRequest
    from weightferry.settings import Settings
    from weightferry.sources import SourceRequest
    from weightferry.staging import collect

    def make_request() -> RankRequest:
        if report is not None and not report.absolute().parent.is_dir():
            raise BadRequest(
                "the folder for the report does not exist; create it, or choose another --report",
                subject=str(report.parent),
            )
        request = SourceRequest.of(source, revision=revision, allow=include, ignore=exclude)
        return RankRequest({"": request}, link_folder=link_folder and link_folder.expanduser().absolute())

    with exit_on_error():
        settings = Settings.from_environ(cache_dir=cache_dir)
        topology = read_topology()
        # Print the error before this rank leaves the job: torchrun kills all ranks when one rank exits.
        with launcher_coordinator(settings, topology, "stage") as coordinator, exit_on_error(topology.rank):
            collected = collect(
                make_request, coordinator, settings, lockfile=lockfile and lockfile.expanduser().absolute()
            )
            if topology.rank == 0:
                _finish(collected.report, collected.paths[""], report)


def _finish(run: RunReport, path: Path, report: Path | None) -> None:
    """Write the report, and print the summary."""
    from weightferry.report.report_text import summary

    if report is not None:
        try:
            run.write(report)
        except OSError as error:
            raise CollectError(f"the files are staged, but the report could not be written: {error}") from error
    click.echo(summary(run, path))
