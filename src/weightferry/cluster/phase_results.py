"""The results that ranks exchange at the end of a phase."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import CollectError, Failure, from_failures, safe_cause


@dataclass(frozen=True)
class RankResult:
    """What one rank publishes at the end of its work in a phase: a failure, or else a value."""

    rank: int
    host: str
    value: Any = None
    failure: Failure | None = None

    @classmethod
    def of(
        cls, coordinator: Coordinator, phase: str, role: str, work: Callable[[], Any]
    ) -> tuple[bytes, BaseException | None]:
        """Run `work`; return the pickled result to publish, and the exception that `work` raised, if any."""
        error: BaseException
        try:
            return pickle.dumps(cls(coordinator.rank, coordinator.host, work())), None
        except BaseException as caught:  # noqa: BLE001 -- the other ranks must learn of any end of this rank's work
            error = caught
        rank = coordinator.job_ranks[coordinator.rank]
        failure = Failure.of(error, rank=rank, host=coordinator.host, phase=phase, role=role)
        return pickle.dumps(cls(coordinator.rank, coordinator.host, failure=failure)), error


@dataclass(frozen=True)
class PhaseResult:
    """What rank 0 publishes of a phase: the failures in the order of their arrival, or else the combined value."""

    value: Any = None
    failures: tuple[Failure, ...] = ()

    def value_or_raise(self, coordinator: Coordinator, cause: BaseException | None) -> Any:
        """Return the value, or raise the failures; `cause` is the exception of this rank, if any."""
        error = self.error(coordinator)
        if error is not None:
            raise error from safe_cause(cause)
        return self.value

    def error(self, coordinator: Coordinator) -> CollectError | None:
        """Return the error that every rank raises, or None if the phase succeeded."""
        if not self.failures:
            return None
        failures = {failure.rank: failure for failure in self.failures}
        return from_failures(failures, coordinator.operation, brief=coordinator.rank > 0)
