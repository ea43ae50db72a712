"""Control over several ranks, on a `torch.distributed` store.

Keys, below one prefix an operation: ``beat/R`` holds the latest sign of life of rank R, with its progress;
``arrivals/P`` counts what came in round P and ``arrived/P/N`` holds the N-th outcome of it; ``verdict/P`` holds rank
0's answer; ``ticks`` and ``tick/N`` are rank 0's own signs of life, on which everybody else waits; ``left`` counts who
is done. The requests of a rank do not grow with the number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

from weightferry.cluster.collector import Bell, Heartbeat, ResultCollector
from weightferry.cluster.coordinator import Aborted, Coordinator, PhaseResult, RankResult
from weightferry.cluster.store import RecordingStore, StoreClients, clone, put
from weightferry.cluster.topology import Topology
from weightferry.errors import CollectError, Failure, LeaderLost, from_failures
from weightferry.report.rank_progress import Progress
from weightferry.settings import Settings

logger = logging.getLogger(__name__)

_LOOK = 0.02  # seconds between two looks whether all ranks know of a failure

T = TypeVar("T")
R = TypeVar("R")


class DistributedCoordinator(Coordinator):
    """An operation of several ranks.

    Guaranteed: no wait outlives the ranks that it waits for by more than `beat_timeout` and two `beat_interval`, even
    when the process that holds the store is stopped rather than dead.

    Parameters
    ----------
    clients
        Of the job's store.
    prefix
        Below it every key of this operation lives: all ranks pass the same, and no two operations do.
    rank, names
        This rank in the operation, and by such ranks those in the job.
    operation
        What it does, for errors.
    """

    def __init__(
        self,
        clients: StoreClients,
        prefix: str,
        rank: int,
        names: Sequence[int],
        topology: Topology,
        settings: Settings,
        operation: str = "",
    ) -> None:
        super().__init__(rank, len(names), topology.host, f"{topology.host}/{topology.node_rank}", names)
        self._clients, self._settings = clients, settings
        self._rounds: list[str] = []
        self._heard: list[str] = []
        self._pointless = ""  # the round that failed elsewhere while this rank still works for it, and how
        self._why = ""
        self._cut_off = threading.Event()  # the store is gone, or rank 0 is silent: no verdict will come
        self._beaten = time.monotonic()  # when the store answered last
        self._over = threading.Event()
        self._began = time.monotonic()
        self.operation = operation
        with self._alive("agree"):
            # Connecting to a store that is gone lasts for as long as the store's own time limit, twice.
            self._store = dist.PrefixStore(prefix, self._served(lambda: clients.waiting, "agree"))
            self._prefix = prefix
            side = self._served(lambda: clients.side, "agree") if rank == 0 else None
            self._bell = Bell(dist.PrefixStore(prefix, side), names) if side else None
            self._served(lambda: put(self._store, f"beat/{rank}", Heartbeat(0).dumps()), "agree")
        self._heart = threading.Thread(target=self._beat, args=(prefix,), name="weightferry-beat", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """See `Coordinator.check`."""
        if self._lost() or (self._rounds and self._pointless == self._rounds[-1]):
            raise Aborted(self._why or "the ranks of this operation have lost each other")

    def seen(self) -> Mapping[int, Progress]:
        """See `Coordinator.seen`."""
        return {**(self._bell.progress if self._bell else {}), **super().seen()}

    @contextlib.contextmanager
    def meeting(self, name: str) -> Iterator[dist.Store]:
        """See `Coordinator.meeting`."""
        recording = RecordingStore(dist.PrefixStore(name, self._store))
        try:
            yield recording
        finally:
            with contextlib.suppress(CollectError, dist.DistError):
                if recording.busy:
                    # Somebody waits on that client still: what there is to say goes over another one.
                    self._clients.lost = True
                    self._store = self._served(lambda: dist.PrefixStore(self._prefix, clone(self._clients.store)), name)
                if not self._lost():
                    self._served(lambda: recording.remove_all(dist.PrefixStore(name, self._store)), name)

    def _lost(self) -> bool:
        """Whether no verdict will come."""
        return self._cut_off.is_set() or time.monotonic() - self._beaten > self._settings.beat_timeout

    def _served(self, call: Callable[[], T], phase: str) -> T:
        """Make a call on the store that may block, for as long as rank 0 and the store give signs of life."""

        def check() -> None:
            if self._lost():
                self._clients.lost = True
                silence = f"no sign of life for {self._settings.beat_timeout:.0f} s, from it or from the job's store"
                raise self._lost_rank_0(phase, silence)

        return self._clients.caller.call(call, check)

    def _round(
        self,
        phase: str,
        work: Callable[[], T],
        combine: Callable[[Mapping[int, T]], R],
        ranks: Collection[int],
        role: str,
    ) -> R:
        name = f"{len(self._rounds)}-{phase}"
        self._rounds.append(name)
        cause: BaseException | None = None
        with self._alive(phase), self._gathering(name, phase, ranks, combine):
            if self.rank in ranks:
                published, cause = RankResult.of(self, phase, role, work)
                if not isinstance(cause, Aborted):
                    self._served(lambda: self._publish(name, published), phase)
                if cause is not None and not isinstance(cause, Exception):
                    raise cause  # KeyboardInterrupt and SystemExit go their way
            verdict = self._served(lambda: self._await_verdict(name, phase), phase)
            if verdict.failures:
                self._served(lambda: self._hear(name, verdict), phase)
        value: R = verdict.get(self, None if isinstance(cause, Aborted) else cause)
        return value

    def _hear(self, name: str, verdict: PhaseResult) -> None:
        """Note that this rank knows of a failure; rank 0 waits for the others, since the store may go with it."""
        self._heard.append(f"heard/{name}")
        heard = self._store.add(self._heard[-1], 1)
        if self._bell:
            lost = {failure.rank for failure in verdict.failures if failure.kind == LeaderLost.__name__}
            living = sum(self.names[rank] not in lost for rank in self._bell.hosts)  # of those that have called
            # Who works for the round notices at the next beat.
            until = time.monotonic() + 2 * self._settings.beat_interval
            while heard < living and time.monotonic() < until:
                time.sleep(_LOOK)
                heard = self._store.add(self._heard[-1], 0)

    def _publish(self, name: str, outcome: bytes) -> None:
        number = self._store.add(f"arrivals/{name}", 1)
        put(self._store, f"arrived/{name}/{number}", outcome)

    @contextlib.contextmanager
    def _alive(self, phase: str) -> Iterator[None]:
        """Say who is gone when the store is: it lives in a process of the job, mostly rank 0's."""
        try:
            yield
        except dist.DistError as error:
            self._cut_off.set()
            self._clients.lost = True
            told = f"the job's store is gone, and with it the rank or agent that held it: {error}"
            raise self._lost_rank_0(phase, told) from error

    def _lost_rank_0(self, phase: str, told: str) -> CollectError:
        host = os.environ.get("MASTER_ADDR", "its host")
        rank = self.names[0]
        return from_failures({rank: Failure(rank, host, phase, LeaderLost.__name__, told)}, self.operation)

    def _beat(self, prefix: str) -> None:
        """Give signs of life, and watch for what makes this rank's work pointless: a verdict, or nobody to give one."""
        count, heard = 0, (0, time.monotonic())
        try:
            while not self._over.wait(self._settings.beat_interval):
                side = dist.PrefixStore(prefix, self._clients.side)  # most operations end before they need it
                count += 1
                put(side, f"beat/{self.rank}", Heartbeat(count, self.progress()).dumps())
                if self._bell:
                    self._bell.ring()
                if self._rounds and side.check([f"verdict/{(name := self._rounds[-1])}"]):
                    verdict: PhaseResult = pickle.loads(side.get(f"verdict/{name}"))  # noqa: S301 -- by rank 0 of this job
                    self._why, self._pointless = str(verdict.error(self) or ""), name
                ticks = side.add("ticks", 0)
                self._beaten = time.monotonic()
                if ticks != heard[0]:
                    heard = (ticks, self._beaten)
                elif ticks and self._beaten - heard[1] > self._settings.beat_timeout:
                    self._cut_off.set()
        except dist.DistError:
            self._cut_off.set()  # whoever waits on the store says so

    def _await_verdict(self, name: str, phase: str) -> PhaseResult:
        key = f"verdict/{name}"
        while True:
            # The count first: a bell that rings after this look is then still to be heard.
            ticks = self._store.add("ticks", 0)
            if self._store.check([key]):
                break
            try:
                self._store.wait([f"tick/{ticks + 1}"], timedelta(seconds=self._settings.beat_timeout))
            except dist.DistStoreError:
                if not self._store.add("ticks", 0) and not self._store.check([key]):
                    self._rank_0_has_not_called(phase)
        verdict: PhaseResult = pickle.loads(self._store.get(key))  # noqa: S301 -- written by rank 0 of this job
        return verdict

    def _rank_0_has_not_called(self, phase: str) -> None:
        waited = time.monotonic() - self._began
        if waited > self._settings.agree_timeout:
            raise self._lost_rank_0(phase, f"no call in {waited:.0f} s")
        logger.warning("still missing after %.0f s: rank %d, which all others wait for", waited, self.names[0])

    @contextlib.contextmanager
    def _gathering(
        self, name: str, phase: str, ranks: Collection[int], combine: Callable[[Mapping[int, Any]], Any]
    ) -> Iterator[None]:
        """On rank 0, gather the outcomes in a thread while this rank does its own part of the work."""
        if self._bell is None:
            yield
            return
        gathering = ResultCollector(self, self._bell, name, phase, ranks, self._settings)
        thread = threading.Thread(target=gathering.run, args=(combine,), name="weightferry-gather", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            gathering.give_up()
            raise
        finally:
            thread.join()

    def all_told(self, seconds: float) -> None:
        """See `Coordinator.all_told`."""
        until = time.monotonic() + seconds
        with contextlib.suppress(dist.DistError, CollectError):
            told = self._served(lambda: self._store.add("told", 1), "close")
            while told < self.world_size and time.monotonic() < until:
                time.sleep(0.1)
                told = self._served(lambda: self._store.add("told", 0), "close")

    def close(self) -> None:
        """See `Coordinator.close`; the last rank to leave removes what is left in the store."""
        self._over.set()
        if self._lost():
            return  # the heart may be inside a call that does not return
        while self._heart.is_alive():
            self._heart.join(_LOOK)
            if self._lost():
                return
        with contextlib.suppress(dist.DistError, CollectError):
            self._served(self._tidy, "close")

    def _tidy(self) -> None:
        self._store.delete_key(f"beat/{self.rank}")
        if self._store.add("left", 1) == self.world_size:
            for key in (
                *(f"verdict/{name}" for name in self._rounds),
                *self._heard,
                *Bell.keys(self._store),
                "told",
                "left",
            ):
                self._store.delete_key(key)
