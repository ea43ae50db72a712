"""The heartbeats of ranks: sent from a thread of each rank, and watched for ranks that stand still."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import distributed as dist

from weightferry.cluster.barrier import StoreBarrier
from weightferry.cluster.call_site import CallSite
from weightferry.cluster.phase_results import PhaseResult
from weightferry.cluster.store import put
from weightferry.errors import format_ranks
from weightferry.report.rank_progress import Progress
from weightferry.settings import Settings

logger = logging.getLogger(__name__)

_REPORT_AFTER = 6.0
"""Seconds without a result of the first phase after which a rank says which ranks have called and which have not."""


@dataclass(frozen=True)
class Heartbeat:
    """A sign that a rank is alive.

    Attributes
    ----------
    count
        Number of heartbeats before this one.
    progress
        Progress of the rank; None while no bytes are expected.
    call
        Where the user's code made the call, in the first heartbeat without its guard; None after the first phase.
    phase
        Name in the store of the phase that the rank works in; empty in the first heartbeat and after the first phase.
    """

    count: int
    progress: Progress | None = None
    call: CallSite | None = None
    phase: str = ""

    def dumps(self) -> bytes:
        """Return the pickled heartbeat, small: the store holds one for every rank."""
        active = self.progress and (self.progress.expected or self.progress.wait_reason)
        return pickle.dumps((self.count, self.progress if active else None, self.call, self.phase))

    @classmethod
    def loads(cls, data: bytes) -> Heartbeat:
        """Read the heartbeat of a rank of this job."""
        return cls(*pickle.loads(data))  # noqa: S301


def heartbeat_key(rank: int) -> str:
    """Return the key below the operation's prefix that holds the latest heartbeat of `rank`."""
    return f"heartbeat/{rank}"


def describe_calls(store: dist.Store, job_ranks: Sequence[int], function: str = "this function") -> str:
    """Return which ranks have made the call, from where, and which have not; reads the heartbeats of all ranks.

    Parameters
    ----------
    store
        A client that no other thread waits on, below the prefix of the operation.
    job_ranks
        By rank of the operation, the rank in the job.
    function
        What ranks call that are past the first phase: their heartbeats do not say it.
    """
    callers: dict[str, list[int]] = {}
    guards: dict[str, str] = {}
    absent: list[int] = []
    for rank, job_rank in enumerate(job_ranks):
        if not store.check([heartbeat_key(rank)]):
            absent.append(job_rank)
            continue
        beat = store.get(heartbeat_key(rank))
        call = Heartbeat.loads(beat).call if beat else None  # empty: the rank left early
        text = str(replace(call, guard="")) if call else function
        callers.setdefault(text, []).append(job_rank)
        if call and call.guard:
            guards[text] = f" inside {call.guard}"
    said = [
        f"ranks {format_ranks(ranks)} call {text}{guards.get(text, '')}"
        if ranks[1:]
        else f"rank {ranks[0]} calls {text}{guards.get(text, '')}"
        for text, ranks in callers.items()
    ]
    if absent:
        said.append(f"rank{'s' * (len(absent) > 1)} {format_ranks(absent)} did not call yet")
    advice = "call it on every rank, without the guard" if guards else "every rank must make the same call"
    return f"{'; '.join(said)}. It is collective: {advice}, or pass coordinate=False for this process alone."


class HeartbeatSender:
    """Sends the heartbeats of one rank, and notices when its work has become pointless.

    The thread also sends rank 0's ticks, reads rank 0's ticks on the other ranks, and looks for the result of the
    current phase: while this rank still works, the phase may have failed on another rank.

    Parameters
    ----------
    rank
        In the operation.
    open_store
        Returns a client of the job's store below the operation's prefix, on which no other thread waits. Called in the
        thread: most operations end before the first heartbeat.
    barrier
        On rank 0, the barrier whose ticks are sent; None on other ranks.
    current_phase
        Returns the name of the phase that this rank works in; empty before the first one.
    progress
        Returns the progress of this rank.
    describe
        Returns the error text of a failed phase, or an empty text.
    call_site
        Returns where the user's code made the call.
    job_ranks
        By rank of the operation, the rank in the job.
    """

    def __init__(
        self,
        rank: int,
        settings: Settings,
        open_store: Callable[[], dist.Store],
        barrier: StoreBarrier | None,
        current_phase: Callable[[], str],
        progress: Callable[[], Progress],
        describe: Callable[[PhaseResult], str],
        call_site: Callable[[], CallSite],
        job_ranks: Sequence[int],
    ) -> None:
        self._rank, self._settings, self._open_store, self._barrier = rank, settings, open_store, barrier
        self._current_phase, self._progress, self._describe = current_phase, progress, describe
        self._call_site, self._job_ranks = call_site, job_ranks
        self._call: CallSite | None = None
        self._reported = False
        self._began = time.monotonic()
        self._cut_off = threading.Event()  # the store is gone, or rank 0 is silent: no phase will get a result
        self._store_answered = time.monotonic()
        self._ended = threading.Event()
        self._finished_phase, self._reason = "", ""
        self._thread = threading.Thread(target=self._run, name="weightferry-heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end; it may be inside a call that does not return."""
        self._ended.set()

    def join(self, timeout: float) -> bool:
        """Wait for the thread, at most `timeout` seconds; return whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def cut_off(self) -> None:
        """Record that the store is gone."""
        self._cut_off.set()

    def is_cut_off(self) -> bool:
        """Return whether no phase will get a result any more: the store is gone or silent, or rank 0 is."""
        return self._cut_off.is_set() or time.monotonic() - self._store_answered > self._settings.beat_timeout

    def failed_elsewhere(self, phase: str) -> str | None:
        """Return the error text of `phase` if it already has a result; None if it has none."""
        return self._reason if phase and phase == self._finished_phase else None

    def _run(self) -> None:
        sent, last_tick = 0, (0, time.monotonic())
        try:
            while not self._ended.wait(self._settings.beat_interval):
                store = self._open_store()
                sent += 1
                put(store, heartbeat_key(self._rank), self._heartbeat(sent).dumps())
                if self._barrier:
                    self._barrier.tick()
                barrier, phase = StoreBarrier(store), self._current_phase()
                if phase and (result := barrier.result(phase)) is not None:
                    self._reason, self._finished_phase = self._describe(result), phase
                elif self._in_first_phase() and not self._reported:
                    self._report_calls(barrier)
                ticks = barrier.ticks()
                self._store_answered = time.monotonic()
                if ticks != last_tick[0]:
                    last_tick = (ticks, self._store_answered)
                elif ticks and self._store_answered - last_tick[1] > self._settings.beat_timeout:
                    self._cut_off.set()
        except dist.DistError:
            self._cut_off.set()  # the thread that waits on the store raises the error

    def _in_first_phase(self) -> bool:
        return self._current_phase().startswith("0-")

    def _heartbeat(self, sent: int) -> Heartbeat:
        if not self._in_first_phase():
            return Heartbeat(sent, self._progress())
        if self._call is None:
            # Not earlier: most operations are over before the first heartbeat, and this parses the user's file.
            self._call = self._call_site()
        return Heartbeat(sent, self._progress(), self._call, self._current_phase())

    def _report_calls(self, barrier: StoreBarrier) -> None:
        """Log once which ranks have made the call: one waiting rank finds out, and the others read it.

        A rank whose call stands in a guard does not wait for more ranks to come.
        """
        waited = time.monotonic() - self._began
        in_guard = self._call is not None and self._call.guard
        if not in_guard and waited < min(_REPORT_AFTER, self._settings.agree_timeout / 2):
            return
        text = barrier.shared_text("calls", lambda: describe_calls(barrier.store, self._job_ranks))
        if text is not None:
            self._reported = True
            logger.warning("waiting for %.0f s for all ranks to call: %s", waited, text)


class StallDetector:
    """Finds values, by rank, that have not changed for longer than a timeout.

    Parameters
    ----------
    timeout
        Seconds.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._since: dict[int, tuple[object, float]] = {}

    def stalled(self, values: Mapping[int, object]) -> list[int]:
        """Take the current values; return the ranks whose value has not changed for the timeout."""
        now = time.monotonic()
        # A rank that is missing from `values` for a while starts anew.
        self._since = {
            rank: before if (before := self._since.get(rank)) and before[0] == value else (value, now)
            for rank, value in values.items()
        }
        return [rank for rank in values if now - self._since[rank][1] > self._timeout]
