"""`Testbed`: the cluster as an object."""

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
from .children import await_end, end
from .errors import TestbedError
from .files import PROXY_VARIABLES
from .layout import ENTER, LOCAL, Layout
from .origin import Origin, await_listener, listens
from .packages import ensure_packages
from .processes import ProcessId
from .spec import HEAD, ORIGIN, Spec
from .state import State

_IDLE_PATIENCE = 30.0  # seconds; one is enough

Command = Sequence[str | os.PathLike[str]]


@final
class Testbed:
    """A Slurm cluster on this machine.

    Guaranteed: it ends with the process that started it, however that one ends (SIGKILL too), unless `start` was told
    otherwise; then nothing of it is left: no process, no mount, no interface, no namespace, no file. It changes
    nothing of the machine that processes outside see, except for its folder under /tmp. Any number run side by side.

    Not guaranteed: isolation from the file system. All hosts see the machine's own, /tmp and the sources included; that
    is the storage the nodes share. What they have to themselves is `local`, /dev/shm, /proc, /sys and /etc/hosts.

    Parameters
    ----------
    spec
        What it looks like.
    name
        Unique among living testbeds; None: made up.
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
        """Return the running testbed of that name, which somebody else started.

        Raises
        ------
        TestbedError
            There is none.
        """
        state = State.load(Layout(name))
        if not state.supervisor.alive():
            raise TestbedError(f"testbed {name!r} has died")
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
        """Bring it up: install missing packages if root, start, return when every node is idle.

        Parameters
        ----------
        owner
            The process with which it ends; None: this one.
        stay
            Let it have no owner: it is up until somebody attaches and stops it.

        Raises
        ------
        TestbedError
            It did not come up; nothing of it is left.
        """
        ensure_packages()
        self._state, self._child = starting.launch(self.spec, self.layout, None if stay else owner or os.getpid())
        try:
            self._await_idle()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Take it down; return when nothing is left of it. Does nothing when it is not up.

        Raises
        ------
        TestbedError
            Its processes do not go.
        """
        if self._state is None:
            return
        self._state.supervisor.end()
        for process in (self._child, *self._commands):
            if process:
                await_end(process)
        registry.release(self.layout)
        self._state = self._child = None
        self._commands.clear()

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the compute nodes."""
        return tuple(host.name for host in self.spec.hosts if host.role == "node")

    @property
    def addresses(self) -> dict[str, str]:
        """By name, the IPv4 address of every host: nodes, ``head`` and ``origin``."""
        return {host.name: host.address for host in self.spec.hosts}

    @property
    def shared(self) -> Path:
        """A folder that all hosts and this process see, empty at the start and removed at the end."""
        return self.layout.shared

    @property
    def clients(self) -> Path:
        """A folder with sbatch, srun, squeue... for processes outside, which work on the head.

        With it first in PATH, submitit in this process submits to the testbed.
        """
        return self.layout.clients

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return this process's environment as it is of use inside, with `extra` added."""
        inherited = {name: value for name, value in os.environ.items() if name not in PROXY_VARIABLES}
        folders = inherited.get("PATH", os.defpath).split(os.pathsep)
        inherited["PATH"] = os.pathsep.join(folder for folder in folders if folder != str(self.clients))
        return {**inherited, "SLURM_CONF": str(self.layout.slurm_conf), **(extra or {})}

    def entry(self, command: Command, node: str | None = None) -> list[str]:
        """Return the command line that, run outside with `environment`, runs `command` on `node`."""
        first = self._first_process(node or HEAD)
        words = [os.fspath(word) for word in command]
        return [sys.executable, "-I", "-S", str(ENTER), str(first.pid), str(first.started), *words]

    def popen(
        self, command: Command, node: str | None = None, *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start `command` on a host and return without waiting.

        Signals sent to the returned process reach the command. It keeps this process's working folder.

        Parameters
        ----------
        command
            Program and arguments.
        node
            Name of a host, ``head`` and ``origin`` included; None: the head, where srun and sbatch are at home.
        env
            Added to `environment`.
        options
            As `subprocess.Popen` takes them; output is text.
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
        """Run `command` on a host to its end, as `popen` starts it; output is kept and split into both streams.

        Raises
        ------
        TestbedError
            With `check`, when it fails: with its output.
        subprocess.TimeoutExpired
            It took longer than `timeout` seconds and was killed.
        """
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        with self.popen(command, node, env=env, **options) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                end(process)
                raise
        words = [os.fspath(word) for word in command]
        if check and process.returncode:
            raise TestbedError(f"{' '.join(words)}: exit status {process.returncode}\n{output or ''}{errors or ''}")
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def srun(self, *arguments: str | os.PathLike[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run ``srun ARGUMENTS...`` on the head; `options` as for `run`."""
        return self.run(["srun", *arguments], **options)

    def start_origin(
        self, command: Command, port: int, *, patience: float = 30.0, env: Mapping[str, str] | None = None
    ) -> Origin:
        """Start a server on the origin and return when it listens.

        Parameters
        ----------
        command
            Program and arguments. It should listen on 0.0.0.0 or on ``addresses["origin"]``.
        port
            The TCP port on which it will listen. Every port is free: the host has nothing else on it.
        patience
            Seconds until it must listen.
        env
            Added to `environment`.

        Raises
        ------
        TestbedError
            It ended, or does not listen in time; with what it printed. Or something else listens there.
        """
        host = self._first_process(ORIGIN)
        if listens(host, port):
            raise TestbedError(f"something listens on the origin's port {port} already")
        log = self.layout.log(f"origin-{port}")
        with log.open("wb") as output:
            process = self.popen(command, ORIGIN, env=env, stdout=output, stderr=output)
        if not await_listener(host, port, process, patience):
            end(process)
            raise TestbedError(f"nothing listens on the origin's port {port}:\n{_tail(log)}")
        return Origin(self.addresses[ORIGIN], port, process)

    def kill_host(self, name: str) -> None:
        """End a host as a power cut does: all its processes and its link are gone at once, and do not come back."""
        self._first_process(name).end(patience=0)

    def _first_process(self, host: str) -> ProcessId:
        if self._state is None:
            raise TestbedError(f"testbed {self.layout.name!r} is not up")
        self.spec.host(host)
        return self._state.hosts[host]

    def _await_idle(self) -> None:
        deadline = time.monotonic() + _IDLE_PATIENCE
        while True:
            shown = self.run(["sinfo", "--noheader", "--Node", "--format=%N %T"], check=False)
            states = shown.stdout.split()[1::2]
            if states == ["idle"] * len(self.nodes):
                return
            if time.monotonic() > deadline:
                logs = "\n".join(f"{log}:\n{_tail(log)}" for log in sorted(self.layout.logs.iterdir()))
                raise TestbedError(
                    f"the nodes are not idle after {_IDLE_PATIENCE} s: {shown.stdout}{shown.stderr}\n{logs}"
                )
            time.sleep(0.05)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
