"""Run the phases of an operation on ranks: some ranks work, and every rank learns the result of all of them.

A phase has a name. The ranks that take part run their work and publish a `RankResult`: a value or a failure. Rank 0
collects these results and publishes one `PhaseResult`. Every rank returns its value or raises its failures. A phase
contains no collective: ranks wait on the job's store, for as long as the other ranks send heartbeats.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from weightferry.errors import Failure, from_failures, safe_cause
from weightferry.report.rank_progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
R = TypeVar("R")


class Aborted(Exception):
    """Raised by `Coordinator.check` on a rank whose work is pointless: the operation has failed on another rank."""


class Coordinator(ABC):
    """One operation as one rank sees it.

    Attributes
    ----------
    operation : str
        Name of the operation, for errors: ``collect``, ``stage``, ``load``, ...
    rank, world_size : int
        Among the ranks of the operation.
    job_ranks : sequence of int
        By rank of the operation, the rank in the job. Errors name the rank in the job.
    host : str
        Host name of this rank, for errors.
    node : str
        Name of the node. Two nodes on one host have different names.
    seconds : dict of str to float
        Seconds that this rank has spent in each phase, waiting included.
    """

    def __init__(
        self, rank: int, world_size: int, host: str, node: str = "", job_ranks: Sequence[int] | None = None
    ) -> None:
        self.rank, self.world_size, self.host, self.node = rank, world_size, host, node or host
        self.job_ranks = range(world_size) if job_ranks is None else job_ranks
        self.operation = ""
        self.seconds: dict[str, float] = {}
        self._phase = ""
        self._counters = threading.Lock()
        self._bytes = {False: 0, True: 0}  # key: whether the bytes came from a peer
        self._expected = 0
        self._wait_reasons: list[str] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size}, host={self.host!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()

    def run_phase(
        self,
        phase: str,
        work: Callable[[], T],
        combine: Callable[[Mapping[int, T]], R],
        ranks: Collection[int] | None = None,
        role: str = "",
    ) -> R:
        """Run `work` on `ranks`, then `combine` on rank 0, and return the combined value on every rank.

        Every rank of the operation calls this, also the ranks that have nothing to do.

        Parameters
        ----------
        phase
            Name of the phase, for errors and reports.
        work
            Called on each rank of `ranks`. Its value must pickle.
        combine
            Called once, with the values by rank. Its value must pickle.
        ranks
            The ranks that work. None: all.
        role
            The role of this rank in the phase, for errors.

        Raises
        ------
        CollectError
            The same error on every rank, when `work` failed on any rank, when a rank died, or when `combine` failed.
        """
        began, self._phase = time.monotonic(), phase
        try:
            return self._run_phase(phase, work, combine, range(self.world_size) if ranks is None else ranks, role)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began

    def run_on_rank0(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its value on every rank; see `run_phase`."""
        return self.run_phase(phase, work, lambda values: values[0], ranks=(0,))

    @abstractmethod
    def _run_phase(
        self,
        phase: str,
        work: Callable[[], T],
        combine: Callable[[Mapping[int, T]], R],
        ranks: Collection[int],
        role: str,
    ) -> R: ...

    @abstractmethod
    def check(self) -> None:
        """Raise `Aborted` when the operation has failed on another rank; long work calls this often."""

    def expect_bytes(self, count: int) -> None:
        """Add `count` to the bytes that this rank expects to receive."""
        with self._counters:
            self._expected += count

    def count_bytes(self, count: int, peer: bool = False) -> None:
        """Add `count` to the bytes that came from the origin, or from a peer."""
        with self._counters:
            self._bytes[peer] += count

    @contextlib.contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Declare that no bytes move for a known reason while this context lasts; then it is no stall."""
        with self._counters:
            self._wait_reasons.append(reason)
        try:
            yield
        finally:
            with self._counters:
                self._wait_reasons.remove(reason)

    def progress(self) -> Progress:
        """Return the progress of this rank."""
        with self._counters:
            reason = self._wait_reasons[-1] if self._wait_reasons else ""
            return Progress(self._phase, self._bytes[False], self._bytes[True], self._expected, reason)

    def job_progress(self) -> Mapping[int, Progress]:
        """Return the progress of all ranks that this rank knows of; rank 0 knows all of them."""
        return {self.rank: self.progress()}

    @abstractmethod
    def scoped_store(self, name: str) -> AbstractContextManager[Any]:
        """Open a `torch.distributed` store for some ranks of this operation, with all keys below `name`.

        The keys that this rank sets are removed when the context ends. Calls on the store may block.
        """

    def wait_until_all_informed(self, seconds: float) -> None:
        """Wait until every rank knows of a failure or has finished, at most `seconds`.

        For ranks whose exit makes a launcher end the other ranks.
        """

    def close(self) -> None:
        """End the operation on this rank."""


class LocalCoordinator(Coordinator):
    """Runs an operation of one process.

    Parameters
    ----------
    host, rank
        For errors. The process may be a rank of a job that takes no part in this operation.
    """

    def __init__(self, host: str, rank: int = 0) -> None:
        super().__init__(0, 1, host, job_ranks=(rank,))

    def _run_phase(
        self,
        phase: str,
        work: Callable[[], T],
        combine: Callable[[Mapping[int, T]], R],
        ranks: Collection[int],
        role: str,
    ) -> R:
        try:
            return combine({0: work()})
        except Exception as error:  # noqa: BLE001 -- raised again, with rank, host and phase
            rank = self.job_ranks[0]
            failure = Failure.of(error, rank=rank, host=self.host, phase=phase, role=role)
            raise from_failures({rank: failure}, self.operation) from safe_cause(error)

    def check(self) -> None:
        """Do nothing: no other rank can fail."""

    def scoped_store(self, name: str) -> AbstractContextManager[Any]:
        """Raise `NotImplementedError`: a single process has no peers."""
        raise NotImplementedError(f"a single process has no peers to share a store with ({name})")
