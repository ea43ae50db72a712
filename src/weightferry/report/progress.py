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
from weightferry.report.text import format_size

logger = logging.getLogger(__name__)

ReadProgress = Callable[[], Mapping[int, Progress]]
"""Tells how far each rank is, as far as it is known."""

_BAR_INTERVAL, _LOG_INTERVAL = 0.5, 10.0  # seconds between two lines


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


def progress_line(
    before: JobProgress, now: JobProgress, hosts: Mapping[int, str], what: str = "from the origin"
) -> str:
    """Say it in one line: bytes, both rates, the slowest node, what it waits for, time left."""
    origin, peers = now.rate(before, "origin_bytes"), now.rate(before, "peer_bytes")
    said = f"{format_size(now.done)} of {format_size(now.expected)}, {format_size(origin)}/s {what}"
    if len(now.ranks) > 1:
        slowest = min(now.ranks, key=lambda rank: now.ranks[rank].done / max(1, now.ranks[rank].expected))
        one = now.ranks[slowest]
        share = 100 * one.done // max(1, one.expected)
        said += f", {format_size(peers)}/s between nodes" if any(rank.peer_bytes for rank in now.ranks.values()) else ""
        said += f", slowest {hosts.get(slowest, f'rank {slowest}')} at {share} %"
    if wait_reason := next((one.wait_reason for one in now.ranks.values() if one.wait_reason), ""):
        said += f", {wait_reason}"
    rate = origin + peers
    return said + (f", {(now.expected - now.done) / rate:.0f} s left" if rate and now.done < now.expected else "")


@contextmanager
def show_progress(
    read_progress: ReadProgress, hosts: Mapping[int, str], what: str = "from the origin"
) -> Iterator[None]:
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
    show = _show_bar if bar else _log_lines
    thread = threading.Thread(
        target=show,
        args=(read_progress, partial(progress_line, hosts=hosts, what=what), over),
        name="weightferry-progress",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _samples(
    read_progress: ReadProgress, over: threading.Event, every: float
) -> Iterator[tuple[JobProgress, JobProgress]]:
    """Yield where the job stands, each time with where it stood before."""
    before = JobProgress(time.monotonic(), {})
    while not over.wait(every):
        ranks = {rank: one for rank, one in read_progress().items() if one.expected or one.wait_reason}
        now = JobProgress(time.monotonic(), ranks)
        yield before, now
        before = now


def _log_lines(
    read_progress: ReadProgress, say: Callable[[JobProgress, JobProgress], str], over: threading.Event
) -> None:
    for before, now in _samples(read_progress, over, _LOG_INTERVAL):
        logger.info("%s", say(before, now))


def _show_bar(
    read_progress: ReadProgress, say: Callable[[JobProgress, JobProgress], str], over: threading.Event
) -> None:
    with tqdm(total=1, bar_format="weightferry: {percentage:3.0f}%|{bar:20}| {desc}", leave=False) as bar:
        for before, now in _samples(read_progress, over, _BAR_INTERVAL):
            bar.total, bar.n = max(1, now.expected), now.done
            bar.set_description_str(say(before, now))
