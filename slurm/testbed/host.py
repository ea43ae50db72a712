"""The first process of a host: sets up the host, starts its daemon, and reaps processes until the host ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

from . import filesystem, network, reports
from .layout import Layout
from .spec import Host, Spec
from .tools import ENVIRONMENT

_DAEMONS = {"head": "slurmctld", "node": "slurmd"}


def main(name: str, host_name: str, report_to: int) -> None:
    """Run the host `host_name` of testbed `name`; it does not return.

    The supervisor starts it in new namespaces. It writes a line to its standard output, and waits until the supervisor
    closes its standard input: the host is then connected to the bridge.
    """
    layout = Layout(name)
    spec = Spec.from_json(json.loads(layout.spec.read_text()))
    host = spec.host(host_name)
    with socket.socket(fileno=report_to) as sender:
        try:
            sys.stdout.buffer.write(b"started\n")
            sys.stdout.buffer.flush()
            sys.stdin.buffer.read()
            _set_up(spec, host, layout)
        except Exception as error:
            # Only the process that starts the testbed can report the error.
            reports.send(sender, host.name, f"{type(error).__name__}: {error}")
            raise SystemExit(1) from error
        reports.send(sender, host.name)
    reap_children()


def reap_children() -> None:
    """Reap ended processes for ever, as the first process of a PID namespace must."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            # Orphans may arrive without a signal.
            time.sleep(0.2)


def _set_up(spec: Spec, host: Host, layout: Layout) -> None:
    socket.sethostname(host.name)
    network.connect_host(host)
    filesystem.mount_private_folders(spec, host, layout)
    daemon = _DAEMONS.get(host.role)
    if daemon:
        _start_daemon(daemon, host, layout)


def _start_daemon(daemon: str, host: Host, layout: Layout) -> None:
    log = layout.log(daemon if host.role == "head" else f"{daemon}-{host.name}")
    with log.open("ab") as output:
        subprocess.Popen(
            [daemon, "-D"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**ENVIRONMENT, "SLURM_CONF": str(layout.slurm_conf)},
            start_new_session=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
