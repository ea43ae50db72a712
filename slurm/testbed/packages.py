"""What the machine must have, and getting it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .errors import TestbedError

# Debian package by a command that it brings. Ubuntu uses the same names.
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
    """Return the Debian packages that the testbed needs and the machine lacks."""
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    return sorted({package for command, package in _PACKAGES.items() if shutil.which(command, path=path) is None})


def obstacle() -> str:
    """Return why no testbed can run here and how to change that; empty when nothing stands in the way.

    Missing packages are no obstacle to root, who can install them.
    """
    if os.geteuid() != 0:
        missing = missing_packages()
        install = f" It also needs packages: {_install_line(missing)}" if missing else ""
        return f"the Slurm testbed makes namespaces, which needs root: run it with sudo.{install}"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"root may not make namespaces here ({tried.stderr.strip()}): in a container, run that --privileged"
    return ""


def ensure_packages() -> None:
    """Install what is missing, as root; do nothing when nothing is.

    Raises
    ------
    TestbedError
        Something is missing and this is not root, or there is no apt, or apt failed. Names packages and command.
    """
    missing = missing_packages()
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise TestbedError(f"the Slurm testbed needs {', '.join(missing)}. Install with: {_install_line(missing)}")
    # apt-get does not wait for another one to end, and several test workers may find the same things missing.
    # A bare flock: hosts run this file with the standard library alone.
    with (Path(tempfile.gettempdir()) / "weightferry-testbed-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if missing := missing_packages():
            _apt("update")
            _apt("install", "--yes", "--no-install-recommends", *missing)
    if still := missing_packages():
        raise TestbedError(f"apt-get installed without an error, yet {', '.join(still)} is still missing")


def _install_line(missing: list[str]) -> str:
    return f"apt-get update && apt-get install --no-install-recommends {' '.join(missing)}"


def _apt(*arguments: str) -> None:
    # RUNLEVEL=1 keeps the packages' scripts from starting the machine's own munged and slurmd (see invoke-rc.d(8)):
    # the testbed runs its own, and a daemon that nobody asked for would be left behind.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TestbedError(f"apt-get {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
