"""Who runs in a testbed, written down for whoever comes later: `run`, `down`, or the next start."""

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
        What it looks like.
    supervisor
        The process whose end is the end of the whole testbed.
    owner
        The process with which it ends; None: it stays until `down`.
    hosts
        By name, the first process of each host: who enters its namespaces is on the host, and its end is the host's.
    """

    spec: Spec
    supervisor: ProcessId
    owner: ProcessId | None
    hosts: dict[str, ProcessId]

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """What has to end: the supervisor first, since with it the kernel ends all others."""
        return (self.supervisor, *self.hosts.values())

    def save(self, layout: Layout) -> None:
        """Write it into the testbed's folder, at once or not at all."""
        text = json.dumps(
            {
                "spec": self.spec.to_json(),
                "supervisor": _pair(self.supervisor),
                "owner": _pair(self.owner) if self.owner else None,
                "hosts": {name: _pair(process) for name, process in self.hosts.items()},
            },
            indent=1,
        )
        draft = layout.state.with_suffix(".new")
        draft.write_text(text)
        draft.replace(layout.state)

    @classmethod
    def load(cls, layout: Layout) -> State:
        """Read it from the testbed's folder.

        Raises
        ------
        TestbedError
            There is no such testbed, or it never got as far as running.
        """
        try:
            values: dict[str, Any] = json.loads(layout.state.read_text())
        except FileNotFoundError:
            raise TestbedError(f"no testbed {layout.name!r} is up: python -m slurm.testbed up") from None
        return cls(
            spec=Spec.from_json(values["spec"]),
            supervisor=ProcessId(*values["supervisor"]),
            owner=ProcessId(*values["owner"]) if values["owner"] else None,
            hosts={name: ProcessId(*pair) for name, pair in values["hosts"].items()},
        )


def _pair(process: ProcessId) -> tuple[int, int]:
    return (process.pid, process.started)
