"""The run report: what an operation moved, from where, and how long each phase took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Of the JSON; a new number when a field goes or changes its meaning."""


@dataclass(frozen=True)
class DomainReport:
    """One storage domain.

    Attributes
    ----------
    host, leader_rank, ranks
        Who.
    origin_bytes, copied_bytes, peer_bytes_in, peer_bytes_out
        Bytes that the leader read from the origin (those of broken attempts too), from the user's Hugging Face cache,
        and from and to other leaders.
    cached_bytes
        Bytes that were there already.
    locks
        By what the leaders of other jobs were kept out of its cache: ``flock``, or files, and why.
    seconds
        Of the leader, by phase, waiting for the others included.
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
    """One operation.

    Attributes
    ----------
    operation
        ``collect`` or ``stage``.
    ranks, nodes
        How many.
    total
        ``bytes`` and ``files`` of the manifest once; ``origin_bytes``, ``copied_bytes``, ``peer_bytes`` and
        ``cached_bytes`` of all domains together; ``seconds`` of rank 0 from call to return.
    domains
        One each.
    manifest
        ``source``, ``commit`` and ``files`` (path, size, sha256, and their own source and commit). Source and commit
        are null at the top when there are several. A sha256 is null when nobody computed it.
    """

    operation: str
    ranks: int
    nodes: int
    total: Mapping[str, float]
    domains: list[DomainReport]
    manifest: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the schema's number in front."""
        return {"schema": SCHEMA, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write the JSON to `path`, whole or not at all."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        part.replace(path)
