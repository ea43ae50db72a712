"""Rank 0's part of a phase: collect the result of every rank, detect dead ranks, decide the result, publish it."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import distributed as dist

from weightferry.cluster.barrier import StoreBarrier
from weightferry.cluster.coordinator import Coordinator
from weightferry.cluster.heartbeat import Heartbeat, StallDetector, describe_calls, heartbeat_key
from weightferry.cluster.phase_results import PhaseResult, RankResult
from weightferry.errors import CollectError, Failure, LeaderLost, PlanMismatch, Stalled, format_ranks
from weightferry.report.rank_progress import Progress
from weightferry.settings import Settings

logger = logging.getLogger(__name__)

# Seconds to wait for more failures after the first one: the error then lists all failures, not only the first.
_GRACE = 0.5
# Seconds between two looks at the heartbeats after a failure.
_HEARTBEAT_POLL = 0.25
# Seconds between two looks for results: short at first, since most phases take a millisecond.
_SHORTEST_POLL, _LONGEST_POLL = 0.0005, 0.05
_WARN_MISSING_EVERY = 60.0


@dataclass
class JobState:
    """What rank 0 knows of the ranks of an operation.

    Attributes
    ----------
    job_ranks : sequence of int
        By rank of the operation, the rank in the job.
    hosts : dict of int to str
        By rank, the host name. Ranks that have published a result are in it, so later errors can name their hosts.
    progress : dict of int to Progress
        By rank, of the ranks that transfer bytes.
    """

    job_ranks: Sequence[int]
    hosts: dict[int, str] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)


class ResultCollector:
    """Collects the results of one phase on rank 0, in a thread of its own.

    Parameters
    ----------
    coordinator
        Of the operation.
    barrier
        On a store client that no other thread waits on.
    job
        What rank 0 knows of the ranks; updated here.
    function
        The function that the user's code calls.
    key
        Name of the phase in the store.
    phase
        Name of the phase for errors.
    ranks
        The ranks that work in the phase.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        barrier: StoreBarrier,
        job: JobState,
        function: str,
        key: str,
        phase: str,
        ranks: Collection[int],
        settings: Settings,
    ) -> None:
        self._coordinator, self._barrier, self._job = coordinator, barrier, job
        self._function, self._key, self._phase, self._settings = function, key, phase, settings
        self._missing = set(ranks)
        self._read = 0
        self._results: dict[int, RankResult] = {}
        # Seen from here a heartbeat is up to one interval old, and so is the look at it: together `beat_timeout`.
        self._silence = max(settings.beat_timeout / 2, settings.beat_timeout - 2 * settings.beat_interval)
        self._silent_ranks = StallDetector(self._silence)
        # A leader gives up by itself first. This is for a leader inside a call that does not return.
        self._stalled_bytes = StallDetector(1.2 * settings.stall_timeout + 2 * settings.beat_interval)
        self._cancelled = threading.Event()
        self._calls = ""  # which ranks have called, once it matters
        self._other_phases: set[str] = set()  # what ranks that made another call wait for
        self._mismatch_at = 0.0  # seconds into the phase

    def cancel(self) -> None:
        """End without a result: this process is about to exit."""
        self._cancelled.set()

    def run(self, combine: Callable[[Mapping[int, Any]], Any]) -> None:
        """Collect the results, decide the result of the phase, publish it."""
        with contextlib.suppress(dist.DistError):  # without a store there is no result: every rank notices by itself
            failures = self._collect()
            if self._cancelled.is_set():
                return
            result = PhaseResult(failures=tuple(failures.values())) if failures else self._combined(combine)
            self._barrier.release(self._key, result, self._read)
            for phase in self._other_phases:
                self._barrier.release(phase, result, 0)

    def _combined(self, combine: Callable[[Mapping[int, Any]], Any]) -> PhaseResult:
        values = {rank: self._results[rank].value for rank in sorted(self._results)}
        published, _ = RankResult.of(self._coordinator, self._phase, "", lambda: combine(values))
        result: RankResult = pickle.loads(published)  # noqa: S301 -- made in the line above
        return PhaseResult(result.value, (result.failure,) if result.failure else ())

    def _collect(self) -> dict[int, Failure]:
        """Wait for all results, or after a failure until the state of all missing ranks is known.

        A killed rank makes its peers fail over closed connections, and these failures arrive first. So the wait goes
        on until each missing rank has sent another heartbeat or counts as dead.
        """
        began = warned = time.monotonic()
        ends_at, poll, check_at = float("inf"), _SHORTEST_POLL, began + self._settings.beat_interval
        failures: dict[int, Failure] = {}
        unproven: dict[int, bytes] = {}  # missing ranks that have sent no heartbeat since the first failure
        while self._missing and not self._cancelled.wait(poll):
            if time.monotonic() > ends_at and not unproven.keys() - failures.keys() & self._missing:
                break
            arrived = self._read_arrivals()
            poll = _SHORTEST_POLL if arrived else min(2 * poll, _LONGEST_POLL)
            failures |= {result.rank: result.failure for result in arrived if result.failure}
            now = time.monotonic()
            if now > check_at:
                # The failure that a rank published itself is more precise, and wins.
                failures = self._dead_ranks(now - began) | self._stalled_ranks() | failures
                check_at = now + self._settings.beat_interval
            if failures and ends_at == float("inf"):
                ends_at = now + _GRACE
                unproven = self._heartbeats()
            elif failures:
                poll = _HEARTBEAT_POLL
                beats = self._heartbeats()
                unproven = {rank: beat for rank, beat in unproven.items() if beats.get(rank) == beat}
            if now - warned > _WARN_MISSING_EVERY and (absent := self._missing - self._job.hosts.keys()):
                warned = now
                who = format_ranks([self._job.job_ranks[rank] for rank in absent])
                logger.warning("waiting for %.0f s for ranks that have not called yet: ranks %s", now - began, who)
        return failures

    def _read_arrivals(self) -> list[RankResult]:
        arrived = self._barrier.read_arrivals(self._key, self._read)
        self._read += len(arrived)
        for result in arrived:
            self._results[result.rank] = result
            self._job.hosts[result.rank] = result.host
            self._missing.discard(result.rank)
        return arrived

    def _dead_ranks(self, waited: float) -> dict[int, Failure]:
        """Find ranks that send no heartbeat any more, left the operation early, or never called in time.

        All ranks that have called are checked, also the ranks that only wait in this phase: it may last for hours.
        """
        beats = self._heartbeats()
        self._job.progress |= {
            rank: progress for rank, beat in beats.items() if (progress := Heartbeat.loads(beat).progress)
        }
        texts = dict.fromkeys(self._silent_ranks.stalled(beats), f"no heartbeat for over {self._silence:.0f} s")
        for rank, beat in beats.items():
            # A rank that has made another call is alive, but takes no part in this phase, and would never arrive.
            heartbeat = Heartbeat.loads(beat)
            other = heartbeat.call is not None and heartbeat.call.function != self._function
            if rank in self._missing and other and heartbeat.phase:
                self._other_phases.add(heartbeat.phase)
        if self._other_phases and self._all_have_told(beats, waited):
            text = self._describe_calls()
            return {0: self._failure(0, PlanMismatch, f"the ranks make different calls: {text}")}
        for rank in self._watched - beats.keys():
            if rank in self._job.hosts:
                texts[rank] = "left in the middle of the operation"
            elif waited > self._settings.agree_timeout:
                self._calls = self._calls or self._describe_calls()
                texts[rank] = f"did not call within {waited:.0f} s: {self._calls}"
        return {rank: self._failure(rank, LeaderLost, text) for rank, text in texts.items()}

    def _describe_calls(self) -> str:
        return describe_calls(self._barrier.store, self._job.job_ranks, f"{self._function}()")

    def _all_have_told(self, beats: Mapping[int, bytes], waited: float) -> bool:
        """Return whether each rank has said what it calls, or had the time of two heartbeats for it."""
        self._mismatch_at = self._mismatch_at or waited
        told = sum(bool(Heartbeat.loads(beat).phase) for beat in beats.values())
        return told == len(self._job.job_ranks) or waited - self._mismatch_at > 2 * self._settings.beat_interval

    def _stalled_ranks(self) -> dict[int, Failure]:
        """Find ranks that are alive and wait for bytes, when no bytes have moved anywhere in the job for too long.

        The check covers the whole job: a rank that waits for the next frame of a slow neighbour is not stalled.
        """
        moving = {
            rank: progress
            for rank, progress in self._job.progress.items()
            if rank in self._missing
            and progress.phase == self._phase
            and not progress.wait_reason
            and progress.done < progress.expected
        }
        total = sum(progress.done for progress in self._job.progress.values())
        waits = any(progress.wait_reason for rank, progress in self._job.progress.items() if rank in self._missing)
        return {
            rank: self._failure(
                rank,
                Stalled,
                f"{moving[rank].done} of {moving[rank].expected} bytes came, and none for "
                f"{self._settings.stall_timeout:.0f} s",
            )
            for rank in (moving if self._stalled_bytes.stalled({0: total} if moving and not waits else {}) else ())
        }

    def _failure(self, rank: int, kind: type[CollectError], text: str) -> Failure:
        host = self._job.hosts.get(rank, "an unknown host")
        return Failure(self._job.job_ranks[rank], host, self._phase, kind.__name__, text)

    @property
    def _watched(self) -> set[int]:
        return self._missing | self._job.hosts.keys()

    def _heartbeats(self) -> dict[int, bytes]:
        """Read the latest heartbeat of every watched rank that has sent one."""
        keys = self._heartbeat_keys()
        beats = self._barrier.store.multi_get(list(keys.values())) if keys else []
        return {rank: beat for rank, beat in zip(keys, beats, strict=True) if beat}  # empty: the rank left early

    def _heartbeat_keys(self) -> dict[int, str]:
        # multi_get blocks on missing keys. So ranks without a key are left out, in one request when all have one.
        keys = {rank: heartbeat_key(rank) for rank in self._watched}
        if self._barrier.store.check(list(keys.values())):
            return keys
        return {rank: key for rank, key in keys.items() if self._barrier.store.check([key])}
