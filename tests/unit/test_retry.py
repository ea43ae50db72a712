"""The one place that tries again: what counts, what is only measured, and how long it waits."""

from __future__ import annotations

import pickle
import time

import pytest

from tests.unit.doubles import FakeMonitor, Over
from weightferry.errors import OriginError, Stalled
from weightferry.origins.base import Silent, TransientOriginError, Unreachable
from weightferry.origins.retry import Retry, call_with_retries
from weightferry.settings import Settings

REFUSED = TransientOriginError("HTTP 503", subject="x")
SILENT = Silent("ReadTimeout", subject="x")


class Clock:
    """Seconds that pass when a test says so."""

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


def test_refusals_are_counted(retry: Retry, settings: Settings) -> None:
    for _ in range(settings.retries):
        retry.wait(REFUSED)
    with pytest.raises(OriginError, match=r"HTTP 503 \(4 attempts in a row\)") as raised:
        retry.wait(REFUSED)
    assert raised.value.subject == "x"
    assert not isinstance(raised.value, TransientOriginError)


def test_a_byte_starts_the_count_again(retry: Retry, settings: Settings) -> None:
    for _ in range(3):
        for _ in range(settings.retries):
            retry.wait(REFUSED)
        retry.reset()


def test_silence_is_measured_and_not_counted(retry: Retry, clock: Clock) -> None:
    for _ in range(10):
        clock.now += 29
        retry.wait(SILENT)
    clock.now += 10
    with pytest.raises(Stalled, match=r"ReadTimeout \(no byte for 300 s\)") as raised:
        retry.wait(SILENT)
    assert raised.value.subject == "x"


def test_a_byte_ends_a_silence(retry: Retry, clock: Clock) -> None:
    for _ in range(5):
        clock.now += 200
        retry.wait(SILENT)
        retry.reset()


def test_a_refusal_ends_a_silence_and_is_counted(retry: Retry, settings: Settings, clock: Clock) -> None:
    for _ in range(settings.retries):
        clock.now += 299
        retry.wait(SILENT)
        retry.wait(REFUSED)
    with pytest.raises(OriginError, match="in a row"):
        retry.wait(REFUSED)


def test_what_the_origin_asks_for_is_kept(monitor: FakeMonitor, settings: Settings) -> None:
    began = time.monotonic()
    Retry(settings, monitor).wait(TransientOriginError("429", retry_after=0.25))
    assert time.monotonic() - began >= 0.25
    assert monitor.checks > 1, "a wait ends when the operation does"


def test_more_than_ten_minutes_are_too_many(retry: Retry) -> None:
    with pytest.raises(OriginError, match="asks to wait 601 s"):
        retry.wait(TransientOriginError("429", retry_after=601))


def test_the_end_of_the_operation_ends_the_wait(retry: Retry, monitor: FakeMonitor) -> None:
    monitor.over = True
    with pytest.raises(Over):
        retry.wait(TransientOriginError("429", retry_after=500))


def test_retrying(settings: Settings, monitor: FakeMonitor) -> None:
    answers = [REFUSED, SILENT, Unreachable("refused")]

    def call() -> str:
        if answers:
            raise answers.pop()
        return "here"

    assert call_with_retries(settings, monitor, call) == "here"


@pytest.mark.parametrize("kind", [TransientOriginError, Unreachable, Silent])
def test_transient_errors_travel(kind: type[TransientOriginError]) -> None:
    error = pickle.loads(pickle.dumps(kind("no", subject="x", retry_after=3)))
    assert (type(error), str(error), error.subject, error.retry_after) == (kind, "no", "x", 3)
