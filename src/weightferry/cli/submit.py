"""``weightferry submit``: runs a command on every task of a job."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from weightferry.errors import CollectError


@click.command(
    short_help="Run a command on every task of a Slurm job.", context_settings={"allow_interspersed_args": False}
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--nodes", default=1, show_default=True, help="Number of nodes.")
@click.option("--tasks-per-node", default=1, show_default=True, help="Ranks on each node; 1 for a torchrun command.")
@click.option("--stage", "sources", metavar="SOURCE", multiple=True, help="Stage this source first; repeatable.")
@click.option(
    "--cluster",
    type=click.Choice(["slurm", "local"]),
    default="slurm",
    show_default=True,
    help="Where the job runs; local: on this machine.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("weightferry-jobs"),
    show_default=True,
    help="Folder for the job's logs; all nodes must see it.",
)
@click.option("--timeout-min", default=60, show_default=True, help="The job's time limit in minutes; see --requeue.")
@click.option(
    "--requeue/--no-requeue", default=True, show_default=True, help="Start again after a timeout or preemption."
)
@click.option("--partition", metavar="P", help="Slurm partition.")
@click.option("--account", metavar="A", help="Slurm account.")
@click.option("--qos", metavar="Q", help="Slurm quality of service.")
@click.option("--gpus-per-node", type=int, metavar="N", help="GPUs on each node.")
@click.option("--cpus-per-task", type=int, metavar="N", help="CPUs for each task.")
@click.option("--wait", is_flag=True, help="Print the output, and exit with the command's exit code.")
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
    """Run COMMAND on every task of a Slurm job, or of a job on this machine.

    Example: weightferry submit --nodes 2 --stage org/name -- python train.py

    Every task gets the variables of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...). A torchrun command runs once on each
    node, with the arguments to find the other nodes.
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
        # submitit raises RuntimeError when this machine has no Slurm, or with the error text of sbatch.
        click.echo(f"weightferry: could not submit the job: {error}", err=True)
        sys.exit(1)
    click.echo(f"job {job.job_id}")
    for number in range(job.num_tasks):
        click.echo(f"{job.task(number).paths.stdout}  {job.task(number).paths.stderr}")
    if wait:
        sys.exit(follow(job, click.echo))
