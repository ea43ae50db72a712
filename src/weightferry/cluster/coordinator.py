"""The one idiom of an operation: some ranks work, and every rank learns the outcome of all of them.

A round has a name (its phase). The ranks that take part run their work and publish value or failure; rank 0 gathers
what they publish and gives one verdict; every rank returns the verdict's value or raises its failures. There is no
collective in it: ranks wait on the job's store, and for as long as the others give signs of life.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from weightferry.errors import CollectError, Failure, cause_to_show, from_failures
from weightferry.report.rank_progress import Progress

T = TypeVar("T")
R = TypeVar("R")


class Aborted(Exception):
    """Raised by `Coordinator.check` on a rank whose work is pointless: the operation has failed elsewhere."""


class Coordinator(ABC):
    """One operation as one rank sees it.

    Attributes
    ----------
    operation : str
        What it does, for errors: ``collect``, ``stage``, ``load``, ...
    rank, world_size : int
        Among the ranks of the operation.
    names : sequence of int
        By rank of the operation, the rank in the job: errors name that one.
    host : str
        For error texts.
    node : str
        Names the node; two on one host have different ones.
    seconds : dict of str to float
        Time that this rank spent in each phase so far, waiting included.
    """

    def __init__(
        self, rank: int, world_size: int, host: str, node: str = "", names: Sequence[int] | None = None
    ) -> None:
        self.rank, self.world_size, self.host, self.node = rank, world_size, host, node or host
        self.names = range(world_size) if names is None else names
        self.operation = ""
        self.seconds: dict[str, float] = {}
        self._phase = ""
        self._counting = threading.Lock()
        self._bytes = {False: 0, True: 0}  # by whether they came from a peer
        self._expected = 0
        self._pauses: list[str] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, world_size={self.world_size}, host={self.host!r})"

    def round(
        self,
        phase: str,
        work: Callable[[], T],
        combine: Callable[[Mapping[int, T]], R],
        ranks: Collection[int] | None = None,
        role: str = "",
    ) -> R:
        """Run `work` on `ranks`, `combine` on rank 0, and return the combined value on every rank.

        Every rank of the operation calls this, also those that have nothing to do.

        Parameters
        ----------
        phase
            For errors and reports.
        work
            Called on each of `ranks`; its value must pickle.
        combine
            Called once with the values by rank; what it returns must pickle.
        ranks
            Who works; None: all.
        role
            What this rank is in the round, for errors.

        Raises
        ------
        CollectError
            The same on every rank, when `work` failed anywhere, when a rank died, or when `combine` failed.
        """
        began, self._phase = time.monotonic(), phase
        try:
            return self._round(phase, work, combine, range(self.world_size) if ranks is None else ranks, role)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began

    def once(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its value on every rank; otherwise as `round`."""
        return self.round(phase, work, lambda values: values[0], ranks=(0,))

    @abstractmethod
    def _round(
        self,
        phase: str,
        work: Callable[[], T],
        combine: Callable[[Mapping[int, T]], R],
        ranks: Collection[int],
        role: str,
    ) -> R: ...

    @abstractmethod
    def check(self) -> None:
        """Raise `Aborted` when the operation has failed elsewhere; called often by long work."""

    def expect(self, count: int) -> None:
        """Say that so many bytes are to come to this rank, beside what it said before."""
        with self._counting:
            self._expected += count

    def moved(self, count: int, peer: bool = False) -> None:
        """Note that `count` bytes came, from the origin or from a peer."""
        with self._counting:
            self._bytes[peer] += count

    @contextlib.contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """While in this context, on any thread, bytes stand still for a reason and that is no stall."""
        with self._counting:
            self._pauses.append(reason)
        try:
            yield
        finally:
            with self._counting:
                self._pauses.remove(reason)

    def progress(self) -> Progress:
        """How far this rank is."""
        with self._counting:
            paused = self._pauses[-1] if self._pauses else ""
            return Progress(self._phase, self._bytes[False], self._bytes[True], self._expected, paused)

    def seen(self) -> Mapping[int, Progress]:
        """How far all ranks are, as far as this rank knows: rank 0 does."""
        return {self.rank: self.progress()}

    @abstractmethod
    def meeting(self, name: str) -> AbstractContextManager[Any]:
        """Hold a store for some ranks of this operation to meet on, below `name`; what they leave in it is removed.

        A `torch.distributed` store; calls on it may block.
        """

    def all_told(self, seconds: float) -> None:
        """Wait until every rank knows of a failure, or is done, at most `seconds`.

        For ranks whose end makes a launcher end the others.
        """

    def close(self) -> None:
        """End the operation on this rank."""


class LocalCoordinator(Coordinator):
    """An operation of one process.

    Parameters
    ----------
    host, rank
        For error texts: the process may well be a rank of a job that this operation has nothing to do with.
    """

    def __init__(self, host: str, rank: int = 0) -> None:
        super().__init__(0, 1, host, names=(rank,))

    def _round(
        self,
        phase: str,
        work: Callable[[], T],
        combine: Callable[[Mapping[int, T]], R],
        ranks: Collection[int],
        role: str,
    ) -> R:
        try:
            return combine({0: work()})
        except Exception as error:  # noqa: BLE001 -- raised again, with a name
            rank = self.names[0]
            failure = Failure.of(error, rank=rank, host=self.host, phase=phase, role=role)
            raise from_failures({rank: failure}, self.operation) from cause_to_show(error)

    def check(self) -> None:
        """Nobody else can fail."""

    def meeting(self, name: str) -> AbstractContextManager[Any]:
        """Nobody is there to be met."""
        raise NotImplementedError(f"{self!r} has nobody to meet for {name}")


@dataclass(frozen=True)
class RankResult:
    """What one rank publishes of its part in a round: a failure, or else a value."""

    rank: int
    host: str
    value: Any = None
    failure: Failure | None = None

    @classmethod
    def of(
        cls, coordinator: Coordinator, phase: str, role: str, work: Callable[[], Any]
    ) -> tuple[bytes, BaseException | None]:
        """Run `work`; return what to publish, and the exception for those who want to chain it."""
        error: BaseException
        try:
            return pickle.dumps(cls(coordinator.rank, coordinator.host, work())), None
        except BaseException as caught:  # noqa: BLE001 -- whatever ends this rank's work, the others must learn of it
            error = caught
        name = coordinator.names[coordinator.rank]
        failure = Failure.of(error, rank=name, host=coordinator.host, phase=phase, role=role)
        return pickle.dumps(cls(coordinator.rank, coordinator.host, failure=failure)), error


@dataclass(frozen=True)
class PhaseResult:
    """What rank 0 publishes of a round: failures, the first one first, or else the combined value."""

    value: Any = None
    failures: tuple[Failure, ...] = ()

    def get(self, coordinator: Coordinator, cause: BaseException | None) -> Any:
        """Return the value, or raise the failures; `cause` is this rank's own exception, if any."""
        error = self.error(coordinator)
        if error is not None:
            raise error from cause_to_show(cause)
        return self.value

    def error(self, coordinator: Coordinator) -> CollectError | None:
        """Make the error that every rank raises, if there is one."""
        if not self.failures:
            return None
        failures = {failure.rank: failure for failure in self.failures}
        return from_failures(failures, coordinator.operation, brief=coordinator.rank > 0)
