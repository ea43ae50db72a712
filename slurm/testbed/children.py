"""Ending the commands that this process started on hosts of the testbed, and waiting for their end."""

from __future__ import annotations

import subprocess
from typing import Any

from .errors import TestbedError


def end(process: subprocess.Popen[Any]) -> None:
    """Have a command end: SIGTERM, and SIGKILL after two seconds; return when it has."""
    # Not at once by SIGKILL: the command inside is killed too, but with its parent gone it is left to the machine's
    # first process to be reaped.
    process.terminate()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def await_end(process: subprocess.Popen[Any]) -> None:
    """Return when a process that was told to end, or whose namespaces were ended, has done so.

    Raises
    ------
    TestbedError
        It has not after ten seconds.
    """
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        raise TestbedError(
            "the testbed's processes were killed and do not go: does the machine's first process reap orphans? "
            "In a container, start it with --init"
        ) from None
