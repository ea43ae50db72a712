"""The command: ``python -m slurm.testbed up | run | status | down``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import click

from . import registry
from .cluster import Testbed
from .errors import TestbedError
from .spec import Spec

_name = click.option("--name", default="default", show_default=True, help="Name of the testbed.")


@click.group()
def main() -> None:
    """Start, use and stop a real Slurm cluster on this machine."""


@main.command()
@_name
@click.option("--nodes", default=4, show_default=True, help="Number of nodes.")
@click.option("--node-mbit", type=float, help="Rate of each node's link in each direction.  [default: no limit]")
@click.option("--origin-mbit", type=float, help="Rate of the origin's link in each direction.  [default: no limit]")
@click.option("--cpus", default=8, show_default=True, help="CPUs that each node reports.")
@click.option("--disk-mb", type=int, help="Size of each node's /local.  [default: half of the memory]")
@click.option("--accounting/--no-accounting", default=True, show_default=True, help="Whether sacct works.")
@click.option("--loopback-names", is_flag=True, help="Resolve the own name to 127.0.1.1 on each host.")
@click.option("--owner", type=int, metavar="PID", help="Stop when this process ends.  [default: run until `down`]")
def up(name: str, owner: int | None, **spec: float | bool | None) -> None:
    """Start a testbed."""
    began = time.monotonic()
    with _one_line_errors():
        testbed = Testbed(Spec(**spec), name)  # type: ignore[arg-type] # click has checked the types
        testbed.start(owner=owner, stay=owner is None)
    click.echo(f"{name}: {len(testbed.nodes)} nodes up in {time.monotonic() - began:.1f} s")
    click.echo(f"shared folder {testbed.shared}, node-local folder {testbed.local}")


@main.command()
@_name
def down(name: str) -> None:
    """Stop a testbed, if it is up."""
    began = time.monotonic()
    if name not in {layout.name for layout in registry.running()}:
        click.echo(f"{name}: not up")
        return
    with _one_line_errors():
        Testbed.attach(name).stop()
    click.echo(f"{name}: down in {time.monotonic() - began:.1f} s")


@main.command()
def status() -> None:
    """List the testbeds that are up."""
    for layout in registry.running():
        with _one_line_errors():
            testbed = Testbed.attach(layout.name)
            click.echo(f"{testbed!r}\n{testbed.run(['sinfo', '--Node', '--long'], check=False).stdout}")


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_name
@click.option("--node", help="The host.  [default: head, for srun and sbatch]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(name: str, node: str | None, command: tuple[str, ...]) -> None:
    """Run COMMAND on a host, and exit with its exit status."""
    with _one_line_errors():
        testbed = Testbed.attach(name)
        entry = testbed.entry(command, node)
    os.execvpe(entry[0], entry, testbed.environment())  # noqa: S606 -- without a shell


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except TestbedError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main(prog_name="python -m slurm.testbed")
