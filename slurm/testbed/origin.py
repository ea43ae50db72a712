"""A server on the origin host, and the wait until it listens."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .processes import ProcessId

_LISTEN = "0A"  # TCP_LISTEN, include/net/tcp_states.h


@dataclass(frozen=True)
class Origin:
    """A server on the origin host.

    Attributes
    ----------
    address, port
        The address for the nodes.
    process
        The server's process; it ends with the testbed, or with `terminate`.
    """

    address: str
    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        """``http://ADDRESS:PORT``."""
        return f"http://{self.address}:{self.port}"


def wait_for_listener(host: ProcessId, port: int, server: subprocess.Popen[str], timeout: float) -> bool:
    """Wait until a socket listens on TCP `port` of `host`; False if `server` ends or `timeout` seconds pass first."""
    deadline = time.monotonic() + timeout
    while not is_listening(host, port):
        if server.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_listening(process: ProcessId, port: int) -> bool:
    """Whether a socket listens on `port` in the network namespace of `process`; read from outside the namespace."""
    for table in ("tcp", "tcp6"):
        # sl local_address rem_address st ...: addresses as HEX:HEXPORT
        for line in _lines(Path(f"/proc/{process.pid}/net/{table}")):
            _, local, _, state, *_ = line.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def _lines(table: Path) -> list[str]:
    try:
        return table.read_text().splitlines()[1:]
    except FileNotFoundError:
        return []  # no IPv6, or the process has ended
