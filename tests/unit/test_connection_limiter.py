"""How many reads are open at a time, and what changes it."""

from __future__ import annotations

import threading

import pytest

from tests.unit.doubles import FakeMonitor, Over, pin
from weightferry.origins.base import Busy
from weightferry.settings import Settings
from weightferry.testing.origin import FakeOrigin, Fault
from weightferry.transfer.connection_limiter import ConnectionLimiter
from weightferry.transfer.range_reader import RangeReader


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_refusal_halves_and_answers_bring_back_one_by_one(clock: Clock) -> None:
    limiter, seen = ConnectionLimiter(8, clock), []
    for seconds, change in (
        (0, limiter.on_refused),
        (5, limiter.on_refused),
        (6, limiter.on_served),
        (6, limiter.on_served),
    ):
        clock.now = seconds
        change()
        seen.append(limiter.allowed)
    assert seen == [4, 2, 3, 4]


def test_reads_that_are_refused_together_halve_once(clock: Clock) -> None:
    limiter = ConnectionLimiter(8, clock)
    for _ in range(8):
        limiter.on_refused()
    assert limiter.allowed == 4


def test_there_is_always_one_and_never_more_than_the_setting(clock: Clock) -> None:
    limiter = ConnectionLimiter(2, clock)
    for seconds in (0, 10, 20):
        clock.now = seconds
        limiter.on_refused()
    assert limiter.allowed == 1
    for _ in range(9):
        limiter.on_served()
    assert limiter.allowed == 2


def test_who_finds_none_free_waits_for_one(monitor: FakeMonitor) -> None:
    limiter, open_at_once, most = ConnectionLimiter(2), [0], [0]
    lock = threading.Lock()

    def read() -> None:
        for _ in range(50):
            with limiter.slot(monitor):
                with lock:
                    open_at_once[0] += 1
                    most[0] = max(most[0], open_at_once[0])
                with lock:
                    open_at_once[0] -= 1

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] <= 2


def test_the_wait_ends_with_the_operation(monitor: FakeMonitor) -> None:
    limiter = ConnectionLimiter(1)
    with limiter.slot(monitor):
        monitor.over = True
        with pytest.raises(Over), limiter.slot(monitor):
            pass


def test_a_busy_origin_is_read_from_less_and_its_answers_count(settings: Settings, monitor: FakeMonitor) -> None:
    origin = FakeOrigin({"m.bin": b"x" * 1000})
    limiter = ConnectionLimiter(4)
    pinned = pin(origin)
    origin.faults += (Fault(error=Busy("HTTP 429")),)
    allowed = []
    reader = RangeReader(origin, settings, monitor, limiter)
    for _ in range(3):
        reader.read_whole(pinned, pinned.files[0])
        allowed.append(limiter.allowed)
    assert allowed == [3, 4, 4]
