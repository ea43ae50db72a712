"""The barrier at the end of each phase, on the job's `torch.distributed` store."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Collection
from datetime import timedelta

from torch import distributed as dist

from weightferry.cluster.phase_results import PhaseResult, RankResult
from weightferry.cluster.store import put

_TICKS_KEPT = 100  # a waiting rank that reads the count and then waits for the next tick is never 100 ticks late


class StoreBarrier:
    """Where the ranks of an operation wait for the result of a phase.

    Each rank that worked publishes its result with `arrive`. Every rank then blocks in `wait` until rank 0, which has
    read all results, publishes the result of the phase with `release`.

    This is a barrier on the store, as `torch.distributed.elastic.utils.store.barrier`, and not `dist.barrier()`. The
    latter is a collective: a watchdog ends the job when it lasts longer than the timeout of the process group, so a
    long download would need an infinite timeout, and then a dead leader goes unnoticed. It also carries no result and
    no error. This one waits as long as rank 0 sends heartbeats, and always ends with a result or a named error.

    Rank 0's heartbeats are *ticks*: keys that are set one after the other. A waiting rank waits for the next tick and
    not for the result with a time limit, so it neither polls nor runs into timeouts while all is well.

    Keys below the prefix of the operation: ``arrivals/P`` counts the results of phase P, ``arrived/P/N`` holds the N-th
    one, ``result/P`` holds the result of the phase, ``informed/P`` counts the ranks that know of its failure, ``ticks``
    counts the ticks, and ``tick/N`` is set with the N-th one. The requests of a rank do not grow with the number of
    ranks.

    Parameters
    ----------
    store
        A client of the job's store, below the prefix of the operation. Its calls may block.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store = store
        self._tick_lock = threading.Lock()
        self._ticks = 0

    def arrive(self, phase: str, result: bytes) -> None:
        """Publish the pickled `RankResult` of this rank."""
        number = self.store.add(f"arrivals/{phase}", 1)
        put(self.store, f"arrived/{phase}/{number}", result)

    def wait(self, phase: str, timeout: float, check_rank0: Callable[[], None]) -> PhaseResult:
        """Block until rank 0 has published the result of the phase.

        Parameters
        ----------
        timeout
            Seconds without a tick after which `check_rank0` is called, if rank 0 has never sent a tick.
        check_rank0
            Raises when the wait is hopeless.
        """
        while True:
            # The count is read first: a tick that comes after this look then still ends the wait below.
            ticks = self.store.add("ticks", 0)
            result = self.result(phase)
            if result is not None:
                return result
            try:
                self.store.wait([f"tick/{ticks + 1}"], timedelta(seconds=timeout))
            except dist.DistStoreError:
                if not self.store.add("ticks", 0) and not self.store.check([f"result/{phase}"]):
                    check_rank0()

    def result(self, phase: str) -> PhaseResult | None:
        """Return the result of the phase, or None if rank 0 has not published it; does not block."""
        if not self.store.check([f"result/{phase}"]):
            return None
        result: PhaseResult = pickle.loads(self.store.get(f"result/{phase}"))  # noqa: S301 -- by rank 0 of this job
        return result

    def count_informed(self, phase: str, add: int) -> int:
        """Add `add` to the number of ranks that know of the failure of the phase, and return that number."""
        return self.store.add(f"informed/{phase}", add)

    def ticks(self) -> int:
        """Return how many ticks rank 0 has sent."""
        return self.store.add("ticks", 0)

    def tick(self) -> None:
        """On rank 0: wake every waiting rank. Safe to call from several threads."""
        with self._tick_lock:
            self._ticks += 1
            # The tick is set first: a rank that reads the old count in between finds its tick there and looks again.
            self.store.set(f"tick/{self._ticks}", "")
            self.store.add("ticks", 1)
            self.store.delete_key(f"tick/{self._ticks - _TICKS_KEPT}")

    def read_arrivals(self, phase: str, seen: int) -> list[RankResult]:
        """On rank 0: return the results that arrived after the first `seen` ones."""
        count = self.store.add(f"arrivals/{phase}", 0)
        if count == seen:
            return []
        keys = [f"arrived/{phase}/{number}" for number in range(seen + 1, count + 1)]
        return [pickle.loads(value) for value in self.store.multi_get(keys)]  # noqa: S301 -- by ranks of this job

    def release(self, phase: str, result: PhaseResult, arrivals: int) -> None:
        """On rank 0: publish the result, wake every waiting rank, and remove the `arrivals` results that were read."""
        put(self.store, f"result/{phase}", pickle.dumps(result))
        self.tick()
        for number in range(1, arrivals + 1):
            self.store.delete_key(f"arrived/{phase}/{number}")
        self.store.delete_key(f"arrivals/{phase}")

    def remove_keys(self, phases: Collection[str], failed: Collection[str]) -> None:
        """Remove what these phases left in the store; the last rank of the operation calls it.

        Parameters
        ----------
        failed
            The phases for which `count_informed` was called.
        """
        ticks = self.ticks()
        for phase in phases:
            self.store.delete_key(f"result/{phase}")
        for phase in failed:
            self.store.delete_key(f"informed/{phase}")
        for number in range(max(1, ticks - _TICKS_KEPT), ticks + 1):
            self.store.delete_key(f"tick/{number}")
        self.store.delete_key("ticks")
