"""The lock saves bandwidth and never stands in the way."""

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
from pathlib import Path

import pytest
from huggingface_hub.utils import WeakFileLock

from tests.unit.doubles import FakeWatch, Over
from weightferry.cache.locks import Locks, Patience

HOLD = """
import sys
from pathlib import Path
from weightferry.cache.locks import Locks, Patience
locks, path = Locks(Patience(10), lambda: None), Path(sys.argv[1])
locks.wait({path})
print(locks.held(path), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def content_lock(path: Path, timeout: float, check: Callable[[], None]) -> Iterator[bool]:
    locks = Locks(Patience(timeout), check)
    try:
        locks.wait({path})
        yield locks.held(path)
    finally:
        locks.release()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".locks" / "models--org--model" / "key.lock"


def failing(number: int) -> Callable[..., None]:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "as some file systems do")

    return fails


def test_it_is_held_and_let_go(path: Path, watch: FakeWatch) -> None:
    for _ in range(2):
        with content_lock(path, 1, watch.check) as held:
            assert held
    assert path.exists(), "removing it would split those who wait for it"


def test_threads_exclude_each_other(path: Path, watch: FakeWatch) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with content_lock(path, 30, watch.check) as held:
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


def test_another_process_excludes(path: Path, watch: FakeWatch, caplog: pytest.LogCaptureFixture) -> None:
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
        with caplog.at_level(logging.WARNING), content_lock(path, 0.1, watch.check) as held:
            assert not held
        assert "going on without the lock" in caplog.text
        assert f"held by process {holder.pid} on {socket.gethostname()} (job 815)" in caplog.text
        holder.kill()  # a lock must not outlive its holder
        holder.wait()
        with content_lock(path, 10, watch.check) as held:
            assert held


def test_it_is_the_lock_of_huggingface_hub(path: Path, watch: FakeWatch) -> None:
    path.parent.mkdir(parents=True)
    with WeakFileLock(path), content_lock(path, 0.1, watch.check) as held:
        assert not held


def test_the_wait_ends_with_the_operation(path: Path, watch: FakeWatch) -> None:
    watch.over = True
    began = time.monotonic()
    with content_lock(path, 60, lambda: None), pytest.raises(Over), content_lock(path, 60, watch.check):
        pass
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EIO], ids=errno.errorcode.get)
def test_file_systems_without_locks(
    path: Path, watch: FakeWatch, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        with content_lock(path, 1, watch.check) as held:
            assert not held
    assert caplog.text.count("going on without the lock") == 2
    monkeypatch.undo()
    # A soft lock in its place would be a file that a killed job leaves behind, and everybody after it waits.
    with content_lock(path, 1, watch.check) as held:
        assert held


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_somebody_elses_cache(
    path: Path, watch: FakeWatch, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(number))
    with content_lock(path, 1, watch.check) as held:
        assert not held
    assert "going on without the lock" in caplog.text


def test_what_others_hold_is_not_waited_for(tmp_path: Path, watch: FakeWatch) -> None:
    first, second = Locks(Patience(60), watch.check), Locks(Patience(60), watch.check)
    a, b = tmp_path / "a.lock", tmp_path / "b.lock"
    assert first.take({a}) == set()
    assert second.take({a, b}) == {a}
    assert (second.held(a), second.held(b)) == (False, True)
    first.release()
    assert second.take({a, b}) == set()
    second.release()
    assert not second.held(a)


def test_errors_of_the_work_are_not_taken_for_errors_of_the_lock(path: Path, watch: FakeWatch) -> None:
    with pytest.raises(OSError, match="disk full"), content_lock(path, 1, watch.check):
        raise OSError(errno.ENOSPC, "disk full")
    with content_lock(path, 1, watch.check) as held:
        assert held, "it was let go"
