"""Run a command on a host of the testbed: ``enter.py PID STARTED COMMAND...``.

`nsenter` does the same, but as a parent it dies of the signal meant for the command, which then runs on. This one
hands signals on, and the kernel ends the command should this process be killed.

A script of its own, with the standard library alone and no imports of ours: it runs once a command, and starts in
10 ms that way.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80
# The mount namespace last: with it the /proc of the machine is out of sight.
_NAMESPACES = ("pid", "ipc", "uts", "net", "mnt")
_HANDED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


def main(arguments: list[str]) -> int:
    """Enter the namespaces of the process, run the command there, return its exit status (128 + n for signal n)."""
    pid, started, *command = arguments
    folder = _own_folder()
    _join(int(pid), started)
    waited_for = _HANDED_ON | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    child = os.fork()
    if not child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _become(command, folder)
    return _stand_by(child, waited_for)


def _own_folder() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "/"


def _join(pid: int, started: str) -> None:
    """Enter the namespaces of `pid`; the PID namespace is entered by the children from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        handles = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in _NAMESPACES]
        # Asked after the namespaces were opened: were the number in other hands by now, it would show here.
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19] != started:
            raise ProcessLookupError
    except (FileNotFoundError, ProcessLookupError):
        sys.exit(f"enter.py: the testbed's host (process {pid}) is gone")
    for handle in handles:
        if libc.setns(handle, 0):
            sys.exit(f"enter.py: setns: {os.strerror(ctypes.get_errno())}")
        os.close(handle)


def _become(command: list[str], folder: str) -> None:
    """Turn this process, forked a moment ago, into `command`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        if Path(folder).is_dir():
            os.chdir(folder)
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _stand_by(child: int, waited_for: set[signal.Signals]) -> int:
    """Hand signals on to `child` until it ends; return its exit status."""
    while True:
        # The signal may have come before this line; it is blocked, so it waits here and is not lost.
        info = signal.sigwaitinfo(waited_for)
        if info.si_signo == signal.SIGCHLD:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif info.si_code != _SI_KERNEL:
            # Not a key of the terminal, which reaches the child anyway.
            os.kill(child, info.si_signo)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
