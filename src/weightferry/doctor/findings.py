"""The measurements and the conclusion as plain values, with the field names of the JSON report.

Rates are in MB/s (10^6 bytes a second), sizes in bytes, times in seconds.
"""

from __future__ import annotations

from typing import Any, TypedDict

SCHEMA = 1
"""Version of the JSON report; it rises when a field disappears or changes its meaning."""


class CacheFolder(TypedDict):
    """The cache folder on one node.

    Attributes
    ----------
    problem
        Why the node cannot use it; the fields after `free_bytes` are then null.
    fallocate, flock
        ``ok``, or the name of the error: ``ENOSYS``, ``ENOLCK``, ...
    write_mb_s, read_mb_s
        The write includes fsync. The read starts after `posix_fadvise` asks the kernel to drop the file from memory.
    """

    folder: str
    problem: str | None
    filesystem: str
    free_bytes: int | None
    fallocate: str | None
    flock: str | None
    write_mb_s: float | None
    read_mb_s: float | None


class LocalDisk(TypedDict):
    """A usual folder for node-local files, as one node has it."""

    folder: str
    filesystem: str
    free_bytes: int


class Node(TypedDict):
    """One node."""

    rank: int
    host: str
    boot_id: str
    interface: str
    cache: CacheFolder
    candidates: list[LocalDisk]


class SharedFolder(TypedDict):
    """One folder, compared between all nodes.

    Attributes
    ----------
    roles
        The folder's uses: cache, shared, home, collect_in.
    filesystems
        Type of the file system, by host.
    problems
        Why a host cannot write there, by host.
    groups
        Ranks that see each other's files. A rank with a problem is in no group.
    shared
        Whether there are several nodes and all of them are in one group.
    visible_s
        The longest time until a node saw a file of another node.
    locks
        ``exclude``, ``do not exclude``, or the name of an error; null where no two nodes share the folder.
    """

    folder: str
    roles: list[str]
    filesystems: dict[str, str]
    problems: dict[str, str]
    groups: list[list[int]]
    shared: bool
    visible_s: float | None
    locks: str | None


class PeerRate(TypedDict):
    """The rate from one node to its neighbour while all nodes send and receive."""

    sender: int
    receiver: int
    mb_s: float


class OriginRate(TypedDict):
    """The rate of one connection from rank 0 to the origin."""

    source: str
    error: str | None
    bytes: int
    seconds: float
    mb_s: float | None


class StageResult(TypedDict):
    """The stage of a generated file.

    Attributes
    ----------
    sha256
        Of the generated file.
    nodes_sha256, nodes_origin_bytes
        By rank: the SHA-256 of the staged file on that node, and the bytes that the node read from the origin.
    """

    error: str | None
    bytes: int
    seconds: float | None
    sha256: str
    nodes_sha256: list[str]
    nodes_origin_bytes: list[int]


class Findings(TypedDict):
    """All measurements; `stage` is null when a node cannot use its cache folder."""

    cache_dir: str
    nodes: list[Node]
    folders: list[SharedFolder]
    peers: list[PeerRate]
    origin: OriginRate | None
    stage: StageResult | None


class Conclusion(TypedDict):
    """The conclusion from the findings.

    Attributes
    ----------
    wrong
        Problems that must be solved before weightferry can work here.
    notes
        Facts that cost speed or space, or that surprise.
    cache_dir
        The recommended cache folder; null when none of the checked folders is usable.
    """

    fit: bool
    wrong: list[str]
    notes: list[str]
    cache_dir: str | None


def json_report(findings: Findings | None, conclusion: Conclusion) -> dict[str, Any]:
    """Join the findings and the conclusion into the JSON report."""
    return {"schema": SCHEMA, **(findings or {}), "verdict": conclusion}
