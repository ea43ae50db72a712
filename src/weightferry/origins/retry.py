"""Retries: the only module that repeats a failed request."""

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

_MAX_WAIT = 60.0  # seconds between two attempts; Retry-After of an origin may ask for more
_MAX_RETRY_AFTER = 600.0  # seconds

T = TypeVar("T")


class Monitor(Protocol):
    """Counts the bytes that are read, and tells a waiting thread that the operation has failed."""

    def count_bytes(self, count: int) -> None:
        """Count bytes that were received from the origin."""

    def check(self) -> None:
        """Raise if the operation has failed, so that further work is useless."""


class Retry:
    """Counts failed attempts in a row, and applies the limits of the settings.

    Errors and broken connections are counted. Timeouts without a byte are not counted, but measured in seconds: from
    the last byte or the last error. So `stall_timeout` holds for any `read_timeout`.

    Parameters
    ----------
    settings
        Uses `retries`, `retry_wait` and `stall_timeout`.
    monitor
        Checked during a wait, so that the wait ends when the operation has failed.
    clock
        Returns seconds of a monotonic clock.
    """

    def __init__(self, settings: Settings, monitor: Monitor, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._monitor = monitor
        self._clock = clock
        self._failures = 0
        self._last_progress = clock()

    def reset(self) -> None:
        """Start the count and the time again, since bytes arrived."""
        self._failures = 0
        self._last_progress = self._clock()

    def wait(self, error: TransientOriginError) -> None:
        """Wait before the next attempt, or raise if a limit is reached.

        Raises
        ------
        OriginError
            More than `retries` attempts in a row have failed, or the origin asks to wait more than ten minutes.
        OriginUnreachable
            As before, but no connection to the origin is possible.
        Stalled
            The origin sent no byte for `stall_timeout` seconds.
        """
        seconds = self._wait_after_silence(error) if isinstance(error, Silent) else self._wait_after_error(error)
        logger.info("%s: %s; retrying in %.1f s", error.subject, error, seconds)
        self._pause(seconds)
        if not isinstance(error, Silent):
            self._last_progress = self._clock()

    def _wait_after_silence(self, error: Silent) -> float:
        silence = self._clock() - self._last_progress
        if silence >= self._settings.stall_timeout:
            raise Stalled(
                f"{error} (no byte for {silence:.0f} s). Check the network, or raise `stall_timeout`",
                subject=error.subject,
            ) from error
        return _jitter(self._settings.retry_wait)  # the timeout itself was a wait

    def _wait_after_error(self, error: TransientOriginError) -> float:
        self._failures += 1
        retry_after = error.retry_after or 0.0
        if self._failures > self._settings.retries or retry_after > _MAX_RETRY_AFTER:
            reason = (
                f"{self._failures} attempts in a row"
                if retry_after <= _MAX_RETRY_AFTER
                else f"asks to wait {retry_after:.0f} s"
            )
            if isinstance(error, Unreachable):
                text = f"{error} ({reason}). Check the address, the network and the proxy of this host"
                raise OriginUnreachable(text, subject=error.subject) from error
            raise OriginError(f"{error} ({reason}). Start again later", subject=error.subject) from error
        wait = _jitter(min(_MAX_WAIT, self._settings.retry_wait * 2 ** (self._failures - 1)))
        return retry_after + wait if retry_after else wait

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._monitor.check()
            time.sleep(min(left, 0.2))


def _jitter(seconds: float) -> float:
    """Return a random part of a wait, so that the nodes of a job do not retry at the same moment."""
    return seconds * random.uniform(0.5, 1.0)  # noqa: S311


def call_with_retries(
    settings: Settings, monitor: Monitor, call: Callable[[], T], *, other_ranks_can_ask: bool = False
) -> T:
    """Return the result of `call`, and retry it after a `TransientOriginError` within the limits of `Retry`.

    Parameters
    ----------
    other_ranks_can_ask
        Whether other ranks can make the call instead. Then this function raises `OriginUnreachable` without a retry.
    """
    retry = Retry(settings, monitor)
    while True:
        try:
            return call()
        except TransientOriginError as error:
            if other_ranks_can_ask and isinstance(error, Unreachable):
                raise OriginUnreachable(str(error), subject=error.subject) from error
            retry.wait(error)
