"""Run a command on a host of the testbed: ``enter.py PID STARTED COMMAND...``.

`nsenter` does the same, but a signal for the command kills `nsenter` itself, and the command continues. This script
forwards signals to the command. If this process is killed, the kernel kills the command.

It is a separate script that imports only the standard library: it runs for every command, and so starts in 10 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80
# The mount namespace is last: after it, the /proc of the machine is no longer visible.
_NAMESPACES = ("pid", "ipc", "uts", "net", "mnt")
_FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def main(arguments: list[str]) -> int:
    """Run the command in the namespaces of the process; return its exit status (128 + n for signal n)."""
    pid, started, *command = arguments
    folder = _working_folder()
    _enter_namespaces(int(pid), started)
    signals = _FORWARDED | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _exec(command, folder)
    return _forward_signals(child, signals)


def _working_folder() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "/"


def _enter_namespaces(pid: int, started: str) -> None:
    """Enter the namespaces of `pid`; new children enter its PID namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        handles = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in _NAMESPACES]
        # Check after the namespaces are open: this detects a new process with the same number.
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19] != started:
            raise ProcessLookupError
    except (FileNotFoundError, ProcessLookupError):
        sys.exit(f"enter.py: the host of the testbed (process {pid}) has ended")
    for handle in handles:
        if libc.setns(handle, 0):
            sys.exit(f"enter.py: setns: {os.strerror(ctypes.get_errno())}")
        os.close(handle)


def _exec(command: list[str], folder: str) -> None:
    """Replace this forked process with `command`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        if Path(folder).is_dir():
            os.chdir(folder)
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _forward_signals(child: int, signals: set[signal.Signals]) -> int:
    """Forward signals to `child` until it ends; return its exit status."""
    while True:
        # A signal from before this line is not lost: it is blocked, so it is still pending.
        info = signal.sigwaitinfo(signals)
        if info.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif info.si_code != _SI_KERNEL:
            # The terminal sends its signals (control-C) to the child itself.
            os.kill(child, info.si_signo)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
