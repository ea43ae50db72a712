"""Locks of file content: they save bandwidth and never block a job."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.utils import WeakFileLock

from tests.unit.doubles import FakeMonitor, Over
from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_holder import LockHolder
from weightferry.cache.lock_support import LockSupport, detect_lock_support
from weightferry.cache.locks import FileLocks, LockTimeouts

HOLD = """
import sys
from pathlib import Path
from weightferry.cache.locks import FileLocks, LockTimeouts
locks, path = FileLocks(LockTimeouts(10), lambda: None), Path(sys.argv[1])
locks.acquire({path})
print(locks.is_held(path), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def content_lock(path: Path, timeout: float, check: Callable[[], None]) -> Iterator[bool]:
    locks = FileLocks(LockTimeouts(timeout), check)
    try:
        locks.acquire({path})
        yield locks.is_held(path)
    finally:
        locks.release()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".locks" / "models--org--model" / "key.lock"


def failing(number: int) -> Callable[..., None]:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "as on some file systems")

    return fails


def test_a_lock_is_acquired_and_released(path: Path, monitor: FakeMonitor) -> None:
    for _ in range(2):
        with content_lock(path, 1, monitor.check) as held:
            assert held
    assert path.exists(), "a removed lock file would let two processes hold the lock"


def test_threads_exclude_each_other(path: Path, monitor: FakeMonitor) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with content_lock(path, 30, monitor.check) as held:
                assert held
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_another_process_excludes(path: Path, monitor: FakeMonitor, caplog: pytest.LogCaptureFixture) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLURM_JOB_ID": "815"},
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with caplog.at_level(logging.WARNING), content_lock(path, 0.1, monitor.check) as held:
            assert not held
        assert "continuing without the lock" in caplog.text
        assert f"process {holder.pid} on {socket.gethostname()} (job 815) still holds it" in caplog.text
        holder.kill()  # the kernel releases the lock of a killed process
        holder.wait()
        with content_lock(path, 10, monitor.check) as held:
            assert held


def test_the_lock_is_that_of_huggingface_hub(path: Path, monitor: FakeMonitor) -> None:
    path.parent.mkdir(parents=True)
    with WeakFileLock(path), content_lock(path, 0.1, monitor.check) as held:
        assert not held


def test_a_cancelled_operation_ends_the_wait(path: Path, monitor: FakeMonitor) -> None:
    monitor.over = True
    began = time.monotonic()
    with content_lock(path, 60, lambda: None), pytest.raises(Over), content_lock(path, 60, monitor.check):
        pass
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EIO], ids=errno.errorcode.get)
def test_file_systems_without_locks(
    path: Path, monitor: FakeMonitor, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        with content_lock(path, 1, monitor.check) as held:
            assert not held
    assert caplog.text.count("continuing without the lock") == 2
    monkeypatch.undo()
    # A soft lock instead would be a file that a killed job leaves, and every later job would wait for it.
    with content_lock(path, 1, monitor.check) as held:
        assert held


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_cache_of_another_user(
    path: Path, monitor: FakeMonitor, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(number))
    with content_lock(path, 1, monitor.check) as held:
        assert not held
    assert "continuing without the lock" in caplog.text


def test_try_acquire_does_not_wait(tmp_path: Path, monitor: FakeMonitor) -> None:
    first, second = FileLocks(LockTimeouts(60), monitor.check), FileLocks(LockTimeouts(60), monitor.check)
    a, b = tmp_path / "a.lock", tmp_path / "b.lock"
    assert first.try_acquire({a}) == set()
    assert second.try_acquire({a, b}) == {a}
    assert (second.is_held(a), second.is_held(b)) == (False, True)
    first.release()
    assert second.try_acquire({a, b}) == set()
    second.release()
    assert not second.is_held(a)


def test_a_note_tells_every_job_that_flock_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job on two machines detects it. A job on one machine and an eviction cannot, so they read the note."""
    monkeypatch.setattr("weightferry.cache.lock_support.is_local", lambda _: False)
    layout = CacheLayout(tmp_path)
    assert detect_lock_support(layout).flock_works
    assert not detect_lock_support(layout, across_machines=False).flock_works
    assert str(detect_lock_support(layout)) == "files (flock succeeds on two machines at once)"


class TestLockHolder:
    def test_a_running_process_is_not_dead(self) -> None:
        assert not LockHolder.this_process().is_dead
        assert not replace(LockHolder.this_process(), machine="another", pid=1 << 22).is_dead, (
            "there is no proof for a process of another machine"
        )

    def test_a_process_that_ended_or_whose_pid_was_reused(self) -> None:
        with subprocess.Popen(["true"]) as ended:
            pass
        assert replace(LockHolder.this_process(), pid=ended.pid).is_dead
        assert replace(LockHolder.this_process(), started="1").is_dead

    def test_a_process_that_this_user_cannot_see(self, monkeypatch: pytest.MonkeyPatch) -> None:
        holder = LockHolder.this_process()
        monkeypatch.setattr("weightferry.cache.lock_holder._start_time", lambda _: "")
        assert not holder.is_dead

    def test_a_note_is_read_back(self, tmp_path: Path) -> None:
        holder = replace(LockHolder.this_process(), claims=("held-1", "intent-1"))
        (tmp_path / "note").write_text(holder.json_text)
        assert LockHolder.read(tmp_path / "note") == holder
        for text in ("", "[]", "{}", '{"host": "h"}'):
            (tmp_path / "note").write_text(text)
            assert LockHolder.read(tmp_path / "note") is None


def test_only_claims_of_dead_processes_are_removed(path: Path, monitor: FakeMonitor) -> None:
    """The note of a dead process may lie beside the claim of a running process."""
    soft = LockSupport("flock does not work", holder_notes=True)
    first, second = FileLocks(LockTimeouts(0.3), monitor.check, soft), FileLocks(LockTimeouts(0.3), monitor.check, soft)
    first.acquire({path})
    dead = replace(LockHolder.this_process(), started="1", claims=("held-v1-0.claim",))
    path.with_suffix(".holder").write_text(dead.json_text)
    assert second.try_acquire({path}) == {path}
    assert first.is_held(path)
    first.release()


def test_one_timeout_for_all_locks(tmp_path: Path, monitor: FakeMonitor) -> None:
    first, second = FileLocks(LockTimeouts(9), monitor.check), FileLocks(LockTimeouts(0.5), monitor.check)
    paths = {tmp_path / f"{number}.lock" for number in range(10)}
    first.acquire(paths)
    began = time.monotonic()
    second.acquire(paths)
    assert not any(second.is_held(path) for path in paths)
    assert time.monotonic() - began < 10 * 0.5 + 2, "each lock is tried once more after the timeout"
    first.release()


def test_an_error_in_the_block_is_not_an_error_of_the_lock(path: Path, monitor: FakeMonitor) -> None:
    with pytest.raises(OSError, match="disk full"), content_lock(path, 1, monitor.check):
        raise OSError(errno.ENOSPC, "disk full")
    with content_lock(path, 1, monitor.check) as held:
        assert held, "the error released the lock"
