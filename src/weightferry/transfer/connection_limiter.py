"""Limit the open reads of a leader: fewer when the origin answers that it is too busy, and more again later.

Additive increase, multiplicative decrease, as TCP does: leaders that do not know of each other converge on the load
that the origin can bear.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weightferry.origins.retry import Monitor

_CHECK_EVERY = 0.2  # seconds between two checks whether the operation still runs
_SAME_REFUSAL = 1.0  # seconds: reads that were open together are refused together, which counts once


class ConnectionLimiter:
    """Limits how many reads are open at a time. Safe to use from several threads.

    Parameters
    ----------
    most
        Open reads at a time while the origin refuses none.
    clock
        Returns seconds; never goes back.

    Attributes
    ----------
    allowed : int
        Open reads that are allowed now.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.allowed = self._most = most
        self._clock = clock
        self._open = 0
        self._halved_at = float("-inf")
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"ConnectionLimiter({self._open} open, {self.allowed} of {self._most} allowed)"

    @contextmanager
    def slot(self, monitor: Monitor) -> Iterator[None]:
        """Wait until a read may be opened; it counts as open until the context ends.

        An error that `Monitor.check` raises ends the wait.
        """
        with self._changed:
            while self._open >= self.allowed:
                monitor.check()
                self._changed.wait(_CHECK_EVERY)
            self._open += 1
        try:
            yield
        finally:
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def on_refused(self) -> None:
        """Halve the allowed reads: the origin answered that it is too busy."""
        with self._changed:
            now = self._clock()
            if now - self._halved_at > _SAME_REFUSAL:
                self._halved_at, self.allowed = now, max(1, self.allowed // 2)

    def on_served(self) -> None:
        """Allow one read more: the origin answered a read to its end."""
        with self._changed:
            self.allowed = min(self._most, self.allowed + 1)
            self._changed.notify_all()
