"""The Debian packages that the testbed needs, and their installation."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .errors import TestbedError

# The Debian package that contains a command. Ubuntu uses the same names.
_PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "mount": "mount",
    "pivot_root": "util-linux",
}
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def missing_packages() -> list[str]:
    """Return the required Debian packages that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    return sorted({package for command, package in _PACKAGES.items() if shutil.which(command, path=path) is None})


def reason_unavailable() -> str:
    """Return why no testbed can run on this machine, and what to do; empty if it can run.

    Missing packages are no reason for root, who can install them.
    """
    if os.geteuid() != 0:
        missing = missing_packages()
        install = f" It also needs packages: {_install_line(missing)}" if missing else ""
        return f"the Slurm testbed creates namespaces, which needs root: run it with sudo.{install}"
    result = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        reason = result.stderr.strip()
        return f"root cannot create namespaces here ({reason}): in a container, start the container with --privileged"
    return ""


def ensure_packages() -> None:
    """Install the missing packages as root; do nothing if none is missing.

    Raises
    ------
    TestbedError
        A package is missing, and this user is not root, there is no apt, or apt failed. It names packages and command.
    """
    missing = missing_packages()
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise TestbedError(f"the Slurm testbed needs {', '.join(missing)}. Install with: {_install_line(missing)}")
    # apt-get fails while another apt-get runs, and several test workers may miss the same packages at once.
    # A plain flock: hosts run this file with only the standard library.
    with (Path(tempfile.gettempdir()) / "weightferry-testbed-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if missing := missing_packages():
            _apt("update")
            _apt("install", "--yes", "--no-install-recommends", *missing)
    if missing := missing_packages():
        raise TestbedError(f"apt-get install succeeded, but {', '.join(missing)} is still missing")


def _install_line(missing: list[str]) -> str:
    return f"apt-get update && apt-get install --no-install-recommends {' '.join(missing)}"


def _apt(*arguments: str) -> None:
    # With RUNLEVEL=1, the packages' scripts do not start munged and slurmd on the machine (see invoke-rc.d(8)). The
    # testbed starts its own daemons, and the machine's daemons would keep running after it.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TestbedError(f"apt-get {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
