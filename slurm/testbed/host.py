"""The first process of a host: makes the place, starts its daemon, and reaps until the host's end."""

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
    """Be the host `host_name` of testbed `name`; does not return.

    Called in fresh namespaces. Says so on its output, and goes on when its input is closed: by then it is plugged in.
    """
    layout = Layout(name)
    spec = Spec.from_json(json.loads(layout.spec.read_text()))
    host = spec.host(host_name)
    with socket.socket(fileno=report_to) as sender:
        try:
            sys.stdout.buffer.write(b"born\n")
            sys.stdout.buffer.flush()
            sys.stdin.buffer.read()
            _settle(spec, host, layout)
        except Exception as error:
            # Whatever it is, only the starter has somebody to tell.
            reports.send(sender, host.name, f"{type(error).__name__}: {error}")
            raise SystemExit(1) from error
        reports.send(sender, host.name)
    reap_for_ever()


def reap_for_ever() -> None:
    """Collect the children's ends, as the first process of a PID namespace must."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            # Orphans may come, and no signal says so.
            time.sleep(0.2)


def _settle(spec: Spec, host: Host, layout: Layout) -> None:
    socket.sethostname(host.name)
    network.join(host)
    filesystem.furnish(spec, host, layout)
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
