"""The run report: how many bytes an operation moved, from where, and how long each phase took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Version of the JSON format. It increases when a field is removed or changes its meaning."""


@dataclass(frozen=True)
class DomainReport:
    """The part of the run report about one storage domain.

    Attributes
    ----------
    host, leader_rank, ranks
        Host and rank of the leader, and all ranks of the domain.
    origin_bytes
        Bytes that the leader read from the origin, including those of failed attempts.
    copied_bytes
        Bytes that the leader copied from the user's Hugging Face cache.
    peer_bytes_in, peer_bytes_out
        Bytes that the leader received from other leaders, and sent to them.
    cached_bytes
        Bytes that were in the cache before.
    locks
        The kind of locks that exclude the leaders of other jobs from the cache: ``flock``, or lock files and the reason
        for them.
    seconds
        Seconds of the leader in each phase, including its wait for other ranks.
    """

    host: str
    leader_rank: int
    ranks: list[int]
    origin_bytes: int = 0
    peer_bytes_in: int = 0
    peer_bytes_out: int = 0
    copied_bytes: int = 0
    cached_bytes: int = 0
    locks: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunReport:
    """The run report of one operation.

    Attributes
    ----------
    operation
        ``collect`` or ``stage``.
    ranks, nodes
        Number of ranks and of nodes.
    total
        ``bytes`` and ``files`` of the manifest, each file counted once. ``origin_bytes``, ``copied_bytes``,
        ``peer_bytes`` and ``cached_bytes`` are sums over all domains. ``seconds`` is the time of the call on rank 0.
    domains
        One report for each storage domain.
    manifest
        ``source``, ``commit`` and ``files``. Each file has ``path``, ``size``, ``sha256``, ``source`` and ``commit``.
        The ``source`` and ``commit`` at the top are null if there are several sources. ``sha256`` is null if it was not
        computed.
    """

    operation: str
    ranks: int
    nodes: int
    total: Mapping[str, float]
    domains: list[DomainReport]
    manifest: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON, with the version of the format as ``schema``."""
        return {"schema": SCHEMA, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write the JSON to `path` atomically: into a temporary file that is then renamed."""
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        temporary.replace(path)
