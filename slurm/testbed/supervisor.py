"""The first process of a testbed: makes the hosts, and takes everything with it when it ends.

It is the first process of a PID namespace, and everything that runs in the testbed is in that namespace, or in one
below it: when it ends, however, the kernel kills all of that, job tasks that left their parents included. Networks,
mounts and names are in namespaces that no file holds, so they go with their last process.
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
from .processes import has_ended
from .spec import Host, Spec
from .tools import ENVIRONMENT, tool


class _AskedToEndError(Exception):
    """SIGTERM came."""


def main(name: str, report_to: int, owner: int) -> None:
    """Be the supervisor of testbed `name` until its owner ends or SIGTERM comes.

    Parameters
    ----------
    name
        Of the testbed, whose folder is prepared and whose lock this process inherited.
    report_to
        Where to report, as `reports` does it, and where the answer comes from: `reports.STAY` or another.
    owner
        A pidfd of the process with which the testbed ends.
    """
    signal.signal(signal.SIGTERM, _ask_to_end)
    os.umask(0o022)
    layout = Layout(name)
    try:
        with socket.socket(fileno=report_to) as channel:
            _start(layout, channel)
            answer = channel.recv(reports.MAX_BYTES)
        if answer:  # otherwise the starter has ended before it could say anything
            _stand_by(None if answer == reports.STAY else owner)
    except _AskedToEndError:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_all()
        registry.release(layout)


def _ask_to_end(_signal: int, _frame: FrameType | None) -> None:
    raise _AskedToEndError


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
    keepers = {host.name: _start_host(host, layout, channel.fileno()) for host in spec.hosts}
    for keeper in keepers.values():
        if keeper.stdout:
            keeper.stdout.readline()  # says that it is in its namespaces: only now have they a process to name them by
    network.build_switch(spec, {name: keeper.pid for name, keeper in keepers.items()})
    for keeper in keepers.values():
        if keeper.stdin:
            keeper.stdin.close()  # it may go on


def _start_host(host: Host, layout: Layout, report_to: int) -> subprocess.Popen[bytes]:
    """Start `host` in namespaces of its own; return the process that keeps it: it is the host's end when this ends."""
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
    """Start munged as the user of its package, and return when it listens."""
    tool("chown", "-R", "munge:munge", layout.munge)
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
            raise TestbedError(f"munged does not start: {_tail(layout.log('munged'))}")
        time.sleep(0.01)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1000:]


def _stand_by(owner: int | None) -> None:
    """Reap until the owner ends; without one, until SIGTERM."""
    while owner is None or not has_ended(owner, 0.2):
        if owner is None:
            select.select([], [], [], 0.2)
        while _reap(os.WNOHANG):
            pass


def _kill_all() -> None:
    # From the first process of a PID namespace, -1 is everything in it and nothing else.
    if os.getpid() != 1:
        return
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return
    while _reap(0):
        pass


def _reap(options: int) -> bool:
    """Collect one child's end; False: there is none to collect."""
    try:
        return os.waitpid(-1, options)[0] != 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
