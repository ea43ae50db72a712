"""How far the whole job is, on one line from one rank: a bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from weightferry.report.rank_progress import Progress
from weightferry.report.text import size

logger = logging.getLogger(__name__)

Seen = Callable[[], Mapping[int, Progress]]
"""Tells how far each rank is, as far as it is known."""

_ON_A_TERMINAL, _IN_A_LOG = 0.5, 10.0  # seconds between two lines


@dataclass(frozen=True)
class JobProgress:
    """Where the job stands at one moment.

    Attributes
    ----------
    at : float
        Seconds, by a clock that does not jump.
    ranks : mapping of int to Progress
        Of the leaders that bring bytes.
    """

    at: float
    ranks: Mapping[int, Progress]

    @property
    def done(self) -> int:
        """Bytes that came to all domains together."""
        return sum(min(one.done, one.expected) for one in self.ranks.values())

    @property
    def expected(self) -> int:
        """Bytes that are to come to all domains together."""
        return sum(one.expected for one in self.ranks.values())

    def rate(self, before: JobProgress, kind: str) -> float:
        """Bytes a second since an earlier moment; `kind` is the name of a count in `Progress`."""
        moved: int = sum(getattr(one, kind) for one in self.ranks.values())
        moved -= sum(getattr(one, kind) for one in before.ranks.values())
        return max(0, moved) / max(1e-3, self.at - before.at)


def line(before: JobProgress, now: JobProgress, hosts: Mapping[int, str], what: str = "from the origin") -> str:
    """Say it in one line: bytes, both rates, the slowest node, what it waits for, time left."""
    origin, peers = now.rate(before, "origin_bytes"), now.rate(before, "peer_bytes")
    said = f"{size(now.done)} of {size(now.expected)}, {size(origin)}/s {what}"
    if len(now.ranks) > 1:
        slowest = min(now.ranks, key=lambda rank: now.ranks[rank].done / max(1, now.ranks[rank].expected))
        one = now.ranks[slowest]
        share = 100 * one.done // max(1, one.expected)
        said += f", {size(peers)}/s between nodes" if any(rank.peer_bytes for rank in now.ranks.values()) else ""
        said += f", slowest {hosts.get(slowest, f'rank {slowest}')} at {share} %"
    if paused := next((one.paused for one in now.ranks.values() if one.paused), ""):
        said += f", {paused}"
    rate = origin + peers
    return said + (f", {(now.expected - now.done) / rate:.0f} s left" if rate and now.done < now.expected else "")


@contextmanager
def shown(seen: Seen, hosts: Mapping[int, str], what: str = "from the origin") -> Iterator[None]:
    """While in this context, show how far the job is.

    On a terminal unless ``HF_HUB_DISABLE_PROGRESS_BARS`` is set; else in the log of this module, at INFO.

    Parameters
    ----------
    seen
        Tells the newest that is known of each rank.
    hosts
        By rank, for the slowest one.
    what
        Is done to the bytes that do not come from peers.
    """
    bar = sys.stderr.isatty() and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "") not in ("1", "true", "True")
    if not bar and not logger.isEnabledFor(logging.INFO):
        yield
        return
    over = threading.Event()
    show = _bar if bar else _log
    thread = threading.Thread(
        target=show, args=(seen, partial(line, hosts=hosts, what=what), over), name="weightferry-progress", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _standings(seen: Seen, over: threading.Event, every: float) -> Iterator[tuple[JobProgress, JobProgress]]:
    """Yield where the job stands, each time with where it stood before."""
    before = JobProgress(time.monotonic(), {})
    while not over.wait(every):
        ranks = {rank: one for rank, one in seen().items() if one.expected or one.paused}
        now = JobProgress(time.monotonic(), ranks)
        yield before, now
        before = now


def _log(seen: Seen, say: Callable[[JobProgress, JobProgress], str], over: threading.Event) -> None:
    for before, now in _standings(seen, over, _IN_A_LOG):
        logger.info("%s", say(before, now))


def _bar(seen: Seen, say: Callable[[JobProgress, JobProgress], str], over: threading.Event) -> None:
    with tqdm(total=1, bar_format="weightferry: {percentage:3.0f}%|{bar:20}| {desc}", leave=False) as bar:
        for before, now in _standings(seen, over, _ON_A_TERMINAL):
            bar.total, bar.n = max(1, now.expected), now.done
            bar.set_description_str(say(before, now))
