"""Terminates the commands that this process started on hosts of the testbed, and waits for their end."""

from __future__ import annotations

import subprocess
from typing import Any

from .errors import TestbedError


def terminate(process: subprocess.Popen[Any]) -> None:
    """Send SIGTERM, after two seconds SIGKILL, and return when the command has ended."""
    # SIGTERM first: after SIGKILL, the kernel kills the command on the host too, but only the init process of the
    # machine can reap it then.
    process.terminate()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_end(process: subprocess.Popen[Any]) -> None:
    """Wait for the end of a process that got a signal or whose namespaces ended.

    Raises
    ------
    TestbedError
        It did not end within ten seconds.
    """
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        raise TestbedError(
            "the testbed's processes did not end within 10 s of SIGKILL, probably because the init process of this "
            "machine does not reap orphans. In a container, start the container with --init"
        ) from None
