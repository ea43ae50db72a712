"""Messages from the testbed's first processes to the process that starts it: up, or an error.

Each process is in its own PID namespace and does not know its PID outside. To every message, the kernel adds the PID of
the sender as the receiver sees it.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass

SUPERVISOR = "supervisor"
KEEP_RUNNING = b"stay"
"""The starter's answer for a testbed without an owner."""
END_WITH_OWNER = b"go"
"""The starter's answer for a testbed that ends with its owner."""

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
MAX_BYTES = 16384


@dataclass(frozen=True)
class Report:
    """The message of one process.

    Attributes
    ----------
    name
        Name of the host, or `SUPERVISOR`.
    error
        Empty: the host is up, or the supervisor has started.
    pid
        The PID of the sender, as the receiver sees it.
    """

    name: str
    error: str
    pid: int


def channel() -> tuple[socket.socket, socket.socket]:
    """Return the receiver and the sender of a new channel."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return receiver, sender


def send(sender: socket.socket, name: str, error: str = "") -> None:
    """Report that `name` is up, or its error."""
    sender.send(json.dumps([name, error[-MAX_BYTES // 4 :]]).encode())


def receive(receiver: socket.socket) -> Report | None:
    """Return the next report, or None if every sender has ended; raise `TimeoutError` after the socket's timeout."""
    data, ancillary, _, _ = receiver.recvmsg(MAX_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
    if not data:
        return None
    name, error = json.loads(data)
    [pid] = [
        _CREDENTIALS.unpack(value)[0]
        for level, kind, value in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
    ]
    return Report(name, error, pid)
