"""How many reads a leader has open at a time: fewer when the origin says that it is too busy, and more again later.

Additive increase, multiplicative decrease, as TCP shares a link: leaders that know nothing of each other come to what
the origin bears together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weightferry.origins.retry import Monitor

_LOOK_EVERY = 0.2  # seconds between two looks whether the operation still goes on
_ONE_WAVE = 1.0  # seconds: reads that were open together are refused together, and that says it once


class ConnectionLimiter:
    """Each open read is in one. Safe to use from several threads.

    Parameters
    ----------
    most
        Reads open at a time while nobody is refused.
    clock
        Seconds, of a clock that never goes back.

    Attributes
    ----------
    allowed : int
        Reads open at a time now.
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
    def one(self, monitor: Monitor) -> Iterator[None]:
        """Wait until a read may be opened; it is over when this context is left.

        What `Monitor.check` raises ends the wait.
        """
        with self._changed:
            while self._open >= self.allowed:
                monitor.check()
                self._changed.wait(_LOOK_EVERY)
            self._open += 1
        try:
            yield
        finally:
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def refused(self) -> None:
        """Half as many from now on: the origin was too busy for one."""
        with self._changed:
            now = self._clock()
            if now - self._halved_at > _ONE_WAVE:
                self._halved_at, self.allowed = now, max(1, self.allowed // 2)

    def served(self) -> None:
        """One more from now on: a read was answered to its end."""
        with self._changed:
            self.allowed = min(self._most, self.allowed + 1)
            self._changed.notify_all()
