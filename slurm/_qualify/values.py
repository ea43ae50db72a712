"""What is asked and what is answered; the answers are plain values, as they stand in the JSON.

Rates are in MB/s (10^6 bytes a second), sizes in bytes, times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

SCHEMA = 1
"""Of the JSON; a new number when a field goes or changes its meaning."""


@dataclass(frozen=True)
class Question:
    """What the user wants to know.

    Attributes
    ----------
    run : str
        Unique; part of the name of everything that is written.
    cache_dir : Path
        The cache folder in question.
    folders : dict of str to (list of str)
        By path, what the folder is to the user: cache, shared, home, collect_in. The cache folder is among them.
    size : int
        Bytes of the file that is staged, and of the one that measures a disk.
    origin : str or None
        A source to read from for a moment.
    """

    run: str
    cache_dir: Path
    folders: dict[str, list[str]]
    size: int
    origin: str | None = None


@dataclass(frozen=True)
class Work:
    """Every path that is written below one of the folders in question.

    Parameters
    ----------
    folder
        The folder in question.
    run
        As in `Question`.
    """

    folder: Path
    run: str

    @property
    def root(self) -> Path:
        """Holds all the others, and is removed at the end."""
        return self.folder / f".weightferry-qualify-{self.run}"

    @property
    def nonces(self) -> Path:
        """One file for each rank that sees the folder."""
        return self.root / "nonces"

    def lock(self, holder: int) -> Path:
        """The file that rank `holder` locks."""
        return self.root / f"lock-{holder}"

    def disk(self, rank: int) -> Path:
        """What a rank writes and reads to measure the disk."""
        return self.root / f"disk-{rank}"

    @property
    def origin(self) -> Path:
        """The folder with the generated file."""
        return self.root / "origin"

    @property
    def cache(self) -> Path:
        """The cache into which it is staged."""
        return self.root / "cache"


class Cache(TypedDict):
    """The cache folder as one node sees it.

    Attributes
    ----------
    problem
        Why it cannot be used; the fields after `free_bytes` are then null.
    fallocate, flock
        ``ok``, or the name of the error: ``ENOSYS``, ``ENOLCK``, ...
    write_mb_s, read_mb_s
        fsync included; read after the kernel was asked to forget the file.
    """

    folder: str
    problem: str | None
    filesystem: str
    free_bytes: int | None
    fallocate: str | None
    flock: str | None
    write_mb_s: float | None
    read_mb_s: float | None


class Candidate(TypedDict):
    """A usual place for node-local files that a node has."""

    folder: str
    filesystem: str
    free_bytes: int


class Node(TypedDict):
    """One node."""

    rank: int
    host: str
    boot_id: str
    interface: str
    cache: Cache
    candidates: list[Candidate]


class Folder(TypedDict):
    """One folder as the nodes see it together.

    Attributes
    ----------
    roles
        What it is to the user.
    filesystems
        Type of the file system, by host.
    problems
        By host, why nothing could be written there.
    groups
        Ranks that see each other's files; those with problems are in none.
    shared
        Whether all nodes are in one group, and there are several.
    visible_s
        The longest time until a file of another node was seen.
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


class Peer(TypedDict):
    """The way from one node to its neighbour, while all nodes send and receive."""

    sender: int
    receiver: int
    mb_s: float


class OriginRate(TypedDict):
    """What one connection of one node brought."""

    source: str
    error: str | None
    bytes: int
    seconds: float
    mb_s: float | None


class Staged(TypedDict):
    """The stage of a generated file.

    Attributes
    ----------
    sha256
        Of the file that was generated.
    nodes_sha256, nodes_origin_bytes
        By rank, what the staged file is there, and how much of it that node read from the origin.
    """

    error: str | None
    bytes: int
    seconds: float | None
    sha256: str
    nodes_sha256: list[str]
    nodes_origin_bytes: list[int]


class Conclusion(TypedDict):
    """The conclusion.

    Attributes
    ----------
    wrong
        What must change before weightferry can work here.
    notes
        What is worth knowing.
    cache_dir
        Which one to use; null when none that was looked at will do.
    """

    fit: bool
    wrong: list[str]
    notes: list[str]
    cache_dir: str | None


class Findings(TypedDict):
    """Everything that was measured; `stage` is null when a node cannot use its cache folder."""

    cache_dir: str
    nodes: list[Node]
    folders: list[Folder]
    peers: list[Peer]
    origin: OriginRate | None
    stage: Staged | None


def report(findings: Findings | None, verdict: Conclusion) -> dict[str, Any]:
    """Put both together for JSON."""
    return {"schema": SCHEMA, **(findings or {}), "verdict": verdict}
