"""The running processes of a testbed, saved in a file for `run`, `down` and the next start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .errors import TestbedError
from .layout import Layout
from .processes import ProcessId
from .spec import Spec


@dataclass(frozen=True)
class State:
    """A running testbed.

    Attributes
    ----------
    spec
        The shape of the testbed.
    supervisor
        The whole testbed ends with this process.
    owner
        The testbed ends with this process; None: it runs until `down`.
    hosts
        The first process of each host, by name. A process that enters its namespaces is on the host, and the host ends
        with it.
    """

    spec: Spec
    supervisor: ProcessId
    owner: ProcessId | None
    hosts: dict[str, ProcessId]

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """All processes; the supervisor first, since the kernel ends the other processes with it."""
        return (self.supervisor, *self.hosts.values())

    def save(self, layout: Layout) -> None:
        """Write the state into the testbed's folder, atomically."""
        text = json.dumps(
            {
                "spec": self.spec.to_json(),
                "supervisor": _pair(self.supervisor),
                "owner": _pair(self.owner) if self.owner else None,
                "hosts": {name: _pair(process) for name, process in self.hosts.items()},
            },
            indent=1,
        )
        temporary = layout.state.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(layout.state)

    @classmethod
    def load(cls, layout: Layout) -> State:
        """Read the state from the testbed's folder.

        Raises
        ------
        TestbedError
            There is no such testbed, or its start failed.
        """
        try:
            values: dict[str, Any] = json.loads(layout.state.read_text())
        except FileNotFoundError:
            raise TestbedError(f"no testbed {layout.name!r} is up; start it with python -m slurm.testbed up") from None
        return cls(
            spec=Spec.from_json(values["spec"]),
            supervisor=ProcessId(*values["supervisor"]),
            owner=ProcessId(*values["owner"]) if values["owner"] else None,
            hosts={name: ProcessId(*pair) for name, pair in values["hosts"].items()},
        )


def _pair(process: ProcessId) -> tuple[int, int]:
    return (process.pid, process.started)
