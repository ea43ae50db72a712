"""The command line: one module for each command, and what the commands share.

The modules import heavy packages inside functions, so that ``--help`` is fast.
"""

from __future__ import annotations

import logging

import click

from weightferry._version import __version__
from weightferry.cli import cache, demo, doctor, prefetch, stage, submit


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="weightferry")
@click.option("-v", "--verbose", count=True, help="Log to standard error: -v information, -vv also debug messages.")
def main(verbose: int) -> None:
    """Get pretrained weights onto every node of a cluster and into every rank."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger("weightferry")
    logger.addHandler(handler)
    logger.setLevel(level)
    # The progress of a long transfer is logged without -v too: it is the first thing to look for in the log of a job.
    logging.getLogger("weightferry.report.progress").setLevel(min(level, logging.INFO))


for command in (stage.stage, prefetch.prefetch, submit.submit, demo.demo, cache.cache, doctor.doctor):
    main.add_command(command)
