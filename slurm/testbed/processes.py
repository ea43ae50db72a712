"""An id of a process that stays unique when the kernel reuses its PID."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path


def start_ticks(pid: int) -> int:
    """Return the start time of `pid` in clock ticks since boot: field 22 of /proc/PID/stat.

    Raises
    ------
    ProcessLookupError
        There is no such process, or it has ended and is not reaped yet.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    # The second field, the command's name, may contain spaces and parentheses.
    state, *fields = text[text.rindex(")") + 2 :].split()
    if state in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[18])


@dataclass(frozen=True)
class ProcessId:
    """The PID and the start time of a process; the pair is unique until the next boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Return the id of the running process `pid`; raise `ProcessLookupError` if there is none."""
        return cls(pid, start_ticks(pid))

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        try:
            return start_ticks(self.pid) == self.started
        except ProcessLookupError:
            return False

    def end(self, grace: float = 5.0) -> None:
        """Send SIGTERM, after `grace` seconds SIGKILL, and return when the process has ended.

        Do nothing if it has ended already. With `grace` 0, send SIGKILL at once. The first process of a PID namespace
        ends only after all processes of that namespace.
        """
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # Check after opening the pidfd: from now on, the pidfd refers to this process only.
            if not self.is_alive():
                return
            if grace:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            if not wait_until_ended(pidfd, grace):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                wait_until_ended(pidfd, 10.0)
        except ProcessLookupError:
            return
        finally:
            os.close(pidfd)


def wait_until_ended(pidfd: int, timeout: float) -> bool:
    """Wait at most `timeout` seconds for the process of a pidfd; return whether it has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout * 1000))
