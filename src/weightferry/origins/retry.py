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


class Watch(Protocol):
    """What reading and waiting report to, and where they learn that the operation is over."""

    def moved(self, count: int) -> None:
        """Note that `count` bytes came from the origin."""

    def check(self) -> None:
        """Raise when there is no point in going on."""


class Retry:
    """Attempts in a row that brought nothing, against the limits in the settings.

    An origin that answers with errors is given up after `retries`; one that says nothing at all after `stall_timeout`,
    however many connections that takes.

    Parameters
    ----------
    settings
        `retries`, `retry_wait` and `stall_timeout`.
    watch
        Looked at while waiting, so that a wait ends when the operation does.
    """

    def __init__(self, settings: Settings, watch: Watch) -> None:
        self._settings = settings
        self._watch = watch
        self._failed = 0
        self._moved = time.monotonic()

    def moved(self) -> None:
        """Something came: the count starts again."""
        self._failed = 0
        self._moved = time.monotonic()

    def wait(self, error: TransientOriginError) -> None:
        """Wait before the next attempt, or give up.

        Raises
        ------
        OriginError
            The limit is reached, or the origin asks for more patience than ten minutes.
        Stalled
            Nothing came for `stall_timeout`.
        """
        if isinstance(error, Silent):
            still = time.monotonic() - self._moved
            if still >= self._settings.stall_timeout:
                raise Stalled(f"nothing came for {still:.0f} s: {error}", subject=error.subject) from error
            logger.info("%s: %s; trying again", error.subject, error)
            return
        self._failed += 1
        asked = error.retry_after or 0.0
        if self._failed > self._settings.retries or asked > _PATIENCE:
            tries = f"{self._failed} attempts in a row" if asked <= _PATIENCE else f"asks to wait {asked:.0f} s"
            kind = OriginUnreachable if isinstance(error, Unreachable) else OriginError
            raise kind(f"{error} ({tries})", subject=error.subject) from error
        # Full jitter: the nodes of a job must not come back all at once.
        wait = min(_LONGEST, self._settings.retry_wait * 2 ** (self._failed - 1)) * random.uniform(0.5, 1.0)  # noqa: S311
        logger.info("%s: %s; next attempt in %.1f s", error.subject, error, max(wait, asked))
        self._pause(max(wait, asked))

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._watch.check()
            time.sleep(min(left, 0.2))


def retrying(settings: Settings, watch: Watch, call: Callable[[], T]) -> T:
    """Call until it answers, or until `Retry` gives up."""
    retry = Retry(settings, watch)
    while True:
        try:
            return call()
        except TransientOriginError as error:
            retry.wait(error)
