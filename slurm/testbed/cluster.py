"""`Testbed`: starts, uses and stops the cluster."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, final

from . import registry, starting
from .child_processes import terminate, wait_for_end
from .config_files import PROXY_VARIABLES
from .errors import TestbedError
from .layout import ENTER, LOCAL, Layout
from .origin import Origin, is_listening, wait_for_listener
from .packages import ensure_packages
from .processes import ProcessId
from .spec import HEAD, ORIGIN, Spec
from .state import State

_IDLE_TIMEOUT = 30.0  # seconds; usually it takes one

Command = Sequence[str | os.PathLike[str]]


@final
class Testbed:
    """A Slurm cluster on this machine.

    Guaranteed: it ends with the process that started it, also after SIGKILL, unless `start` gets another owner. Then
    it leaves no process, mount, interface, namespace or file. Processes outside see no change of the machine except
    its folder in /tmp. Several testbeds can run at the same time.

    Not guaranteed: isolation of the file system. All hosts see the file system of the machine, with /tmp and the
    sources; it is the shared storage of the nodes. Private to each host are `local`, /dev/shm, /proc, /sys and
    /etc/hosts.

    Parameters
    ----------
    spec
        The shape of the cluster.
    name
        Unique among running testbeds; None: a generated name.
    """

    __test__ = False  # pytest collects classes by this prefix

    local: Path = LOCAL

    def __init__(self, spec: Spec | None = None, name: str | None = None) -> None:
        self.spec = spec or Spec()
        self.layout = Layout(name or f"t{os.getpid()}-{secrets.token_hex(3)}")
        self._state: State | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._commands: list[subprocess.Popen[str]] = []

    def __repr__(self) -> str:
        up = "up" if self._state else "down"
        return f"Testbed({self.layout.name!r}, {up}, nodes={', '.join(self.nodes)}, folder={self.layout.folder})"

    @classmethod
    def attach(cls, name: str) -> Testbed:
        """Return the running testbed of that name, which another process started.

        Raises
        ------
        TestbedError
            There is none.
        """
        state = State.load(Layout(name))
        if not state.supervisor.is_alive():
            raise TestbedError(f"testbed {name!r} has ended; start it with python -m slurm.testbed up")
        testbed = cls(state.spec, name)
        testbed._state = state
        return testbed

    def __enter__(self) -> Testbed:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, owner: int | None = None, stay: bool = False) -> None:
        """Install missing packages as root, start the cluster, and return when every node is idle.

        Parameters
        ----------
        owner
            The testbed stops when this process ends; None: this process.
        stay
            No owner: the testbed runs until a process attaches and stops it.

        Raises
        ------
        TestbedError
            It did not start; no part of it is left.
        """
        ensure_packages()
        self._state, self._child = starting.launch(self.spec, self.layout, None if stay else owner or os.getpid())
        try:
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the testbed, and return when no part of it is left; do nothing if it is not up.

        Raises
        ------
        TestbedError
            Its processes do not end.
        """
        if self._state is None:
            return
        self._state.supervisor.end()
        for process in (self._child, *self._commands):
            if process:
                wait_for_end(process)
        registry.release(self.layout)
        self._state = self._child = None
        self._commands.clear()

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the compute nodes."""
        return tuple(host.name for host in self.spec.hosts if host.role == "node")

    @property
    def addresses(self) -> dict[str, str]:
        """The IPv4 address of every host by name: nodes, ``head`` and ``origin``."""
        return {host.name: host.address for host in self.spec.hosts}

    @property
    def shared(self) -> Path:
        """A folder that all hosts and this process share; empty at the start, removed at the end."""
        return self.layout.shared

    @property
    def clients(self) -> Path:
        """A folder with sbatch, srun, squeue... for processes outside; the commands run on the head.

        With it first in PATH, submitit in this process submits to the testbed.
        """
        return self.layout.clients

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment for commands on hosts: that of this process without proxies, and `extra`."""
        inherited = {name: value for name, value in os.environ.items() if name not in PROXY_VARIABLES}
        folders = inherited.get("PATH", os.defpath).split(os.pathsep)
        inherited["PATH"] = os.pathsep.join(folder for folder in folders if folder != str(self.clients))
        return {**inherited, "SLURM_CONF": str(self.layout.slurm_conf), **(extra or {})}

    def entry(self, command: Command, node: str | None = None) -> list[str]:
        """Return the command line that runs `command` on `node`; start it with `environment`."""
        first = self._first_process(node or HEAD)
        words = [os.fspath(word) for word in command]
        return [sys.executable, "-I", "-S", str(ENTER), str(first.pid), str(first.started), *words]

    def popen(
        self, command: Command, node: str | None = None, *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start `command` on a host and return without waiting.

        The command gets the signals sent to the returned process. It starts in the working folder of this process.

        Parameters
        ----------
        command
            Program and arguments.
        node
            Name of a host, also ``head`` or ``origin``; None: the head, for srun and sbatch.
        env
            Added to `environment`.
        options
            Options of `subprocess.Popen`; output is text.
        """
        process: subprocess.Popen[str] = subprocess.Popen(
            self.entry(command, node), env=self.environment(env), text=True, **options
        )
        self._commands = [other for other in self._commands if other.poll() is None] + [process]
        return process

    def run(
        self,
        command: Command,
        node: str | None = None,
        *,
        check: bool = True,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on a host with `popen`, wait for its end, and return its standard output and error.

        Raises
        ------
        TestbedError
            With `check`: the command failed; with its output.
        subprocess.TimeoutExpired
            It took longer than `timeout` seconds; it is killed.
        """
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        with self.popen(command, node, env=env, **options) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                terminate(process)
                raise
        words = [os.fspath(word) for word in command]
        if check and process.returncode:
            raise TestbedError(f"{' '.join(words)}: exit status {process.returncode}\n{output or ''}{errors or ''}")
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def srun(self, *arguments: str | os.PathLike[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run ``srun ARGUMENTS...`` on the head; `options` as for `run`."""
        return self.run(["srun", *arguments], **options)

    def start_origin(
        self, command: Command, port: int, *, timeout: float = 30.0, env: Mapping[str, str] | None = None
    ) -> Origin:
        """Start a server on the origin and return when it listens.

        Parameters
        ----------
        command
            Program and arguments. It should listen on 0.0.0.0 or on ``addresses["origin"]``.
        port
            The TCP port on which it will listen. Every port of the host is free.
        patience
            Seconds until it must listen.
        env
            Added to `environment`.

        Raises
        ------
        TestbedError
            It ended, or does not listen in time; with its output. Or another server listens on the port.
        """
        host = self._first_process(ORIGIN)
        if is_listening(host, port):
            raise TestbedError(f"another server listens on the origin's port {port} already")
        log = self.layout.log(f"origin-{port}")
        with log.open("wb") as output:
            process = self.popen(command, ORIGIN, env=env, stdout=output, stderr=output)
        if not wait_for_listener(host, port, process, timeout):
            terminate(process)
            raise TestbedError(f"the server does not listen on the origin's port {port}; its output:\n{_tail(log)}")
        return Origin(self.addresses[ORIGIN], port, process)

    def kill_host(self, name: str) -> None:
        """End a host like a power cut: kill all its processes and remove its link, for good."""
        self._first_process(name).end(grace=0)

    def _first_process(self, host: str) -> ProcessId:
        if self._state is None:
            raise TestbedError(f"testbed {self.layout.name!r} is not up; call start()")
        self.spec.host(host)
        return self._state.hosts[host]

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + _IDLE_TIMEOUT
        while True:
            sinfo = self.run(["sinfo", "--noheader", "--Node", "--format=%N %T"], check=False)
            states = sinfo.stdout.split()[1::2]
            if states == ["idle"] * len(self.nodes):
                return
            if time.monotonic() > deadline:
                logs = "\n".join(f"{log}:\n{_tail(log)}" for log in sorted(self.layout.logs.iterdir()))
                raise TestbedError(
                    f"the nodes are not idle after {_IDLE_TIMEOUT} s: {sinfo.stdout}{sinfo.stderr}\n{logs}"
                )
            time.sleep(0.05)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
