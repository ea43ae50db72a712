"""Running the system's own tools (ip, tc, mount) from inside the testbed."""

from __future__ import annotations

import os
import subprocess

from .errors import TestbedError

# The daemons start from a clean environment: what a job sees is what its own submitter had.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def tool(*command: str | os.PathLike[str], script: str | None = None) -> None:
    """Run `command`, with `script` as its input.

    Raises
    ------
    TestbedError
        It failed; with what it wrote to its error output.
    """
    done = subprocess.run(command, input=script, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        line = " ".join(os.fspath(word) for word in command)
        raise TestbedError(f"{line}: {done.stderr.strip() or done.returncode}" + (f"\n{script}" if script else ""))
