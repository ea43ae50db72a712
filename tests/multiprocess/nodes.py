"""Two nodes for a test: a Hub in the test's process, ranks beside it, a cache folder per node; and what to check."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.multiprocess.jobs import Got, each, in_own_cache
from weightferry.errors import CollectError
from weightferry.testing.hub import HubServer
from weightferry.testing.ranks import Ranks, run_ranks

HOST = socket.gethostname()
# The ranks' functions lie in test modules; without this, each rank imports for 0.3 s what these import.
PRELOAD = ("pytest", "tests.multiprocess.launched")

# What the user of this machine has set has no business in a test; "" counts as not set.
_CLEARED = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"), "")
_QUICK = {"WEIGHTFERRY_RETRIES": "2", "WEIGHTFERRY_RETRY_WAIT": "0.05", "NO_PROXY": "*", "no_proxy": "*"}
# huggingface_hub asks for a list of agents, which only the real Hub has.
_QUICK["HF_HUB_DISABLE_TELEMETRY"] = "1"
# A rank inside a transfer learns of the failure of another rank with its next heartbeat.
_QUICK["WEIGHTFERRY_BEAT_INTERVAL"] = "0.3"
# torch looks up the name of each peer of a store: where reverse DNS does not answer, each time costs 5 s by default.
_NO_LONG_LOOKUPS = {"RES_OPTIONS": "timeout:1 attempts:1"}


class Nodes:
    """Nodes with two ranks each, beside a Hub.

    Attributes
    ----------
    hub : HubServer
        Empty at first.
    place : Path
        Everything is below.
    shared : bool
        All nodes have one cache folder.
    variables : dict of str to str
        More environment of all ranks.
    by_rank : dict of int to (dict of str to str)
        More environment of one rank; wins.
    """

    def __init__(self, hub: HubServer, place: Path, *, ranks_a_node: int = 2) -> None:
        self.hub, self.place, self.shared, self.ranks_a_node = hub, place, False, ranks_a_node
        self.variables: dict[str, str] = {}
        self.by_rank: dict[int, dict[str, str]] = {}

    def cache(self, rank: int, case: int | None = None) -> Path:
        """The cache folder of a rank, or the one that it has for a case of `cases`."""
        folder = self.place / ("cache" if self.shared else f"node{rank // self.ranks_a_node}")
        return folder if case is None else folder.with_name(f"{folder.name}-{case}")

    def environ(self, rank: int) -> dict[str, str]:
        """The environment of a rank."""
        return {
            **_CLEARED,
            **_QUICK,
            **_NO_LONG_LOOKUPS,
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.place / "huggingface"),
            "WEIGHTFERRY_CACHE_DIR": str(self.cache(rank)),
            **self.variables,
            **self.by_rank.get(rank, {}),
        }

    def run(self, work: Callable[..., Any], *args: Any, world_size: int = 4) -> list[Any]:
        """Run one call on every rank and return the values by rank."""
        outcomes = run_ranks(work, world_size, *args, environ=self.environ, timeout=110, preload=PRELOAD)
        return [outcome.get() for outcome in outcomes]

    def tries(self, *calls: Callable[[], Any], world_size: int = 4) -> list[list[Got]]:
        """Run several calls in one job; by call, by rank, what became of it."""
        by_rank = self.run(each, *calls, world_size=world_size)
        return [list(gots) for gots in zip(*by_rank, strict=True)]

    def cases(self, *cases: Sequence[Callable[[], Any]], world_size: int = 4) -> list[list[list[Got]]]:
        """Run the calls of several cases in one job, each case with empty caches; by case, by call, by rank."""
        calls = [partial(in_own_cache, str(number), call) for number, case in enumerate(cases) for call in case]
        gots = iter(self.tries(*calls, world_size=world_size))
        return [[next(gots) for _ in case] for case in cases]

    def start(self, work: Callable[..., Any], *args: Any, world_size: int = 4) -> Ranks:
        """Start one call on every rank, to be ended by the caller."""
        return Ranks(work, world_size, *args, environ=self.environ, preload=PRELOAD)


def failed_alike(gots: Sequence[Got], kind: type[CollectError], phase: str, ranks: set[int], *texts: str) -> str:
    """Check that every rank raised the same error, and that it names who failed and where.

    Parameters
    ----------
    kind
        The class; `CollectError` itself stands for any of its classes.
    ranks
        Who may have failed: all of them, or those that did before the others were told to stop.
    texts
        What the error says.
    """
    errors = [got.error for got in gots]
    assert len({type(error) for error in errors}) == 1, errors
    assert isinstance(errors[0], kind) if kind is CollectError else type(errors[0]) is kind, errors
    said = {str(error) for error in errors}
    assert len(said) == 1, said
    for error in errors:
        assert isinstance(error, CollectError)
        assert set(error.failures)
        assert set(error.failures) <= ranks
        for rank, failure in error.failures.items():
            assert (failure.rank, failure.host, failure.phase) == (rank, HOST, phase)
            assert failure.traceback
    (text,) = said
    first = text.splitlines()[0]
    assert f" failed in {phase} on {HOST} (rank " in first
    for part in texts:
        assert part in text
    return text


def values(gots: Sequence[Got]) -> list[Any]:
    """The values of a call that went well on every rank."""
    assert [got.error for got in gots] == [None] * len(gots)
    return [got.value for got in gots]


def sha256s(files: Mapping[str, bytes]) -> dict[str, str]:
    """What a rank reports that sees these files."""
    return {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


def check_cache(root: Path, others: Sequence[bytes] = (), *, failed: bool = False) -> list[Path]:
    """Check that whatever has a final name is whole, that no partial data is left, and return the blobs.

    Parameters
    ----------
    others
        Content of sources that publish no checksum.
    failed
        A call has failed: its partial data is there for the next one.
    """
    blobs = []
    known = {hashlib.sha256(content).hexdigest() for content in others}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            if path.parent.name == "blobs":
                blobs.append(path)
                _check_blob(path, known)
            assert failed or "partial" not in path.relative_to(root).parts, f"left behind: {path}"
            assert failed or not name.startswith("."), f"half-made: {path}"
            assert path.exists(), f"dangling: {path}"
    return blobs


def _check_blob(path: Path, known: set[str]) -> None:
    content = path.read_bytes()
    if len(path.name) == 40:  # Git's checksum
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if path.name == git:
            return
    sha256 = hashlib.sha256(content).hexdigest()
    assert path.name == sha256 or sha256 in known, f"wrong content under a final name: {path}"
