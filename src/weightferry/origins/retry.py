"""The one place that tries again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from weightferry.errors import OriginError, OriginUnreachable, Stalled
from weightferry.origins.base import Silent, TransientOriginError, Unreachable
from weightferry.settings import Settings

logger = logging.getLogger(__name__)

_LONGEST = 60.0  # seconds; an origin's own Retry-After may ask for more, up to _PATIENCE
_PATIENCE = 600.0

T = TypeVar("T")


class Monitor(Protocol):
    """What reading and waiting report to, and where they learn that the operation is over."""

    def count_bytes(self, count: int) -> None:
        """Count bytes that came from the origin."""

    def check(self) -> None:
        """Raise when there is no point in going on."""


class Retry:
    """Attempts in a row that brought nothing, against the limits in the settings.

    Refusals and broken connections are counted. Silence is not: it is measured, from the last byte that came or the
    last refusal, so that a limit in seconds holds whatever the read time-out is.

    Parameters
    ----------
    settings
        `retries`, `retry_wait` and `stall_timeout`.
    watch
        Looked at while waiting, so that a wait ends when the operation does.
    clock
        Seconds, of a clock that never goes back.
    """

    def __init__(self, settings: Settings, monitor: Monitor, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._monitor = monitor
        self._clock = clock
        self._failed = 0
        self._heard = clock()

    def moved(self) -> None:
        """Something came: the count and the silence start again."""
        self._failed = 0
        self._heard = self._clock()

    def wait(self, error: TransientOriginError) -> None:
        """Wait before the next attempt, or give up.

        Raises
        ------
        OriginError
            The limit is reached, or the origin asks for more patience than ten minutes.
        OriginUnreachable
            The same, when there is no way to the origin.
        Stalled
            The origin was silent for `stall_timeout` seconds.
        """
        seconds = self._after_silence(error) if isinstance(error, Silent) else self._after_refusal(error)
        logger.info("%s: %s; next attempt in %.1f s", error.subject, error, seconds)
        self._pause(seconds)
        if not isinstance(error, Silent):
            self._heard = self._clock()

    def _after_silence(self, error: Silent) -> float:
        silence = self._clock() - self._heard
        if silence >= self._settings.stall_timeout:
            raise Stalled(f"{error} (no byte for {silence:.0f} s)", subject=error.subject) from error
        return _jitter(self._settings.retry_wait)  # the time-out was a wait already

    def _after_refusal(self, error: TransientOriginError) -> float:
        self._failed += 1
        asked = error.retry_after or 0.0
        if self._failed > self._settings.retries or asked > _PATIENCE:
            tries = f"{self._failed} attempts in a row" if asked <= _PATIENCE else f"asks to wait {asked:.0f} s"
            kind = OriginUnreachable if isinstance(error, Unreachable) else OriginError
            raise kind(f"{error} ({tries})", subject=error.subject) from error
        wait = _jitter(min(_LONGEST, self._settings.retry_wait * 2 ** (self._failed - 1)))
        return asked + wait if asked else wait

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._monitor.check()
            time.sleep(min(left, 0.2))


def _jitter(seconds: float) -> float:
    """Spread a wait: the nodes of a job must not come back all at once."""
    return seconds * random.uniform(0.5, 1.0)  # noqa: S311


def call_with_retries(
    settings: Settings, monitor: Monitor, call: Callable[[], T], *, other_ranks_can_ask: bool = False
) -> T:
    """Call until it answers, or until `Retry` gives up.

    Parameters
    ----------
    elsewhere
        There are others who could call: having no way to the origin is then told at once.
    """
    retry = Retry(settings, monitor)
    while True:
        try:
            return call()
        except TransientOriginError as error:
            if other_ranks_can_ask and isinstance(error, Unreachable):
                raise OriginUnreachable(str(error), subject=error.subject) from error
            retry.wait(error)
