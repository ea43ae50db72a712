"""How the testbed's first processes tell its starter that they are up, or why not.

Each process is in a PID namespace of its own and does not know the number it has outside. The kernel does: it writes
the sender's number, as the receiver sees it, on every message.
"""

from __future__ import annotations

import json
import socket
import struct
from dataclasses import dataclass

SUPERVISOR = "supervisor"
STAY = b"stay"
"""The starter's answer when the testbed shall have no owner."""
GO = b"go"
"""The starter's answer when the testbed shall end with its owner."""

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
MAX_BYTES = 16384


@dataclass(frozen=True)
class Report:
    """What one process said.

    Attributes
    ----------
    who
        Name of the host, or `SUPERVISOR`.
    error
        Empty: it is up, or in the supervisor's case it has begun.
    pid
        Its number, as the receiver sees it.
    """

    who: str
    error: str
    pid: int


def channel() -> tuple[socket.socket, socket.socket]:
    """Return the receiving and the sending end."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return receiver, sender


def send(sender: socket.socket, who: str, error: str = "") -> None:
    """Say that `who` is up, or what went wrong there."""
    sender.send(json.dumps([who, error[-MAX_BYTES // 4 :]]).encode())


def receive(receiver: socket.socket) -> Report | None:
    """Return the next report; None when every sender has ended. `TimeoutError` after the socket's time-out."""
    data, ancillary, _, _ = receiver.recvmsg(MAX_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
    if not data:
        return None
    who, error = json.loads(data)
    [pid] = [
        _CREDENTIALS.unpack(value)[0]
        for level, kind, value in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
    ]
    return Report(who, error, pid)
