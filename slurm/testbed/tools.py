"""Runs system tools (ip, tc, mount) inside the testbed."""

from __future__ import annotations

import os
import subprocess

from .errors import TestbedError

# The daemons have a clean environment, so that a job sees only the environment of its submitter.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def run_tool(*command: str | os.PathLike[str], script: str | None = None) -> None:
    """Run `command` with `script` as its standard input.

    Raises
    ------
    TestbedError
        It failed; with its error output.
    """
    result = subprocess.run(command, input=script, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if result.returncode:
        line = " ".join(os.fspath(word) for word in command)
        raise TestbedError(f"{line}: {result.stderr.strip() or result.returncode}" + (f"\n{script}" if script else ""))
