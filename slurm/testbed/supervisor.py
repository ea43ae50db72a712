"""The first process of a testbed: starts the hosts, and ends the whole testbed with it.

It is the first process of a PID namespace, and all processes of the testbed are in that namespace or in a nested one.
When it ends for any reason, the kernel kills all of them, also job tasks that left their parents. Networks, mounts and
host names are in namespaces without a file, so they end with their last process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from . import filesystem, network, registry, reports
from .errors import TestbedError
from .layout import Layout
from .processes import wait_until_ended
from .spec import Host, Spec
from .tools import ENVIRONMENT, run_tool


class _Terminated(Exception):
    """The process received SIGTERM."""


def main(name: str, report_to: int, owner: int) -> None:
    """Run the supervisor of testbed `name` until its owner ends or SIGTERM arrives.

    Parameters
    ----------
    name
        Name of the testbed; its folder exists, and this process inherits its lock.
    report_to
        The socket for reports; the starter answers on it with `reports.KEEP_RUNNING` or `reports.END_WITH_OWNER`.
    owner
        A pidfd of the owner; the testbed ends with it.
    """
    signal.signal(signal.SIGTERM, _on_sigterm)
    os.umask(0o022)
    layout = Layout(name)
    try:
        with socket.socket(fileno=report_to) as channel:
            _start(layout, channel)
            answer = channel.recv(reports.MAX_BYTES)
        if answer:  # no answer: the starter has ended
            _wait_for_owner(None if answer == reports.KEEP_RUNNING else owner)
    except _Terminated:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_all()
        registry.release(layout)


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _start(layout: Layout, channel: socket.socket) -> None:
    reports.send(channel, reports.SUPERVISOR)
    try:
        spec = Spec.from_json(json.loads(layout.spec.read_text()))
        filesystem.build_root(layout)
        _start_munged(layout)
        _start_hosts(spec, layout, channel)
    except (TestbedError, OSError) as error:
        reports.send(channel, reports.SUPERVISOR, f"{type(error).__name__}: {error}")
        raise


def _start_hosts(spec: Spec, layout: Layout, channel: socket.socket) -> None:
    processes = {host.name: _start_host(host, layout, channel.fileno()) for host in spec.hosts}
    for process in processes.values():
        if process.stdout:
            process.stdout.readline()  # it is in its namespaces now, so its PID names them
    network.build_bridge(spec, {name: process.pid for name, process in processes.items()})
    for process in processes.values():
        if process.stdin:
            process.stdin.close()  # the host continues its setup


def _start_host(host: Host, layout: Layout, report_to: int) -> subprocess.Popen[bytes]:
    """Start `host` in new namespaces; return its first process: the host ends with it."""
    return subprocess.Popen(
        [
            *("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *(sys.executable, "-S", "-m", "slurm.testbed.host", layout.name, host.name, str(report_to)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[report_to],
    )


def _start_munged(layout: Layout) -> None:
    """Start munged as user munge, and return when it listens."""
    run_tool("chown", "-R", "munge:munge", layout.munge)
    with layout.log("munged").open("ab") as output:
        process = subprocess.Popen(
            [
                *("munged", "--foreground", "--num-threads=2", f"--socket={layout.munge_socket}"),
                *(f"--{kind}-file={layout.munge / kind}" for kind in ("key", "pid", "seed", "log")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=ENVIRONMENT,
            user="munge",
            group="munge",
            extra_groups=[],
        )
    deadline = time.monotonic() + 10
    while not layout.munge_socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TestbedError(f"munged did not start: {_tail(layout.log('munged'))}")
        time.sleep(0.01)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1000:]


def _wait_for_owner(owner: int | None) -> None:
    """Reap processes until the owner ends, or until SIGTERM if there is no owner."""
    while owner is None or not wait_until_ended(owner, 0.2):
        if owner is None:
            select.select([], [], [], 0.2)
        while _reap(os.WNOHANG):
            pass


def _kill_all() -> None:
    # For the first process of a PID namespace, -1 means all other processes of the namespace.
    if os.getpid() != 1:
        return
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return
    while _reap(0):
        pass


def _reap(options: int) -> bool:
    """Reap one child; False: no child has ended."""
    try:
        return os.waitpid(-1, options)[0] != 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
