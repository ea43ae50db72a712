"""Where `flock` excludes no process or does not exist: right results, one download, no wait for a dead process."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, check_cache, sha256s, values
from tests.store_answers import known
from weightferry.cache.layout import CacheLayout
from weightferry.testing.hub import Fault

FILES = {"config.json": b"{}", "w/model.bin": os.urandom(4 << 20)}
ANSWERS = {"excludes no process": 0, "does not exist": errno.ENOSYS}
pytestmark = pytest.mark.parametrize("flock", ANSWERS.values(), ids=ANSWERS)


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    need(known(), "the system call numbers of this machine are unknown")
    nodes.hub.add_repo("org/model", FILES)
    nodes.variables.update(WEIGHTFERRY_BEAT_INTERVAL="0.5", WEIGHTFERRY_BEAT_TIMEOUT="2")
    nodes.variables["WEIGHTFERRY_VISIBILITY_TIMEOUT"] = "1"
    return nodes


def without(flock: int, call: Callable[[], Any]) -> Any:
    return partial(jobs.answered, call, "flock", flock)


def stage(nodes: Nodes, flock: int, *, world_size: int = 2) -> list[dict[str, str]]:
    (gots,) = nodes.tries(without(flock, partial(jobs.stage, "org/model")), world_size=world_size)
    return [files for _, files in values(gots)]


def test_the_report_names_the_kind_of_lock(model: Nodes, flock: int) -> None:
    (gots,) = model.tries(without(flock, partial(jobs.report, "org/model")))
    kinds = {domain["locks"] for domain in values(gots)[0]["domains"]}
    assert kinds == {"files (flock grants one lock twice)" if flock == 0 else "files (flock: Function not implemented)"}
    assert model.hub.content_bytes() == sum(map(len, FILES.values()))
    for rank in (0, 2):
        check_cache(model.cache(rank))
        assert not list(model.cache(rank).rglob("*.holder"))
        assert not list(model.cache(rank).rglob("*.claim"))


def test_two_jobs_download_once(model: Nodes, flock: int) -> None:
    model.hub.faults.add(Fault(kind="content", bytes_per_second=2e6, times=None))
    results: list[Any] = []
    jobs_ = [threading.Thread(target=lambda: results.append(stage(model, flock))) for _ in range(2)]
    for job in jobs_:
        job.start()
    for job in jobs_:
        job.join()
    assert results == [[sha256s(FILES)] * 2] * 2
    assert model.hub.content_bytes("model.bin") == len(FILES["w/model.bin"])


def killed_in_transfer(model: Nodes, flock: int) -> Path:
    """Kill a job that holds its locks. Return the note beside the lock of the big file."""
    model.hub.faults.add(Fault(kind="content", bytes_per_second=1e6, times=None))
    with model.start(without(flock, partial(jobs.stage, "org/model")), world_size=1):
        while model.hub.content_bytes("model.bin") < 2 << 20:
            time.sleep(0.05)
    model.hub.faults.clear()
    model.hub.reset()
    (note,) = (note for note in model.cache(0).rglob("*.holder") if "small" not in note.name)
    return note


def test_the_lock_of_a_dead_process_is_removed(model: Nodes, flock: int) -> None:
    """The kernel proves the death: the next job resumes the partial data and does not wait."""
    note = killed_in_transfer(model, flock)
    began = time.monotonic()
    assert stage(model, flock) == [sha256s(FILES)] * 2
    assert time.monotonic() - began < 30
    assert model.hub.content_bytes("model.bin") <= 3 << 20
    assert not note.exists()


def test_the_lock_of_a_silent_machine_is_ignored(model: Nodes, flock: int) -> None:
    """There is no proof of death: the claim stays, and the next job waits for a limited time."""
    note = killed_in_transfer(model, flock)
    note.write_text(json.dumps({**json.loads(note.read_text()), "machine": "another", "host": "node99"}))
    began = time.monotonic()
    assert stage(model, flock) == [sha256s(FILES)] * 2
    assert time.monotonic() - began < 60
    assert list(note.parent.glob("*.soft.filelock/claims/*.claim")), "its claim stays"
    model.hub.reset()
    assert stage(model, flock) == [sha256s(FILES)] * 2
    assert model.hub.content_bytes() == 0


def test_nothing_is_evicted_where_flock_does_not_work(model: Nodes, flock: int) -> None:
    assert stage(model, flock) == [sha256s(FILES)] * 2
    layout = CacheLayout(model.cache(0))
    evict = partial(jobs.command, model.place, "cache", "evict", "--to", "0", "--cache-dir", str(layout.root))
    ((code, _, said),) = model.run(without(flock, evict), world_size=1)
    assert code == 1
    assert "cannot tell which files are in use" in said
    assert check_cache(layout.root)
