"""``weightferry prefetch``: stages sources and writes a lock file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightferry.cli.arguments import cache_dir_option, exclude_option, include_option, path_type, revision_option
from weightferry.cli.errors import exit_on_error
from weightferry.errors import BadRequest, CollectError

if TYPE_CHECKING:
    from weightferry.phases.job_request import RankRequest


@click.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--lockfile", metavar="FILE", required=True, type=path_type, help="Write the lock file here.")
@revision_option
@cache_dir_option
@include_option
@exclude_option
def prefetch(
    sources: tuple[str, ...],
    lockfile: Path,
    revision: str | None,
    cache_dir: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    """Stage sources, and write a lock file that pins them.

    Run it where the origins can be reached. The lock file holds commits, sizes and checksums. `stage --lockfile` and
    `Pretrainer(lockfile=...)` then use the same files everywhere, and send no metadata request to an origin. They need
    no network if a cache holds the files.
    """
    from weightferry.cache.atomic import write_atomically
    from weightferry.cluster.connect import launcher_coordinator
    from weightferry.cluster.launchers import read_topology
    from weightferry.origins.lockfile import Lockfile
    from weightferry.phases.job_request import RankRequest
    from weightferry.report.report_text import summary
    from weightferry.settings import Settings
    from weightferry.sources import SourceRequest
    from weightferry.staging import collect

    def make_request() -> RankRequest:
        if not lockfile.absolute().parent.is_dir() or lockfile.is_dir():
            raise BadRequest(
                "cannot write the lock file: its folder does not exist, or the path itself is a folder",
                subject=str(lockfile),
            )
        return RankRequest(
            {source: SourceRequest.of(source, revision=revision, allow=include, ignore=exclude) for source in sources}
        )

    with exit_on_error():
        settings, topology = Settings.from_environ(cache_dir=cache_dir), read_topology()
        # Print the error before this rank leaves the job: torchrun kills all ranks when one rank exits.
        with launcher_coordinator(settings, topology, "prefetch") as coordinator, exit_on_error(topology.rank):
            collected = collect(make_request, coordinator, settings)
            if topology.rank == 0:
                try:
                    write_atomically(lockfile.expanduser().absolute(), Lockfile.text(collected.manifest))
                except OSError as error:
                    raise CollectError(
                        f"the files are staged, but the lock file could not be written: {error}"
                    ) from error
                click.echo(summary(collected.report, settings.cache_dir))
