"""Downloads by huggingface_hub and by weightferry into one cache at the same time: neither harms the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir, snapshot_download

import weightferry
from tests.contract.backends import contents, use_server
from tests.multiprocess.launched import clean_environ
from tests.multiprocess.nodes import Nodes
from weightferry.testing.hub import Fault, HubServer
from weightferry.testing.hub.faults import Exchange

# Only large files have their own locks.
FIRST_FILE, SECOND_FILE = "one.safetensors", "two.safetensors"
FILES = {
    FIRST_FILE: os.urandom(1_500_000),
    SECOND_FILE: os.urandom(1_500_000),
    "config.json": b"{}",
    "onnx/small.onnx": b"onnx" * 9,
}
TOTAL = sum(map(len, FILES.values()))
RATE = 3_000_000  # bytes per second and connection

GATE = "import sys; print('ready', flush=True); sys.stdin.readline()"
PROGRAMS = {
    "stage": ("from weightferry.staging import stage", "stage('org/model', cache_dir=sys.argv[1])"),
    "snapshot_download": (
        "from huggingface_hub import snapshot_download as download",
        "download('org/model', cache_dir=sys.argv[1] + '/hub')",
    ),
    "hf_hub_download": (
        "from huggingface_hub import hf_hub_download as download",
        f"for path in {list(FILES)}: download('org/model', path, cache_dir=sys.argv[1] + '/hub')",
    ),
}
ORDERS = [
    ("stage", "snapshot_download"),
    ("snapshot_download", "stage"),
    ("stage", "hf_hub_download"),
    ("hf_hub_download", "stage"),
]
all_orders = pytest.mark.parametrize("order", ORDERS, ids="-".join)
# `snapshot_download` calls `hf_hub_download` for each file: whose process dies makes no other difference.
two_orders = pytest.mark.parametrize("order", ORDERS[:2], ids="-".join)


class Program:
    """A process that does its imports first and starts on request."""

    def __init__(self, name: str, hub: HubServer, folder: Path, stack: ExitStack) -> None:
        self.is_weightferry = name == "stage"
        self._hub, self._log = hub, folder / f"{name}.log"
        imports, work = PROGRAMS[name]
        command = [sys.executable, "-c", "\n".join((imports, GATE, work)), str(folder / "cache")]
        environ = {**clean_environ(Nodes(hub, folder)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        log = stack.enter_context(self._log.open("wb"))
        self.process = stack.enter_context(
            subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        )
        stack.callback(self.process.kill)

    def begin(self) -> None:
        """Start it, and return when the Hub has its first request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n", self._log.read_text()
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        self.until_sent(0)

    def until_sent(self, count: int, path: str = "") -> None:
        """Wait for a request of this process; with a path, until `count` bytes of that file are sent to it."""
        deadline = time.monotonic() + 60
        while not any(
            record.user_agent.startswith("weightferry") == self.is_weightferry
            and (not path or (record.kind == "content" and record.file.endswith(path)))
            and record.file_bytes >= count
            for record in self._hub.requests
        ):
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.005)

    def end(self) -> None:
        """Wait for its end and check the exit code."""
        assert self.process.wait(60) == 0, self._log.read_text()


class SharedCache:
    """One cache folder, and a Hub that sends the content of `SECOND_FILE` only after `released` is set."""

    def __init__(self, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        self.hub, self.folder, self._ended = hub, folder, stack
        self.released = threading.Event()
        stack.callback(self.released.set)
        take = hub.faults.take

        def blocking_take(exchange: Exchange) -> Fault | None:
            if exchange.kind == "content" and exchange.path.endswith(SECOND_FILE):
                self.released.wait()
            return take(exchange)

        monkeypatch.setattr(hub.faults, "take", blocking_take)

    def programs(self, names: Sequence[str]) -> list[Program]:
        return [Program(name, self.hub, self.folder, self._ended) for name in names]

    def check(self) -> None:
        """Check that both see all files, and download no file again."""
        cache, commit = self.folder / "cache", self.hub.commit("org/model")
        folder = cache / "hub/models--org--model/snapshots" / commit
        assert contents(folder) == FILES
        (repo,) = scan_cache_dir(cache / "hub").repos
        assert scan_cache_dir(cache / "hub").warnings == []
        assert (repo.nb_files, [revision.commit_hash for revision in repo.revisions]) == (len(FILES), [commit])
        self.hub.reset()
        assert weightferry.stage("org/model", cache_dir=cache) == folder
        assert snapshot_download("org/model", cache_dir=cache / "hub", endpoint=self.hub.url) == str(folder)
        assert self.hub.content_bytes() == 0


@pytest.fixture
def shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedCache]:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with HubServer(bytes_per_second_per_connection=RATE) as hub, ExitStack() as stack:
        hub.add_repo("org/model", FILES)
        with monkeypatch.context() as patched:
            use_server(hub, patched)
            yield SharedCache(hub, tmp_path, patched, stack)
            use_server(hub, patched)


@all_orders
def test_both_succeed_and_download_large_files_once(shared_cache: SharedCache, order: tuple[str, str]) -> None:
    first, second = shared_cache.programs(order)
    first.begin()
    first.until_sent(0, SECOND_FILE)
    second.begin()
    shared_cache.released.set()
    first.end()
    second.end()
    assert [shared_cache.hub.content_bytes(path) for path in (FIRST_FILE, SECOND_FILE)] == [
        len(FILES[path]) for path in (FIRST_FILE, SECOND_FILE)
    ]
    assert shared_cache.hub.content_bytes() <= 2 * TOTAL
    half_written = [
        *shared_cache.folder.glob("cache/partial/*/*"),
        *shared_cache.folder.glob("cache/hub/*/blobs/*.incomplete"),
    ]
    assert not half_written
    shared_cache.check()


@two_orders
def test_the_downloading_process_is_killed(shared_cache: SharedCache, order: tuple[str, str]) -> None:
    shared_cache.released.set()
    shared_cache.hub.faults.add(Fault(path_suffix=SECOND_FILE, kind="content", silent_after=700_000))
    first, second = shared_cache.programs(order)
    first.begin()
    first.until_sent(700_000, SECOND_FILE)
    second.begin()
    first.process.kill()
    assert first.process.wait() == -signal.SIGKILL
    second.end()
    assert shared_cache.hub.content_bytes() <= 2 * TOTAL
    shared_cache.check()


@two_orders
def test_the_waiting_process_is_killed(shared_cache: SharedCache, order: tuple[str, str]) -> None:
    first, second = shared_cache.programs(order)
    first.begin()
    first.until_sent(0, SECOND_FILE)
    second.begin()
    second.process.kill()
    assert second.process.wait() == -signal.SIGKILL
    shared_cache.released.set()
    first.end()
    assert shared_cache.hub.content_bytes() <= 2 * TOTAL
    shared_cache.check()
