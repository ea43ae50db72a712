"""``weightferry demo``: stages and loads a real model on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Keep the caches of the nodes here.")
def demo(folder: Path | None) -> None:
    """Stage and load a model on 2 nodes x 2 ranks on this machine.

    The nodes are folders of this machine. The first run starts with empty caches, the second run with full ones.
    """
    from weightferry.testing.demo import DemoError, run

    try:
        run(folder)
    except DemoError as error:
        click.echo(f"weightferry: {error}", err=True)
        sys.exit(1)
