"""The command line: thin, and quick to start, since everything heavy is imported when it is needed."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightferry._version import __version__
from weightferry.cli.arguments import NamedPath
from weightferry.cli.cache import cache
from weightferry.cli.doctor import doctor
from weightferry.errors import BadRequest, CollectError

if TYPE_CHECKING:
    from weightferry.report.run import RunReport


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="weightferry")
@click.option("-v", "--verbose", count=True, help="Say what happens (-v), or everything (-vv), on standard error.")
def main(verbose: int) -> None:
    """Get pretrained weights onto every node of a cluster and into every rank."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger("weightferry")
    logger.addHandler(handler)
    logger.setLevel(level)
    # How far a long transfer is, is said in any case: it is what people look for in the log of a job.
    logging.getLogger("weightferry.report.progress").setLevel(min(level, logging.INFO))


@main.command()
@click.argument("source")
@click.option("--revision", metavar="R", help="Branch, tag or commit, for the Hub.")
@click.option("--cache-dir", metavar="D", type=NamedPath(path_type=Path), help="The cache folder of this node.")
@click.option("--to", metavar="DIR", type=NamedPath(path_type=Path), help="Link the files here under their own paths.")
@click.option("--include", metavar="GLOB", multiple=True, help="Only files that match; may be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="No files that match; may be repeated.")
@click.option("--lockfile", metavar="FILE", type=NamedPath(path_type=Path), help="Resolve from it; see prefetch.")
@click.option("--report", metavar="FILE", type=NamedPath(path_type=Path, dir_okay=False), help="Write a JSON report.")
def stage(
    source: str,
    revision: str | None,
    cache_dir: Path | None,
    to: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    lockfile: Path | None,
    report: Path | None,
) -> None:
    """Bring SOURCE onto every node of the job.

    SOURCE is org/name or hf://org/name@revision/path on the Hugging Face Hub, a URL (http, s3, gs, and all that fsspec
    knows), or a path. Run it alone, or once per rank under torchrun, srun or mpirun: the ranks find each other from the
    environment.

    Exits with 0, with 1 when anything failed on any rank, or with 2 for a wrong call.
    """
    from weightferry.cluster.connect import joined
    from weightferry.cluster.topology import read_topology
    from weightferry.phases.agree import RankRequest
    from weightferry.settings import Settings
    from weightferry.sources import SourceRequest
    from weightferry.staging import collect

    def wish() -> RankRequest:
        if report is not None and not report.absolute().parent.is_dir():
            raise BadRequest("there is no such folder for the report", subject=str(report.parent))
        request = SourceRequest.of(source, revision=revision, allow=include, ignore=exclude)
        return RankRequest({"": request}, into=to and to.expanduser().absolute())

    try:
        settings = Settings.from_environ(cache_dir=cache_dir)
        topology = read_topology()
        with joined(settings, topology, "stage") as coordinator, _told(topology.rank):
            collected = collect(wish, coordinator, settings, lockfile=lockfile and lockfile.expanduser().absolute())
            if topology.rank == 0:
                _conclude(collected.report, collected.paths[""], report)
    except CollectError as error:
        _tell(error, rank=0)
        sys.exit(1)


@main.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--lockfile", metavar="FILE", required=True, type=NamedPath(path_type=Path), help="Write it.")
@click.option("--revision", metavar="R", help="Branch, tag or commit, for the Hub.")
@click.option("--cache-dir", metavar="D", type=NamedPath(path_type=Path), help="The cache folder of this node.")
@click.option("--include", metavar="GLOB", multiple=True, help="Only files that match; may be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="No files that match; may be repeated.")
def prefetch(
    sources: tuple[str, ...],
    lockfile: Path,
    revision: str | None,
    cache_dir: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    """Stage SOURCE... where there is a network, and write down exactly what that was.

    With the lock file, `stage --lockfile` and `Pretrainer(lockfile=...)` ask no origin what there is: the same commits
    and checksums everywhere, also without a network when the files are in a cache.
    """
    from weightferry.cache.atomic import write_atomically
    from weightferry.cluster.connect import joined
    from weightferry.cluster.topology import read_topology
    from weightferry.origins.lockfile import Lockfile
    from weightferry.phases.agree import RankRequest
    from weightferry.report.text import summary
    from weightferry.settings import Settings
    from weightferry.sources import SourceRequest
    from weightferry.staging import collect

    def wish() -> RankRequest:
        if not lockfile.absolute().parent.is_dir() or lockfile.is_dir():
            raise BadRequest("the lock file cannot be made there", subject=str(lockfile))
        return RankRequest(
            {one: SourceRequest.of(one, revision=revision, allow=include, ignore=exclude) for one in sources}
        )

    try:
        settings, topology = Settings.from_environ(cache_dir=cache_dir), read_topology()
        with joined(settings, topology, "prefetch") as coordinator, _told(topology.rank):
            collected = collect(wish, coordinator, settings)
            if topology.rank == 0:
                try:
                    write_atomically(lockfile.expanduser().absolute(), Lockfile.text(collected.manifest))
                except OSError as error:
                    raise CollectError(f"staged, but the lock file could not be written: {error}") from error
                click.echo(summary(collected.report, settings.cache_dir))
    except CollectError as error:
        _tell(error, rank=0)
        sys.exit(1)


def _conclude(run: RunReport, path: Path, report: Path | None) -> None:
    from weightferry.report.text import summary

    if report is not None:
        try:
            run.write(report)
        except OSError as error:
            raise CollectError(f"the files are staged, but the report could not be written: {error}") from error
    click.echo(summary(run, path))


@contextlib.contextmanager
def _told(rank: int) -> Iterator[None]:
    """Say what failed before this rank leaves the others: whoever exits first makes torchrun end all the rest."""
    try:
        yield
    except CollectError as error:
        _tell(error, rank)
        raise SystemExit(1) from error


def _tell(error: CollectError, rank: int) -> None:
    """Say all on rank 0, one short line elsewhere."""
    text = str(error).removeprefix("stage failed in ").removeprefix("prefetch failed in ")
    if rank == 0:
        click.echo(f"weightferry: {type(error).__name__}: {text}", err=True)
    else:
        click.echo(f"weightferry: rank {rank} stops: {text.splitlines()[0][:160]}", err=True)


@main.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--nodes", default=1, show_default=True, help="How many nodes.")
@click.option("--tasks-per-node", default=1, show_default=True, help="Ranks on each; 1 for a torchrun.")
@click.option("--stage", "sources", metavar="SOURCE", multiple=True, help="Stage this first; may be repeated.")
@click.option("--cluster", type=click.Choice(["slurm", "local"]), default="slurm", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("weightferry-jobs"), show_default=True)
@click.option("--timeout-min", default=60, show_default=True, help="Minutes until the job is ended and requeued.")
@click.option("--requeue/--no-requeue", default=True, show_default=True, help="On time-out or preemption.")
@click.option("--partition", metavar="P", help="Of Slurm; as are the next four.")
@click.option("--account", metavar="A")
@click.option("--qos", metavar="Q")
@click.option("--gpus-per-node", type=int, metavar="N")
@click.option("--cpus-per-task", type=int, metavar="N")
@click.option("--wait", is_flag=True, help="Follow the output, and exit with the command's code.")
def submit(
    command: tuple[str, ...],
    nodes: int,
    tasks_per_node: int,
    sources: tuple[str, ...],
    cluster: str,
    folder: Path,
    timeout_min: int,
    requeue: bool,
    wait: bool,
    **slurm: str | int | None,
) -> None:
    """Run COMMAND on every task of a job: weightferry submit --nodes 2 -- python train.py.

    Every task has the variables of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...). A torchrun command runs once a node
    and is told where to meet.
    """
    from weightferry.launch import submit_command
    from weightferry.launch.follow import follow

    options = {f"slurm_{name}": value for name, value in slurm.items() if value is not None}
    try:
        job = submit_command(
            command,
            nodes=nodes,
            tasks_per_node=tasks_per_node,
            cluster=cluster,
            folder=folder,
            timeout_min=timeout_min,
            stage=sources,
            requeue=requeue,
            **options,
        )
    except (CollectError, RuntimeError, OSError) as error:
        # submitit says with a RuntimeError that there is no Slurm here, or what sbatch answered.
        click.echo(f"weightferry: not submitted: {error}", err=True)
        sys.exit(1)
    click.echo(f"job {job.job_id}")
    for number in range(job.num_tasks):
        click.echo(f"{job.task(number).paths.stdout}  {job.task(number).paths.stderr}")
    if wait:
        sys.exit(follow(job, click.echo))


@main.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Keep the nodes' caches here.")
def demo(folder: Path | None) -> None:
    """Stage and load a real model on 2 nodes x 2 ranks, on this machine: cold, then warm."""
    from weightferry.testing.demo import DemoError, run

    try:
        run(folder)
    except DemoError as error:
        click.echo(f"weightferry: {error}", err=True)
        sys.exit(1)


main.add_command(cache)
main.add_command(doctor)


if __name__ == "__main__":
    main()
