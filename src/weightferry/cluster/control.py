"""The one idiom of an operation: some ranks work, and every rank learns the outcome of all of them.

A round has a name (its phase). The ranks that take part run their work and publish value or failure; rank 0 gathers
what they publish and gives one verdict; every rank returns the verdict's value or raises its failures. There is no
collective in it: ranks wait on the job's store, and for as long as the others give signs of life.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from weightferry.errors import CollectError, Failure, cause_to_show, from_failures

T = TypeVar("T")
R = TypeVar("R")


class Aborted(Exception):
    """Raised by `Control.check` on a rank whose work is pointless: the operation has failed elsewhere."""


class Control(ABC):
    """One operation as one rank sees it.

    Attributes
    ----------
    rank, world_size : int
        Among the ranks of the operation.
    host : str
        For error texts.
    node : str
        Names the node; two on one host have different ones.
    seconds : dict of str to float
        Time that this rank spent in each phase so far, waiting included.
    """

    def __init__(self, rank: int, world_size: int, host: str, node: str = "") -> None:
        self.rank, self.world_size, self.host, self.node = rank, world_size, host, node or host
        self.seconds: dict[str, float] = {}

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
        began = time.monotonic()
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
        """Say that so many bytes are to come to this rank in this operation."""

    def moved(self, count: int, peer: bool = False) -> None:
        """Note that `count` bytes came, from the origin or from a peer."""

    @contextlib.contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """While in this context, bytes stand still for a reason."""
        yield

    def store(self, name: str) -> Any:
        """Return the store of this operation below `name`."""
        raise NotImplementedError

    def all_told(self, seconds: float) -> None:
        """Wait until every rank knows of a failure, or is done, at most `seconds`.

        For ranks whose end makes a launcher end the others.
        """

    def close(self) -> None:
        """End the operation on this rank."""


class Solo(Control):
    """An operation of one process.

    Parameters
    ----------
    host, rank
        For error texts: the process may well be a rank of a job that this operation has nothing to do with.
    """

    def __init__(self, host: str, rank: int = 0) -> None:
        super().__init__(0, 1, host)
        self._rank_in_job = rank

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
            rank = self._rank_in_job
            failure = Failure.of(error, rank=rank, host=self.host, phase=phase, role=role)
            raise from_failures({rank: failure}) from cause_to_show(error)

    def check(self) -> None:
        """Nobody else can fail."""


@dataclass(frozen=True)
class Outcome:
    """What one rank publishes of its part in a round: a failure, or else a value."""

    rank: int
    host: str
    value: Any = None
    failure: Failure | None = None

    @classmethod
    def of(
        cls, rank: int, host: str, phase: str, role: str, work: Callable[[], Any]
    ) -> tuple[bytes, BaseException | None]:
        """Run `work`; return what to publish, and the exception for those who want to chain it."""
        error: BaseException
        try:
            return pickle.dumps(cls(rank, host, work())), None
        except BaseException as caught:  # noqa: BLE001 -- whatever ends this rank's work, the others must learn of it
            error = caught
        failure = Failure.of(error, rank=rank, host=host, phase=phase, role=role)
        return pickle.dumps(cls(rank, host, failure=failure)), error


@dataclass(frozen=True)
class Verdict:
    """What rank 0 publishes of a round: failures by rank, or else the combined value."""

    value: Any = None
    failures: Mapping[int, Failure] | None = None

    def get(self, cause: BaseException | None) -> Any:
        """Return the value, or raise the failures; `cause` is this rank's own exception, if any."""
        error = self.error()
        if error is not None:
            raise error from cause_to_show(cause)
        return self.value

    def error(self) -> CollectError | None:
        """Make the error that every rank raises, if there is one."""
        return from_failures(dict(self.failures)) if self.failures else None
