"""Bringing a testbed up, seen from the process that wants it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from . import files, registry, reports
from .errors import TestbedError
from .layout import REPOSITORY, Layout
from .processes import ProcessId
from .spec import HEAD, Spec
from .state import State
from .tools import ENVIRONMENT

_PATIENCE = 60.0  # seconds without a report; all of them come within one or two


def launch(spec: Spec, layout: Layout, owner: int | None) -> tuple[State, subprocess.Popen[bytes]]:
    """Start the processes of a testbed.

    Parameters
    ----------
    spec, layout
        What to start, and where.
    owner
        The process with which it ends, be it by SIGKILL; None: it stays. Until it is up it ends with this one, too.

    Returns
    -------
    tuple of State and Popen
        Who runs, and this process's child that stands for the supervisor.

    Raises
    ------
    TestbedError
        It did not come up; nothing of it is left.
    """
    lock = registry.claim(layout)
    try:
        _write_files(spec, layout)
        receiver, sender = reports.channel()
        with receiver:
            with sender:
                process = _start_supervisor(layout, sender, lock, owner or os.getpid())
            found: dict[str, ProcessId] = {}
            try:
                _gather(spec, receiver, found)
                state = State(
                    spec=spec,
                    supervisor=found.pop(reports.SUPERVISOR),
                    owner=ProcessId.of(owner) if owner else None,
                    hosts=found,
                )
                _write_clients(state, layout)
                state.save(layout)
                receiver.send(reports.GO if owner else reports.STAY)
            except BaseException as error:
                _explain(error, layout)
                _abandon(process, found.get(reports.SUPERVISOR))
                raise
        return state, process
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            registry.release(layout)
        raise
    finally:
        os.close(lock)


def _start_supervisor(layout: Layout, sender: socket.socket, lock: int, owner: int) -> subprocess.Popen[bytes]:
    try:
        watched = os.pidfd_open(owner)
    except ProcessLookupError:
        raise TestbedError(f"no process {owner} for the testbed to end with") from None
    try:
        with layout.log("supervisor").open("ab") as log:
            return subprocess.Popen(
                [
                    *("unshare", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *(sys.executable, "-S", "-m", "slurm.testbed.supervisor"),
                    *(layout.name, str(sender.fileno()), str(watched)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
                pass_fds=[sender.fileno(), watched, lock],
                start_new_session=True,
            )
    finally:
        os.close(watched)


def _gather(spec: Spec, receiver: socket.socket, found: dict[str, ProcessId]) -> None:
    """Wait until the supervisor and every host have reported, and enter each into `found` as it does."""
    receiver.settimeout(_PATIENCE)
    expected = {reports.SUPERVISOR, *(host.name for host in spec.hosts)}
    while missing := expected - set(found):
        try:
            report = reports.receive(receiver)
        except TimeoutError:
            raise TestbedError(f"no word from {', '.join(sorted(missing))}") from None
        if report is None:
            raise TestbedError(f"all ended before there was word from {', '.join(sorted(missing))}")
        if report.error:
            raise TestbedError(f"{report.who}: {report.error}")
        found[report.who] = ProcessId.of(report.pid)


def _explain(error: BaseException, layout: Layout) -> None:
    with contextlib.suppress(OSError):
        error.args = (f"{error}\n{layout.log('supervisor').read_text(errors='replace')[-3000:]}",)


def _abandon(process: subprocess.Popen[bytes], supervisor: ProcessId | None) -> None:
    if supervisor:
        supervisor.end(patience=0)  # returns when everything in the testbed has ended
    process.kill()
    process.wait()


def _write_files(spec: Spec, layout: Layout) -> None:
    for folder in (layout.shared, layout.root, layout.etc, layout.controller_state, layout.clients, layout.logs):
        folder.mkdir()
    for host in spec.hosts:
        _write(layout.hosts(host.name), files.hosts_file(spec, host))
        layout.spool(host.name).mkdir(parents=True)
    layout.munge.mkdir()
    (layout.munge / "key").touch(mode=0o600)
    (layout.munge / "key").write_bytes(secrets.token_bytes(128))
    _write(layout.spec, json.dumps(spec.to_json()))
    _write(layout.slurm_conf, files.slurm_conf(spec, layout))
    _write(layout.etc / "cgroup.conf", files.cgroup_conf())
    _write(layout.sacct, files.sacct_script(), executable=True)


def _write_clients(state: State, layout: Layout) -> None:
    for command in files.CLIENTS:
        _write(layout.clients / command, files.client_script(command, state.hosts[HEAD], layout), executable=True)


def _write(path: Path, text: str, *, executable: bool = False) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755 if executable else 0o644)
