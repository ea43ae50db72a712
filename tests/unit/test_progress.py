"""The progress line of the job."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest

from weightferry.report import progress
from weightferry.report.progress import JobProgress, progress_line, show_progress
from weightferry.report.rank_progress import Progress

MB = 1_000_000
ONE = Progress("transfer", 100 * MB, 0, 400 * MB)


def test_one_node() -> None:
    before, now = JobProgress(0.0, {0: replace(ONE, origin_bytes=0)}), JobProgress(10.0, {0: ONE})
    assert progress_line(before, now, {0: "h0"}) == "100 MB of 400 MB, 10 MB/s from the origin, 30 s left"


def test_several_nodes() -> None:
    before = JobProgress(0.0, {0: Progress("transfer", 0, 0, 400 * MB), 4: Progress("transfer", 0, 0, 400 * MB)})
    now = JobProgress(2.0, {0: Progress("transfer", 50 * MB, 50 * MB, 400 * MB), 4: ONE})
    text = progress_line(
        before, JobProgress(2.0, {**now.ranks, 8: Progress("transfer", 0, 40 * MB, 400 * MB)}), {8: "w8"}
    )
    assert text == ("240 MB of 1.2 GB, 75 MB/s from the origin, 45 MB/s between nodes, slowest w8 at 10 %, 8 s left")


def test_the_start_and_the_end() -> None:
    assert progress_line(JobProgress(0, {}), JobProgress(1, {}), {}) == "0 B of 0 B, 0 B/s from the origin"
    done = JobProgress(1, {0: replace(ONE, origin_bytes=400 * MB)})
    assert "left" not in progress_line(JobProgress(0, {}), done, {})


def test_the_reason_of_a_wait() -> None:
    now = JobProgress(1, {0: Progress("survey", wait_reason="waits for another job")})
    assert progress_line(JobProgress(0, {}), now, {}).endswith(", waits for another job")


def test_bytes_received_twice_do_not_exceed_the_total() -> None:
    assert JobProgress(0, {0: replace(ONE, origin_bytes=500 * MB)}).done == 400 * MB


def test_log_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_INTERVAL", 0.01)
    calls = threading.Semaphore(0)

    def read_progress() -> dict[int, Progress]:
        calls.release()
        return {0: ONE}

    with caplog.at_level(logging.INFO), show_progress(read_progress, {0: "h0"}):
        for _ in range(3):
            assert calls.acquire(timeout=30)
    assert "100 MB of 400 MB" in caplog.text


def test_no_thread_without_a_listener() -> None:
    def not_called() -> dict[int, Progress]:
        raise AssertionError

    with show_progress(not_called, {}):
        assert "weightferry-progress" not in {thread.name for thread in threading.enumerate()}
