"""Prints the errors of commands: one message on rank 0, one short line on every other rank."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from weightferry.errors import CollectError


@contextlib.contextmanager
def exit_on_error(rank: int = 0) -> Iterator[None]:
    """Print a `CollectError` and exit with 1.

    Parameters
    ----------
    rank
        Rank 0 prints the whole message, any other rank one short line.
    """
    try:
        yield
    except CollectError as error:
        print_error(error, rank)
        raise SystemExit(1) from error


def print_error(error: CollectError | OSError, rank: int = 0) -> None:
    """Print an error to standard error; the whole message on rank 0, one short line elsewhere."""
    text = str(error).removeprefix("stage failed in ").removeprefix("prefetch failed in ")
    if rank == 0:
        click.echo(f"weightferry: {type(error).__name__}: {text}", err=True)
    else:
        click.echo(f"weightferry: rank {rank} stops: {text.splitlines()[0][:160]}", err=True)


class OneLineErrorGroup(click.Group):
    """A group of commands that prints a `CollectError` or an `OSError` without a traceback, and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command`."""
        try:
            return super().invoke(ctx)
        except (CollectError, OSError) as error:
            print_error(error)
            sys.exit(1)
