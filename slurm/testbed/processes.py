"""A process named so that it can be ended without hitting another that got its number."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path


def start_ticks(pid: int) -> int:
    """Return when `pid` started, in clock ticks since boot: field 22 of /proc/PID/stat.

    Raises
    ------
    ProcessLookupError
        There is no such process, or it only waits to be reaped.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    # The second field, the command's name, may itself hold spaces and parentheses.
    state, *fields = text[text.rindex(")") + 2 :].split()
    if state in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[18])


@dataclass(frozen=True)
class ProcessId:
    """A process: its number and when it started, which together are never used twice between two boots."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Return the id of the living process `pid`; `ProcessLookupError` when there is none."""
        return cls(pid, start_ticks(pid))

    def alive(self) -> bool:
        """Return whether it still runs."""
        try:
            return start_ticks(self.pid) == self.started
        except ProcessLookupError:
            return False

    def end(self, patience: float = 5.0) -> None:
        """Have it end: SIGTERM, and SIGKILL after `patience` seconds; return when it has.

        Does nothing when it does not live any more. With `patience` 0 SIGKILL at once. A process that is the first of
        its PID namespace has ended only when everything in that namespace has.
        """
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # Asked after the handle was opened: from here on the handle means this process and no other.
            if not self.alive():
                return
            if patience:
                signal.pidfd_send_signal(handle, signal.SIGTERM)
            if not has_ended(handle, patience):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                has_ended(handle, 10.0)
        except ProcessLookupError:
            return
        finally:
            os.close(handle)


def has_ended(handle: int, timeout: float) -> bool:
    """Return whether the process behind a pidfd ends within `timeout` seconds."""
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(timeout * 1000))
