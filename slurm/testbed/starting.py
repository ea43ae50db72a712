"""Starts a testbed, in the process that requests it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from . import config_files, registry, reports
from .errors import TestbedError
from .layout import REPOSITORY, Layout
from .processes import ProcessId
from .spec import HEAD, Spec
from .state import State
from .tools import ENVIRONMENT

_REPORT_TIMEOUT = 60.0  # seconds without a report; usually all arrive within two


def launch(spec: Spec, layout: Layout, owner: int | None) -> tuple[State, subprocess.Popen[bytes]]:
    """Start the processes of a testbed.

    Parameters
    ----------
    spec, layout
        The shape of the testbed, and its paths.
    owner
        The testbed ends with this process, also after SIGKILL; None: it keeps running. During the start it also ends
        with the calling process.

    Returns
    -------
    tuple of State and Popen
        The running processes, and this process's child that runs the supervisor.

    Raises
    ------
    TestbedError
        It did not start; no part of it is left.
    """
    lock = registry.claim(layout)
    try:
        _write_files(spec, layout)
        receiver, sender = reports.channel()
        with receiver:
            with sender:
                process = _start_supervisor(layout, sender, lock, owner or os.getpid())
            reported: dict[str, ProcessId] = {}
            try:
                _wait_for_reports(spec, receiver, reported)
                state = State(
                    spec=spec,
                    supervisor=reported.pop(reports.SUPERVISOR),
                    owner=ProcessId.of(owner) if owner else None,
                    hosts=reported,
                )
                _write_clients(state, layout)
                state.save(layout)
                receiver.send(reports.END_WITH_OWNER if owner else reports.KEEP_RUNNING)
            except BaseException as error:
                _append_log(error, layout)
                _kill(process, reported.get(reports.SUPERVISOR))
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
        owner_pidfd = os.pidfd_open(owner)
    except ProcessLookupError:
        raise TestbedError(f"the owner of the testbed, process {owner}, does not exist") from None
    try:
        with layout.log("supervisor").open("ab") as log:
            return subprocess.Popen(
                [
                    *("unshare", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *(sys.executable, "-S", "-m", "slurm.testbed.supervisor"),
                    *(layout.name, str(sender.fileno()), str(owner_pidfd)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
                pass_fds=[sender.fileno(), owner_pidfd, lock],
                start_new_session=True,
            )
    finally:
        os.close(owner_pidfd)


def _wait_for_reports(spec: Spec, receiver: socket.socket, reported: dict[str, ProcessId]) -> None:
    """Wait for the reports of the supervisor and of every host; add each to `reported`."""
    receiver.settimeout(_REPORT_TIMEOUT)
    expected = {reports.SUPERVISOR, *(host.name for host in spec.hosts)}
    while missing := expected - set(reported):
        try:
            report = reports.receive(receiver)
        except TimeoutError:
            raise TestbedError(f"no report from {', '.join(sorted(missing))} within {_REPORT_TIMEOUT:.0f} s") from None
        if report is None:
            raise TestbedError(f"all processes ended before a report from {', '.join(sorted(missing))}")
        if report.error:
            raise TestbedError(f"{report.name}: {report.error}")
        reported[report.name] = ProcessId.of(report.pid)


def _append_log(error: BaseException, layout: Layout) -> None:
    with contextlib.suppress(OSError):
        error.args = (f"{error}\n{layout.log('supervisor').read_text(errors='replace')[-3000:]}",)


def _kill(process: subprocess.Popen[bytes], supervisor: ProcessId | None) -> None:
    if supervisor:
        supervisor.end(grace=0)  # returns when all processes of the testbed have ended
    process.kill()
    process.wait()


def _write_files(spec: Spec, layout: Layout) -> None:
    for folder in (layout.shared, layout.root, layout.etc, layout.controller_state, layout.clients, layout.logs):
        folder.mkdir()
    for host in spec.hosts:
        _write(layout.hosts(host.name), config_files.hosts_file(spec, host))
        layout.spool(host.name).mkdir(parents=True)
    layout.munge.mkdir()
    (layout.munge / "key").touch(mode=0o600)
    (layout.munge / "key").write_bytes(secrets.token_bytes(128))
    _write(layout.spec, json.dumps(spec.to_json()))
    _write(layout.slurm_conf, config_files.slurm_conf(spec, layout))
    _write(layout.etc / "cgroup.conf", config_files.cgroup_conf())
    _write(layout.sacct, config_files.sacct_script(), executable=True)


def _write_clients(state: State, layout: Layout) -> None:
    for command in config_files.CLIENTS:
        _write(
            layout.clients / command, config_files.client_script(command, state.hosts[HEAD], layout), executable=True
        )


def _write(path: Path, text: str, *, executable: bool = False) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755 if executable else 0o644)
