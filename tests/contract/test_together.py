"""huggingface_hub's own downloads and ours, at the same time, into the same cache: neither harms the other."""

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

# The big ones have locks of their own.
ONE, TWO = "one.safetensors", "two.safetensors"
FILES = {ONE: os.urandom(1_500_000), TWO: os.urandom(1_500_000), "config.json": b"{}", "onnx/small.onnx": b"onnx" * 9}
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
orders = pytest.mark.parametrize("order", ORDERS, ids="-".join)


class Program:
    """A process that has imported what it needs, and begins on a word."""

    def __init__(self, name: str, hub: HubServer, place: Path, ended: ExitStack) -> None:
        self.ours = name == "stage"
        self._hub, self._log = hub, place / f"{name}.log"
        imports, work = PROGRAMS[name]
        command = [sys.executable, "-c", "\n".join((imports, GATE, work)), str(place / "cache")]
        environ = {**clean_environ(Nodes(hub, place)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        log = ended.enter_context(self._log.open("wb"))
        self.process = ended.enter_context(
            subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        )
        ended.callback(self.process.kill)

    def begin(self) -> None:
        """Let it begin, and return when the Hub has heard of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n", self._log.read_text()
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        self.until_sent(0)

    def until_sent(self, count: int, path: str = "") -> None:
        """Wait for a request of it; with a path, one for the content of that file, with so many bytes sent."""
        deadline = time.monotonic() + 60
        while not any(
            record.user_agent.startswith("weightferry") == self.ours
            and (not path or (record.kind == "content" and record.file.endswith(path)))
            and record.file_bytes >= count
            for record in self._hub.requests
        ):
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.005)

    def end(self) -> None:
        """Wait for its end, which must be good."""
        assert self.process.wait(60) == 0, self._log.read_text()


class Shared:
    """One cache folder beside a Hub that holds back the content of `TWO` until it is told to let go."""

    def __init__(self, hub: HubServer, place: Path, monkeypatch: pytest.MonkeyPatch, ended: ExitStack) -> None:
        self.hub, self.place, self._ended = hub, place, ended
        self.let_go = threading.Event()
        ended.callback(self.let_go.set)
        take = hub.faults.take

        def held(exchange: Exchange) -> Fault | None:
            if exchange.kind == "content" and exchange.path.endswith(TWO):
                self.let_go.wait()
            return take(exchange)

        monkeypatch.setattr(hub.faults, "take", held)

    def programs(self, names: Sequence[str]) -> list[Program]:
        return [Program(name, self.hub, self.place, self._ended) for name in names]

    def check(self) -> None:
        """Both see all files, and nothing is brought again."""
        cache, commit = self.place / "cache", self.hub.commit("org/model")
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
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shared]:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with HubServer(bytes_per_second_per_connection=RATE) as hub, ExitStack() as ended:
        hub.add_repo("org/model", FILES)
        with monkeypatch.context() as patched:
            use_server(hub, patched)
            yield Shared(hub, tmp_path, patched, ended)
            use_server(hub, patched)


@orders
def test_both_end_well_and_big_files_are_read_once(shared: Shared, order: tuple[str, str]) -> None:
    first, second = shared.programs(order)
    first.begin()
    first.until_sent(0, TWO)
    second.begin()
    shared.let_go.set()
    first.end()
    second.end()
    assert [shared.hub.content_bytes(path) for path in (ONE, TWO)] == [len(FILES[path]) for path in (ONE, TWO)]
    assert shared.hub.content_bytes() <= 2 * TOTAL
    half_written = [*shared.place.glob("cache/partial/*/*"), *shared.place.glob("cache/hub/*/blobs/*.incomplete")]
    assert not half_written
    shared.check()


@orders
def test_the_one_that_reads_is_killed(shared: Shared, order: tuple[str, str]) -> None:
    shared.let_go.set()
    shared.hub.faults.add(Fault(path_suffix=TWO, kind="content", silent_after=700_000))
    first, second = shared.programs(order)
    first.begin()
    first.until_sent(700_000, TWO)
    second.begin()
    first.process.kill()
    assert first.process.wait() == -signal.SIGKILL
    second.end()
    assert shared.hub.content_bytes() <= 2 * TOTAL
    shared.check()


@orders
def test_the_one_that_waits_is_killed(shared: Shared, order: tuple[str, str]) -> None:
    first, second = shared.programs(order)
    first.begin()
    first.until_sent(0, TWO)
    second.begin()
    second.process.kill()
    assert second.process.wait() == -signal.SIGKILL
    shared.let_go.set()
    first.end()
    assert shared.hub.content_bytes() <= 2 * TOTAL
    shared.check()
