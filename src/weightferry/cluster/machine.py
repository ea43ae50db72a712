"""Identify the machine that this process runs on."""

from __future__ import annotations

import socket
from pathlib import Path


def boot_id() -> str:
    """Return the boot id of the running kernel: ranks with the same id share one machine, whatever their host names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
