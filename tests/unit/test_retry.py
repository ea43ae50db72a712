"""Retries: errors are counted, time without bytes is measured, and the length of the waits."""

from __future__ import annotations

import pickle
import time

import pytest

from tests.unit.doubles import FakeMonitor, Over
from weightferry.errors import OriginError, Stalled
from weightferry.origins.base import Silent, TransientOriginError, Unreachable
from weightferry.origins.retry import Retry, call_with_retries
from weightferry.settings import Settings

ERROR = TransientOriginError("HTTP 503", subject="x")
SILENT = Silent("ReadTimeout", subject="x")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def retry(settings: Settings, monitor: FakeMonitor, clock: Clock) -> Retry:
    return Retry(settings, monitor, clock)


def test_errors_are_counted(retry: Retry, settings: Settings) -> None:
    for _ in range(settings.retries):
        retry.wait(ERROR)
    with pytest.raises(OriginError, match=r"HTTP 503 \(4 attempts in a row\)") as raised:
        retry.wait(ERROR)
    assert raised.value.subject == "x"
    assert not isinstance(raised.value, TransientOriginError)


def test_a_byte_resets_the_count(retry: Retry, settings: Settings) -> None:
    for _ in range(3):
        for _ in range(settings.retries):
            retry.wait(ERROR)
        retry.reset()


def test_read_timeouts_are_measured_and_not_counted(retry: Retry, clock: Clock) -> None:
    for _ in range(10):
        clock.now += 29
        retry.wait(SILENT)
    clock.now += 10
    with pytest.raises(Stalled, match=r"ReadTimeout \(no byte for 300 s\)") as raised:
        retry.wait(SILENT)
    assert raised.value.subject == "x"


def test_a_byte_resets_the_time(retry: Retry, clock: Clock) -> None:
    for _ in range(5):
        clock.now += 200
        retry.wait(SILENT)
        retry.reset()


def test_an_error_resets_the_time_and_is_counted(retry: Retry, settings: Settings, clock: Clock) -> None:
    for _ in range(settings.retries):
        clock.now += 299
        retry.wait(SILENT)
        retry.wait(ERROR)
    with pytest.raises(OriginError, match="in a row"):
        retry.wait(ERROR)


def test_retry_after_is_respected(monitor: FakeMonitor, settings: Settings) -> None:
    start = time.monotonic()
    Retry(settings, monitor).wait(TransientOriginError("429", retry_after=0.25))
    assert time.monotonic() - start >= 0.25
    assert monitor.checks > 1, "the wait checks whether the operation has failed"


def test_a_retry_after_of_more_than_ten_minutes(retry: Retry) -> None:
    with pytest.raises(OriginError, match="asks to wait 601 s"):
        retry.wait(TransientOriginError("429", retry_after=601))


def test_a_failed_operation_ends_the_wait(retry: Retry, monitor: FakeMonitor) -> None:
    monitor.over = True
    with pytest.raises(Over):
        retry.wait(TransientOriginError("429", retry_after=500))


def test_call_with_retries(settings: Settings, monitor: FakeMonitor) -> None:
    answers = [ERROR, SILENT, Unreachable("refused")]

    def call() -> str:
        if answers:
            raise answers.pop()
        return "here"

    assert call_with_retries(settings, monitor, call) == "here"


@pytest.mark.parametrize("kind", [TransientOriginError, Unreachable, Silent])
def test_transient_errors_pickle(kind: type[TransientOriginError]) -> None:
    error = pickle.loads(pickle.dumps(kind("no", subject="x", retry_after=3)))
    assert (type(error), str(error), error.subject, error.retry_after) == (kind, "no", "x", 3)
