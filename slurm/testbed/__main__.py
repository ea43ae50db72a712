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

_name = click.option("--name", default="default", show_default=True, help="Which testbed.")


@click.group()
def main() -> None:
    """Start, use and stop a real Slurm cluster on this machine."""


@main.command()
@_name
@click.option("--nodes", default=4, show_default=True)
@click.option("--node-mbit", type=float, help="Rate of each node's link, each direction; without: not limited.")
@click.option("--origin-mbit", type=float, help="Rate of the origin's link, each direction; without: not limited.")
@click.option("--cpus", default=8, show_default=True, help="What each node claims to have.")
@click.option("--disk-mb", type=int, help="Size of each node's /local; without: half of the machine's memory.")
@click.option("--accounting/--no-accounting", default=True, show_default=True, help="Whether sacct answers.")
@click.option("--loopback-names", is_flag=True, help="Let each host resolve its own name to 127.0.1.1.")
@click.option("--owner", type=int, metavar="PID", help="End with this process; without: stay until `down`.")
def up(name: str, owner: int | None, **shape: float | bool | None) -> None:
    """Start a testbed."""
    began = time.monotonic()
    with _told():
        testbed = Testbed(Spec(**shape), name)  # type: ignore[arg-type] # click checked each by its option
        testbed.start(owner=owner, stay=owner is None)
    click.echo(f"{name}: {len(testbed.nodes)} nodes up in {time.monotonic() - began:.1f} s")
    click.echo(f"shared folder {testbed.shared}, node-local folder {testbed.local}")


@main.command()
@_name
def down(name: str) -> None:
    """Stop a testbed; fine when it is not up."""
    began = time.monotonic()
    if name not in {layout.name for layout in registry.living()}:
        click.echo(f"{name}: not up")
        return
    with _told():
        Testbed.attach(name).stop()
    click.echo(f"{name}: down in {time.monotonic() - began:.1f} s")


@main.command()
def status() -> None:
    """Show the testbeds that are up."""
    for layout in registry.living():
        with _told():
            testbed = Testbed.attach(layout.name)
            click.echo(f"{testbed!r}\n{testbed.run(['sinfo', '--Node', '--long'], check=False).stdout}")


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_name
@click.option("--node", help="Which host; without: the head, where srun and sbatch are at home.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(name: str, node: str | None, command: tuple[str, ...]) -> None:
    """Run COMMAND on a host; its exit status is this command's."""
    with _told():
        testbed = Testbed.attach(name)
        entry = testbed.entry(command, node)
    os.execvpe(entry[0], entry, testbed.environment())  # noqa: S606 - no shell is what we want


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except TestbedError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main(prog_name="python -m slurm.testbed")
