"""Show the progress of the whole job on one rank: as a bar on a terminal, else as a log line every ten seconds."""

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
from weightferry.report.report_text import format_size

logger = logging.getLogger(__name__)

ReadProgress = Callable[[], Mapping[int, Progress]]
"""Returns the last known progress of each rank."""

_BAR_INTERVAL, _LOG_INTERVAL = 0.5, 10.0  # seconds between two updates


@dataclass(frozen=True)
class JobProgress:
    """Progress of the whole job at one moment.

    Attributes
    ----------
    time : float
        Seconds of a monotonic clock.
    ranks : mapping of int to Progress
        Progress of the leaders that receive bytes.
    """

    time: float
    ranks: Mapping[int, Progress]

    @property
    def done(self) -> int:
        """Bytes that all storage domains together have received."""
        return sum(min(rank.done, rank.expected) for rank in self.ranks.values())

    @property
    def expected(self) -> int:
        """Bytes that all storage domains together need."""
        return sum(rank.expected for rank in self.ranks.values())

    def rate(self, before: JobProgress, kind: str) -> float:
        """Return the bytes per second since `before`; `kind` is the name of a counter in `Progress`."""
        moved: int = sum(getattr(rank, kind) for rank in self.ranks.values())
        moved -= sum(getattr(rank, kind) for rank in before.ranks.values())
        return max(0, moved) / max(1e-3, self.time - before.time)


def progress_line(
    before: JobProgress, now: JobProgress, hosts: Mapping[int, str], origin_label: str = "from the origin"
) -> str:
    """Return one line of text: bytes, both rates, the slowest node, the reason of a wait, the time left."""
    origin_rate, peer_rate = now.rate(before, "origin_bytes"), now.rate(before, "peer_bytes")
    text = f"{format_size(now.done)} of {format_size(now.expected)}, {format_size(origin_rate)}/s {origin_label}"
    if len(now.ranks) > 1:
        slowest = min(now.ranks, key=lambda rank: now.ranks[rank].done / max(1, now.ranks[rank].expected))
        progress = now.ranks[slowest]
        percent = 100 * progress.done // max(1, progress.expected)
        if any(rank.peer_bytes for rank in now.ranks.values()):
            text += f", {format_size(peer_rate)}/s between nodes"
        text += f", slowest {hosts.get(slowest, f'rank {slowest}')} at {percent} %"
    if wait_reason := next((rank.wait_reason for rank in now.ranks.values() if rank.wait_reason), ""):
        text += f", {wait_reason}"
    rate = origin_rate + peer_rate
    return text + (f", {(now.expected - now.done) / rate:.0f} s left" if rate and now.done < now.expected else "")


@contextmanager
def show_progress(
    read_progress: ReadProgress, hosts: Mapping[int, str], origin_label: str = "from the origin"
) -> Iterator[None]:
    """Show the progress of the job while this context is open.

    On a terminal it is a bar, unless ``HF_HUB_DISABLE_PROGRESS_BARS`` is set. Else it is a log line at INFO.

    Parameters
    ----------
    read_progress
        Returns the last known progress of each rank.
    hosts
        Host name by rank, to name the slowest node.
    origin_label
        Text after the rate of the bytes that do not come from peers.
    """
    bar = sys.stderr.isatty() and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "") not in ("1", "true", "True")
    if not bar and not logger.isEnabledFor(logging.INFO):
        yield
        return
    stop = threading.Event()
    format_line = partial(progress_line, hosts=hosts, origin_label=origin_label)
    thread = threading.Thread(
        target=_show_bar if bar else _write_log,
        args=(read_progress, format_line, stop),
        name="weightferry-progress",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


FormatLine = Callable[[JobProgress, JobProgress], str]


def _samples(
    read_progress: ReadProgress, stop: threading.Event, interval: float
) -> Iterator[tuple[JobProgress, JobProgress]]:
    """Yield the progress of the job every `interval` seconds, together with the previous progress."""
    before = JobProgress(time.monotonic(), {})
    while not stop.wait(interval):
        ranks = {
            rank: progress for rank, progress in read_progress().items() if progress.expected or progress.wait_reason
        }
        now = JobProgress(time.monotonic(), ranks)
        yield before, now
        before = now


def _write_log(read_progress: ReadProgress, format_line: FormatLine, stop: threading.Event) -> None:
    for before, now in _samples(read_progress, stop, _LOG_INTERVAL):
        logger.info("%s", format_line(before, now))


def _show_bar(read_progress: ReadProgress, format_line: FormatLine, stop: threading.Event) -> None:
    with tqdm(total=1, bar_format="weightferry: {percentage:3.0f}%|{bar:20}| {desc}", leave=False) as bar:
        for before, now in _samples(read_progress, stop, _BAR_INTERVAL):
            bar.total, bar.n = max(1, now.expected), now.done
            bar.set_description_str(format_line(before, now))
