"""Rank 0's part of a round: gather what the others publish, notice who is dead, give the verdict, wake everybody."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from weightferry.cluster.coordinator import Coordinator, PhaseResult, RankResult
from weightferry.cluster.store import put
from weightferry.errors import CollectError, Failure, LeaderLost, Stalled, ranges
from weightferry.report.rank_progress import Progress
from weightferry.settings import Settings

logger = logging.getLogger(__name__)

# Seconds to wait for more failures after the first, so that the error says all that failed, not just what failed first.
_GRACE = 0.5
# Seconds between two looks at the beats once something has failed.
_LOOK_AT_BEATS = 0.25
# Seconds between two looks for outcomes: short at first, since most rounds take a millisecond.
_SHORTEST_LOOK, _LONGEST_LOOK = 0.0005, 0.05
_SAY_MISSING_EVERY = 60.0


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life.

    Attributes
    ----------
    count
        Of those before it.
    progress
        None while there is nothing to tell.
    """

    count: int
    progress: Progress | None = None

    def dumps(self) -> bytes:
        """Pickle it, small: the store holds one for every rank."""
        told = self.progress if self.progress and (self.progress.expected or self.progress.paused) else None
        return pickle.dumps((self.count, told))

    @classmethod
    def loads(cls, data: bytes) -> Heartbeat:
        """Read what a rank of this job wrote."""
        return cls(*pickle.loads(data))  # noqa: S301


class Bell:
    """Rank 0's signs of life, which wake everybody who waits for a verdict.

    Waiting for the next tick, rather than for the verdict with a time limit, makes a wait end by itself: neither
    polling nor time-outs while all is well.
    """

    _KEPT = 100  # ticks; a waiting rank that reads the count and then waits for the next tick is never that slow

    def __init__(self, store: dist.Store, names: Sequence[int]) -> None:
        self.store, self.names = store, names
        self.hosts: dict[int, str] = {}  # by rank, as far as outcomes told: for the errors of later rounds
        self.progress: dict[int, Progress] = {}  # by rank, of those that bring bytes
        self._lock = threading.Lock()
        self._count = 0

    def ring(self) -> None:
        """Wake everybody who waits."""
        with self._lock:
            self._count += 1
            # The tick first: who reads the old count in between finds its tick there, and looks again.
            self.store.set(f"tick/{self._count}", "")
            self.store.add("ticks", 1)
            self.store.delete_key(f"tick/{self._count - self._KEPT}")

    @classmethod
    def keys(cls, store: dist.Store) -> list[str]:
        """What is in the store because of it."""
        count = store.add("ticks", 0)
        return [*(f"tick/{number}" for number in range(max(1, count - cls._KEPT), count + 1)), "ticks"]


class ResultCollector:
    """One round, seen from rank 0."""

    def __init__(
        self, coordinator: Coordinator, bell: Bell, name: str, phase: str, ranks: Collection[int], settings: Settings
    ) -> None:
        self._coordinator, self._bell, self._name, self._phase, self._settings = (
            coordinator,
            bell,
            name,
            phase,
            settings,
        )
        self._hosts = bell.hosts
        self._store = bell.store
        self._missing = set(ranks)
        self._read = 0
        self._outcomes: dict[int, RankResult] = {}
        # Seen from here, a beat is up to one interval old, and so is the look at it: together `beat_timeout`.
        self._silence = max(settings.beat_timeout / 2, settings.beat_timeout - 2 * settings.beat_interval)
        self._pulse = StallDetector(self._silence)
        # A leader gives up by itself first; this is for one that cannot, inside a call that does not return.
        self._flow = StallDetector(1.2 * settings.stall_timeout + 2 * settings.beat_interval)
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """End without a verdict: this process is going."""
        self._given_up.set()

    def run(self, combine: Callable[[Mapping[int, Any]], Any]) -> None:
        """Gather, judge, publish."""
        with contextlib.suppress(dist.DistError):  # no store, no verdict: everybody notices by themselves
            failures = self._gather()
            if self._given_up.is_set():
                return
            verdict = PhaseResult(failures=tuple(failures.values())) if failures else self._combined(combine)
            put(self._store, f"verdict/{self._name}", pickle.dumps(verdict))
            self._bell.ring()
            for number in range(1, self._read + 1):
                self._store.delete_key(f"arrived/{self._name}/{number}")
            self._store.delete_key(f"arrivals/{self._name}")

    def _combined(self, combine: Callable[[Mapping[int, Any]], Any]) -> PhaseResult:
        values = {rank: self._outcomes[rank].value for rank in sorted(self._outcomes)}
        published, _ = RankResult.of(self._coordinator, self._phase, "", lambda: combine(values))
        outcome: RankResult = pickle.loads(published)  # noqa: S301 -- our own
        return PhaseResult(outcome.value, (outcome.failure,) if outcome.failure else ())

    def _gather(self) -> dict[int, Failure]:
        """Wait for all outcomes, or after a failure until it is known what has become of the others.

        A rank that is killed makes its peers fail over closed connections, and they say so first: the wait goes on
        until each missing rank has given another sign of life, or counts as dead.
        """
        began = said = time.monotonic()
        ends_at, look, judge_at = float("inf"), _SHORTEST_LOOK, began + self._settings.beat_interval
        failures: dict[int, Failure] = {}
        unproven: dict[int, bytes] = {}
        while self._missing and not self._given_up.wait(look):
            if time.monotonic() > ends_at and not unproven.keys() - failures.keys() & self._missing:
                break
            arrived = self._arrivals()
            look = _SHORTEST_LOOK if arrived else min(2 * look, _LONGEST_LOOK)
            failures |= {outcome.rank: outcome.failure for outcome in arrived if outcome.failure}
            now = time.monotonic()
            if now > judge_at:
                # What a rank said itself is more precise.
                failures = self._dead(now - began) | self._stalled() | failures
                judge_at = now + self._settings.beat_interval
            if failures and ends_at == float("inf"):
                ends_at = now + _GRACE
                unproven = self._beats()
            elif failures:
                look = _LOOK_AT_BEATS
                beats = self._beats()
                unproven = {rank: count for rank, count in unproven.items() if beats.get(rank) == count}
            if now - said > _SAY_MISSING_EVERY and (absent := self._missing - self._hosts.keys()):
                said = now
                who = ranges([self._bell.names[rank] for rank in absent])
                logger.warning("still missing after %.0f s: ranks %s", now - began, who)
        return failures

    def _arrivals(self) -> list[RankResult]:
        count = self._store.add(f"arrivals/{self._name}", 0)
        if count == self._read:
            return []
        keys = [f"arrived/{self._name}/{number}" for number in range(self._read + 1, count + 1)]
        self._read = count
        arrived = [pickle.loads(value) for value in self._store.multi_get(keys)]  # noqa: S301 -- ranks of this job
        for outcome in arrived:
            self._outcomes[outcome.rank] = outcome
            self._hosts[outcome.rank] = outcome.host
            self._missing.discard(outcome.rank)
        return arrived

    def _dead(self, waited: float) -> dict[int, Failure]:
        """Find ranks that are gone: no more signs of life, left on the way, or never called in time.

        All that have called are looked at, also those that only wait in this round: it may last for hours.
        """
        beats = self._beats()
        self._bell.progress |= {rank: said for rank, beat in beats.items() if (said := Heartbeat.loads(beat).progress)}
        told = dict.fromkeys(self._pulse.stopped(beats), f"no sign of life for over {self._silence:.0f} s")
        for rank in self._watched - beats.keys():
            if rank in self._hosts:
                told[rank] = "left in the middle of the operation"
            elif waited > self._settings.agree_timeout:
                told[rank] = f"did not call within {waited:.0f} s"
        return {rank: self._failure(rank, LeaderLost, text) for rank, text in told.items()}

    def _stalled(self) -> dict[int, Failure]:
        """Find who lives and waits for bytes, when nowhere in the job any have come for too long.

        Not rank by rank: whoever waits for a neighbour's next frame stands still while that one is slow.
        """
        moving = {
            rank: said
            for rank, said in self._bell.progress.items()
            if rank in self._missing and said.phase == self._phase and not said.paused and said.done < said.expected
        }
        total = sum(said.done for said in self._bell.progress.values())
        waits = any(said.paused for rank, said in self._bell.progress.items() if rank in self._missing)
        return {
            rank: self._failure(
                rank,
                Stalled,
                f"{moving[rank].done} of {moving[rank].expected} bytes came, and none for "
                f"{self._settings.stall_timeout:.0f} s",
            )
            for rank in (moving if self._flow.stopped({0: total} if moving and not waits else {}) else ())
        }

    def _failure(self, rank: int, kind: type[CollectError], text: str) -> Failure:
        host = self._hosts.get(rank, "an unknown host")
        return Failure(self._bell.names[rank], host, self._phase, kind.__name__, text)

    @property
    def _watched(self) -> set[int]:
        return self._missing | self._hosts.keys()

    def _beats(self) -> dict[int, bytes]:
        """Read the count of beats of every rank that is watched and has one."""
        here = self._with_a_beat()
        return dict(zip(here, self._store.multi_get(list(here.values())), strict=True)) if here else {}

    def _with_a_beat(self) -> dict[int, str]:
        # multi_get waits for keys that are not there: who has none is sorted out first, in one request when all have.
        keys = {rank: f"beat/{rank}" for rank in self._watched}
        if self._store.check(list(keys.values())):
            return keys
        return {rank: key for rank, key in keys.items() if self._store.check([key])}


class StallDetector:
    """What has not changed for too long, by rank."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._seen: dict[int, tuple[object, float]] = {}

    def stopped(self, values: Mapping[int, object]) -> list[int]:
        """Take the values as they are now; return the ranks whose value has not changed for the time-out."""
        now = time.monotonic()
        # Who is not looked at for a while begins anew.
        self._seen = {
            rank: before if (before := self._seen.get(rank)) and before[0] == value else (value, now)
            for rank, value in values.items()
        }
        return [rank for rank in values if now - self._seen[rank][1] > self._timeout]
