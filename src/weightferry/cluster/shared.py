"""Control over several ranks, on a `torch.distributed` store.

Keys, below one prefix an operation: ``beat/R`` counts the signs of life of rank R; ``arrivals/P`` counts what came in
round P and ``arrived/P/N`` holds the N-th outcome of it; ``verdict/P`` holds rank 0's answer; ``ticks`` and ``tick/N``
are rank 0's own signs of life, on which everybody else waits; ``left`` counts who is done. The requests of a rank do
not grow with the number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

from weightferry.cluster.control import Aborted, Control, Outcome, Verdict
from weightferry.cluster.gathering import Bell, Gathering
from weightferry.cluster.store import Clients, put
from weightferry.cluster.topology import Topology
from weightferry.errors import Failure, LeaderLost, from_failures
from weightferry.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Shared(Control):
    """An operation of several ranks.

    Parameters
    ----------
    clients
        Of the job's store.
    prefix
        Below it every key of this operation lives: all ranks pass the same, and no two operations do.
    """

    def __init__(
        self, clients: Clients, prefix: str, rank: int, world_size: int, topology: Topology, settings: Settings
    ) -> None:
        super().__init__(rank, world_size, topology.host, f"{topology.host}/{topology.node_rank}")
        self._settings = settings
        self._rounds: list[str] = []
        self._pointless = ""  # the round that failed elsewhere while this rank still works for it, and how
        self._why = ""
        self._cut_off = threading.Event()  # the store is gone, or rank 0 is silent: no verdict will come
        self._over = threading.Event()
        with self._alive("agree"):
            self._store = dist.PrefixStore(prefix, clients.waiting)
            self._bell = Bell(dist.PrefixStore(prefix, clients.side)) if rank == 0 else None
            self._store.set(f"beat/{rank}", "0")
        self._heart = threading.Thread(target=self._beat, args=(clients, prefix), name="weightferry-beat", daemon=True)
        self._heart.start()

    def store(self, name: str) -> dist.Store:
        """See `Control.store`."""
        return dist.PrefixStore(name, self._store)

    def check(self) -> None:
        """See `Control.check`."""
        if self._cut_off.is_set() or (self._rounds and self._pointless == self._rounds[-1]):
            raise Aborted(self._why or "the ranks of this operation have lost each other")

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
                published, cause = Outcome.of(self.rank, self.host, phase, role, work)
                if not isinstance(cause, Aborted):
                    number = self._store.add(f"arrivals/{name}", 1)
                    put(self._store, f"arrived/{name}/{number}", published)
                if cause is not None and not isinstance(cause, Exception):
                    raise cause  # KeyboardInterrupt and SystemExit go their way
            verdict = self._await_verdict(name, phase)
        value: R = verdict.get(None if isinstance(cause, Aborted) else cause)
        return value

    @contextlib.contextmanager
    def _alive(self, phase: str) -> Iterator[None]:
        """Say who is gone when the store is: it lives in a process of the job, mostly rank 0's."""
        try:
            yield
        except dist.DistError as error:
            told = f"the job's store is gone, and with it the rank or agent that held it: {error}"
            raise from_failures({0: Failure(0, self._store_host, phase, LeaderLost.__name__, told)}) from error

    @property
    def _store_host(self) -> str:
        return os.environ.get("MASTER_ADDR", "its host")

    def _beat(self, clients: Clients, prefix: str) -> None:
        """Give signs of life, and watch for what makes this rank's work pointless: a verdict, or nobody to give one."""
        count, heard = 0, (0, time.monotonic())
        try:
            while not self._over.wait(self._settings.beat_interval):
                side = dist.PrefixStore(prefix, clients.side)  # most operations end before they need it
                count += 1
                side.set(f"beat/{self.rank}", str(count))
                if self._bell:
                    self._bell.ring()
                if self._rounds and side.check([f"verdict/{(name := self._rounds[-1])}"]):
                    verdict: Verdict = pickle.loads(side.get(f"verdict/{name}"))  # noqa: S301 -- by rank 0 of this job
                    self._why, self._pointless = str(verdict.error() or ""), name
                if (ticks := side.add("ticks", 0)) != heard[0]:
                    heard = (ticks, time.monotonic())
                elif ticks and time.monotonic() - heard[1] > self._settings.beat_timeout:
                    self._cut_off.set()
        except dist.DistError:
            self._cut_off.set()  # whoever waits on the store says so

    def _await_verdict(self, name: str, phase: str) -> Verdict:
        key, began = f"verdict/{name}", time.monotonic()
        while True:
            # The count first: a bell that rings after this look is then still to be heard.
            ticks = self._store.add("ticks", 0)
            if self._store.check([key]):
                break
            try:
                self._store.wait([f"tick/{ticks + 1}"], timedelta(seconds=self._settings.beat_timeout))
            except dist.DistStoreError:
                if self._store.add("ticks", 0) == ticks and not self._store.check([key]):
                    self._rank_0_is_silent(phase, time.monotonic() - began, called=ticks > 0)
        verdict: Verdict = pickle.loads(self._store.get(key))  # noqa: S301 -- written by rank 0 of this job
        return verdict

    def _rank_0_is_silent(self, phase: str, waited: float, *, called: bool) -> None:
        if not called and waited < self._settings.agree_timeout:
            logger.warning("rank %d waits for rank 0, which has not called yet (%.0f s)", self.rank, waited)
            return
        told = f"no sign of life for {self._settings.beat_timeout:.0f} s" if called else f"no call in {waited:.0f} s"
        raise from_failures({0: Failure(0, self._store_host, phase, LeaderLost.__name__, told)})

    @contextlib.contextmanager
    def _gathering(
        self, name: str, phase: str, ranks: Collection[int], combine: Callable[[Mapping[int, Any]], Any]
    ) -> Iterator[None]:
        """On rank 0, gather the outcomes in a thread while this rank does its own part of the work."""
        if self._bell is None:
            yield
            return
        gathering = Gathering(self._bell, name, phase, ranks, self._settings)
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
        """See `Control.all_told`."""
        until = time.monotonic() + seconds
        with contextlib.suppress(dist.DistError):
            told = self._store.add("told", 1)
            while told < self.world_size and time.monotonic() < until:
                time.sleep(0.1)
                told = self._store.add("told", 0)

    def close(self) -> None:
        """See `Control.close`; the last rank to leave removes what is left in the store."""
        self._over.set()
        self._heart.join()
        with contextlib.suppress(dist.DistError):
            self._store.delete_key(f"beat/{self.rank}")
            if self._store.add("left", 1) == self.world_size:
                for key in (*(f"verdict/{name}" for name in self._rounds), *Bell.keys(self._store), "told", "left"):
                    self._store.delete_key(key)
