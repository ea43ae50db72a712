"""Eviction removes the commits that were staged longest ago, never a source in use; and `weightferry cache`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.conftest import need
from weightferry.cache import space, usage
from weightferry.cache.evict import evict, remove_source
from weightferry.cache.inventory import content_size, list_sources
from weightferry.cache.layout import CacheLayout
from weightferry.cache.locks import FileLocks, LockTimeouts
from weightferry.cache.partial_cleanup import list_partial_data
from weightferry.cache.space import check_space, make_room
from weightferry.cache.survey import CacheSurveyor
from weightferry.cache.usage import exclusive_use, hold_source, serialized
from weightferry.cache.verify import verify
from weightferry.cli import main
from weightferry.errors import NoSpace, Stalled
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.settings import Settings, byte_count
from weightferry.sources import Source

KB, MB = 1000, 1_000_000


class Cache:
    """A cache in the state that staging leaves."""

    def __init__(self, root: Path) -> None:
        self.layout = CacheLayout(root)
        self.clock = 1_000_000

    def stage(self, name: str, commit: str, **files: bytes) -> Path:
        """Write a commit as if it was staged, later than the commits before."""
        repo = self.layout.hub / f"models--{name.replace('/', '--')}"
        for path, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            (repo / "blobs").mkdir(parents=True, exist_ok=True)
            (repo / "blobs" / digest).write_bytes(content)
            link = repo / "snapshots" / commit / path
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(f"../../blobs/{digest}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs/main").write_text(commit)
        note = self.layout.used_note(repo.name, commit)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
        self.clock += 10
        os.utime(note, (self.clock, self.clock))
        return repo

    def names(self) -> list[str]:
        return [f"{held.name}@{commit.name}" for held in list_sources(self.layout) for commit in held.commits]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    yield Cache(tmp_path / "cache")
    usage.release_held_sources()


@pytest.fixture
def three_sources(cache: Cache) -> Cache:
    for name in "abc":
        cache.stage(f"org/{name}", "1", w=name.encode() * KB)
    return cache


def test_the_commit_staged_longest_ago_is_evicted_first(three_sources: Cache) -> None:
    three_sources.stage("org/a", "1", w=b"a" * KB)  # staged again, so the latest
    removed = evict(three_sources.layout, 2 * KB)
    assert [(one.source, one.commit, one.size) for one in removed] == [("org/b", "1", KB)]
    assert three_sources.names() == ["org/a@1", "org/c@1"]
    assert evict(three_sources.layout, 2 * KB) == []


def test_content_of_another_commit_stays(cache: Cache) -> None:
    cache.stage("org/a", "1", same=b"s" * KB, old=b"o" * KB)
    repo = cache.stage("org/a", "2", same=b"s" * KB, new=b"n" * KB)
    assert [one.size for one in evict(cache.layout, 2 * KB)] == [KB]
    assert cache.names() == ["org/a@2"]
    assert (repo / "snapshots/2/same").read_bytes() == b"s" * KB
    assert (repo / "refs/main").read_text() == "2"
    evict(cache.layout, 0)
    assert not repo.exists()


def test_unreferenced_content_is_evicted_last(cache: Cache) -> None:
    """A job that is killed between publish and link leaves such content."""
    cache.stage("org/a", "1", w=b"a" * KB)
    cache.stage("org/b", "1", w=b"b" * KB)
    for name in "ac":
        blobs = cache.layout.hub / f"models--org--{name}/blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / "0123").write_bytes(b"0" * KB)
    removed = [(one.source, one.commit, one.size) for one in evict(cache.layout, 2 * KB)]
    assert removed == [("org/a", "1", 2 * KB)], "the last commit of a source takes all its content with it"
    assert [(one.source, one.commit) for one in evict(cache.layout, 0)] == [
        ("org/b", "1"),
        ("unreferenced content of org/c", ""),
    ]
    assert list(cache.layout.hub.iterdir()) == []


def test_a_source_in_use_stays(three_sources: Cache) -> None:
    hold_source(three_sources.layout.used_lock("models--org--a"), lambda: None)
    assert [one.source for one in evict(three_sources.layout, 0)] == ["org/b", "org/c"]
    assert three_sources.names() == ["org/a@1"]
    usage.release_held_sources()
    evict(three_sources.layout, 0)
    assert three_sources.names() == []


def test_a_source_is_free_when_its_process_is_killed(three_sources: Cache) -> None:
    lock = three_sources.layout.used_lock("models--org--b")
    code = (
        "import time; from pathlib import Path; from weightferry.cache.usage import hold_source\n"
        f"hold_source(Path({str(lock)!r}), lambda: None); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [one.source for one in evict(three_sources.layout, 0)] == ["org/a", "org/c"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [one.source for one in evict(three_sources.layout, 0)] == ["org/b"]


def test_a_process_waits_while_its_source_is_evicted(three_sources: Cache) -> None:
    lock = three_sources.layout.used_lock("models--org--a")
    looks = []

    def look() -> None:
        looks.append(time.monotonic())
        if len(looks) == 3:
            stack.__exit__(None, None, None)

    stack = exclusive_use(lock)
    assert stack.__enter__()
    hold_source(lock, look)
    assert len(looks) == 3
    assert remove_source(three_sources.layout, list_sources(three_sources.layout)[0]) is None


def test_an_eviction_that_hangs(three_sources: Cache) -> None:
    """A stopped process: another process waits for a limited time, and the error names the stopped process."""
    lock = three_sources.layout.used_lock("models--org--a")
    with exclusive_use(lock), pytest.raises(Stalled, match=f"by process {os.getpid()}"):
        hold_source(lock, lambda: None, 0.2)
    with exclusive_use(three_sources.layout.space_lock), serialized(three_sources.layout.space_lock, lambda: None, 0.2):
        pass


def test_a_killed_eviction_is_finished_by_the_next_one(three_sources: Cache) -> None:
    (three_sources.layout.hub / "models--org--a").rename(three_sources.layout.hub / ".trash-1")
    assert three_sources.names() == ["org/b@1", "org/c@1"]
    evict(three_sources.layout, 10 * KB)
    assert not list(three_sources.layout.hub.glob(".trash*"))


def wanting(layout: CacheLayout, *files: File) -> tuple[CacheSurveyor, list[tuple[PinnedSource, File]]]:
    """Return a leader that has surveyed a cache, and the files of a new source that the cache lacks."""
    surveyor = CacheSurveyor(
        layout,
        Manifest((PinnedSource(Source("hf", "org/new"), "1" * 40, files),)),
        FileLocks(LockTimeouts(5), lambda: None),
    )
    surveyor.survey()
    return surveyor, surveyor.files


class TestRoom:
    @pytest.fixture
    def wanted(self) -> list[tuple[PinnedSource, File]]:
        file = File("w.bin", 2 * KB)
        return [(PinnedSource(Source("hf", "org/new"), "1" * 40, (file,)), file)]

    def make(self, cache: Cache, settings: Settings, size: int = 2 * KB) -> None:
        surveyor, lacking = wanting(cache.layout, File("w.bin", size))
        try:
            make_room(surveyor, lacking, settings, lambda: None)
        finally:
            surveyor.release()

    def test_the_cache_stays_below_its_limit(self, three_sources: Cache) -> None:
        self.make(three_sources, Settings(max_size=4 * KB))
        assert three_sources.names() == ["org/b@1", "org/c@1"]

    def test_nothing_is_evicted_without_a_limit(self, three_sources: Cache) -> None:
        self.make(three_sources, Settings())
        assert content_size(three_sources.layout) == 3 * KB

    def test_sources_in_use_cannot_make_room(self, three_sources: Cache) -> None:
        for name in "abc":
            hold_source(three_sources.layout.used_lock(f"models--org--{name}"), lambda: None)
        with pytest.raises(NoSpace, match="max_size"):
            self.make(three_sources, Settings(max_size=4 * KB))
        assert content_size(three_sources.layout) == 3 * KB

    def refused_beside(self, cache: Cache, *files: File) -> tuple[CacheSurveyor, list[tuple[PinnedSource, File]]]:
        """Let one job reserve 3 MB, so that a second job has no room for 3 MB. Return the second job."""
        first, lacking = wanting(cache.layout, *files)
        make_room(first, lacking, Settings(max_size=5 * MB), lambda: None)
        second, other = wanting(cache.layout, File("b.bin", 3 * MB))
        with pytest.raises(NoSpace, match="being downloaded"):
            make_room(second, other, Settings(max_size=5 * MB), lambda: None)
        second.release()
        first.release()
        return second, other

    def test_downloads_of_another_job_count(self, cache: Cache) -> None:
        """Each job alone has room. Both together exceed the limit."""
        second, other = self.refused_beside(cache, File("a.bin", 3 * MB))
        assert list_partial_data(cache.layout) == [], "no data arrived, so the space is free again"
        make_room(second, other, Settings(max_size=5 * MB), lambda: None)
        second.release()

    def test_partial_data_of_a_killed_job_is_removed_last(self, three_sources: Cache) -> None:
        left, lacking = wanting(three_sources.layout, File("left.bin", 3 * MB))
        left.reserve_space()
        path = three_sources.layout.partial_of(*lacking[0])
        with path.with_name(f"{path.name}.journal").open("a") as journal:
            journal.write("0 1000 00000000\n")
        (partial,) = list_partial_data(three_sources.layout)
        self.make(three_sources, Settings(max_size=5 * MB + 2 * KB + partial.disk_size), size=5 * MB)
        assert (three_sources.names(), path.exists()) == (["org/b@1", "org/c@1"], True)
        with pytest.raises(NoSpace):
            self.make(three_sources, Settings(max_size=4 * MB), size=2 * MB)
        assert path.exists(), "its job still runs"
        left.release()
        self.make(three_sources, Settings(max_size=4 * MB), size=2 * MB)
        assert not path.exists()

    def test_small_files_of_another_job_count(self, cache: Cache) -> None:
        self.refused_beside(cache, *(File(f"{number}.bin", 300 * KB) for number in range(10)))
        assert list_partial_data(cache.layout) == []

    def test_space_that_a_killed_job_reserved_for_small_files_is_reused(self, cache: Cache) -> None:
        files = [File(f"{number}.bin", 300 * KB) for number in range(10)]
        path = cache.layout.small_files_partial(PinnedSource(Source("hf", "org/new"), "1" * 40, ()))
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(3 * MB))
        surveyor, lacking = wanting(cache.layout, *files)
        make_room(surveyor, lacking, Settings(max_size=4 * MB), lambda: None)
        surveyor.release()
        assert list_partial_data(cache.layout) == []

    def test_reserved_space_without_data_is_freed_at_once(self, cache: Cache) -> None:
        left, _ = wanting(cache.layout, File("left.bin", 3 * MB))
        left.reserve_space()
        self.make(cache, Settings())
        assert len(list_partial_data(cache.layout)) == 1, "its job still runs"
        left._locks.release()  # as the kernel does when the job is killed
        self.make(cache, Settings())
        assert list_partial_data(cache.layout) == []

    def test_files_that_never_fit_evict_nothing(self, three_sources: Cache) -> None:
        hold_source(three_sources.layout.used_lock("models--org--a"), lambda: None)
        for size in (9 * KB, int(3.5 * KB)):
            with pytest.raises(NoSpace, match="max_size"):
                self.make(three_sources, Settings(max_size=4 * KB), size=size)
        assert len(three_sources.names()) == 3
        self.make(three_sources, Settings(max_size=4 * KB), size=3 * KB)
        assert three_sources.names() == ["org/a@1"]

    def test_one_leader_at_a_time_makes_room(self, three_sources: Cache) -> None:
        surveyor, lacking = wanting(three_sources.layout, File("w.bin", 2 * KB))

        class Waiting(Exception):
            pass

        def look() -> None:
            raise Waiting

        with exclusive_use(three_sources.layout.space_lock), pytest.raises(Waiting):
            make_room(surveyor, lacking, Settings(), look)
        surveyor.release()

    def test_free_space_that_must_stay_free(self, three_sources: Cache, wanted: Any) -> None:
        free = os.statvfs(three_sources.layout.root).f_bavail * os.statvfs(three_sources.layout.root).f_frsize
        with pytest.raises(NoSpace, match=r"min_free.*Free"):
            check_space(three_sources.layout, wanted, free)

    def test_a_full_disk_evicts_when_a_limit_is_set(
        self, three_sources: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def disk(_: object) -> Any:
            free = 10 * KB - content_size(three_sources.layout)
            return os.statvfs_result((1, 1, free, free, free, 1000, 1000, 1000, 0, 255))

        monkeypatch.setattr(space.os, "statvfs", disk)  # type: ignore[attr-defined]
        self.make(three_sources, Settings(max_size=1000 * KB, min_free=4 * KB), size=4096)
        assert three_sources.names() == ["org/c@1"]

    def test_inodes_count(self, three_sources: Cache, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        full = os.statvfs_result((4096, 4096, 10**9, 10**9, 10**9, 1000, 3, 3, 0, 255))
        monkeypatch.setattr(space.os, "statvfs", lambda _: full)  # type: ignore[attr-defined]
        with pytest.raises(NoSpace, match=r"not enough inodes: .* has 3"):
            check_space(three_sources.layout, wanted, 0)


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("1000", 1000), ("50GB", 50e9), ("1.5TiB", 1.5 * 2**40), ("3 MB", 3e6), ("2k", 2000)]
)
def test_sizes(text: str, count: float) -> None:
    assert byte_count(text) == count
    assert Settings.from_environ({"WEIGHTFERRY_MAX_SIZE": text}).max_size == count


@pytest.mark.parametrize("text", ["", "many", "-1", "1XB", "GB"])
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        byte_count(text)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _quiet(self) -> Iterator[None]:
        """Restore the logging configuration that the command changes."""
        loggers = [logging.getLogger(name) for name in ("weightferry", "weightferry.report.progress")]
        before = [(logger.level, logger.handlers[:]) for logger in loggers]
        yield
        for logger, (level, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = handlers

    def run(self, cache: Cache, *arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["cache", *arguments, "--cache-dir", str(cache.layout.root)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    def test_where_and_ls(self, three_sources: Cache) -> None:
        assert self.run(three_sources, "where") == (0, f"{three_sources.layout.root}\n")
        hold_source(three_sources.layout.used_lock("models--org--b"), lambda: None)
        self.run(three_sources, "pin", "org/a")
        said = self.run(three_sources, "ls", "--json")[1]
        rows = json.loads(said)
        assert [(row["source"], row["bytes"], row["pinned"], row["in_use"]) for row in rows] == [
            ("org/a", KB, True, False),
            ("org/b", KB, False, True),
            ("org/c", KB, False, False),
        ]
        assert "3 sources, 3 kB" in self.run(three_sources, "ls")[1]

    def test_a_missing_cache(self, cache: Cache) -> None:
        assert self.run(cache, "ls", "--json") == (0, "[]\n")
        assert self.run(cache, "evict", "--to", "0")[0] == 0

    def test_pinned_sources_stay(self, three_sources: Cache) -> None:
        self.run(three_sources, "pin", "org/a")
        assert self.run(three_sources, "evict", "--to", "0")[0] == 1
        assert three_sources.names() == ["org/a@1"]
        assert self.run(three_sources, "rm", "org/a")[0] == 1
        self.run(three_sources, "unpin", "org/a")
        assert self.run(three_sources, "rm", "org/a") == (0, "removed org/a  1 kB\n")

    def test_partial_data_of_killed_jobs(self, cache: Cache) -> None:
        left, lacking = wanting(cache.layout, File("left.bin", 3 * MB))
        left.reserve_space()
        path = cache.layout.partial_of(*lacking[0])
        with path.with_name(f"{path.name}.journal").open("a") as journal:
            journal.write("0 1000 00000000\n")
        assert "3 MB in partial downloads of running or killed jobs" in self.run(cache, "ls")[1]
        assert self.run(cache, "evict", "--to", "0")[0] == 1, "its job still runs"
        left.release()
        code, said = self.run(cache, "evict", "--to", "0")
        assert (code, path.exists()) == (0, False)
        assert "removed partial download of a killed job  3 MB" in said

    @pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("evict", "--to", "0"), ("where",), ("rm", "org/a")])
    def test_an_error_is_one_line(
        self, three_sources: Cache, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WEIGHTFERRY_MAX_SIZE", "many")
        code, said = self.run(three_sources, *arguments)
        assert (code, said.count("\n")) == (1, 1)
        assert "WEIGHTFERRY_MAX_SIZE is 'many', but must be a size" in said

    def test_a_path_that_is_no_cache(self, three_sources: Cache, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        code, said = self.run(Cache(tmp_path / "file"), "ls")
        assert (code, "is not a folder" in said) == (1, True)
        done = CliRunner().invoke(main, ["cache", "evict", "--to", "0", "--cache-dir", ""])
        assert (done.exit_code, "may not be empty" in done.output) == (2, True)

    def test_an_unknown_source(self, three_sources: Cache) -> None:
        code, said = self.run(three_sources, "rm", "org/aa")
        assert code == 1
        assert "did you mean org/a" in said

    def test_verify(self, three_sources: Cache) -> None:
        assert self.run(three_sources, "verify")[0] == 0
        (blob,) = (three_sources.layout.hub / "models--org--b/blobs").iterdir()
        blob.write_bytes(b"x" * KB)
        code, said = self.run(three_sources, "verify", "--json")
        assert code == 1
        (node,) = json.loads(said)
        assert (node["files"], node["bytes"]) == (3, 3 * KB)
        assert [(one["source"], one["paths"]) for one in node["damaged"]] == [("org/b", ["w"])]
        assert self.run(three_sources, "verify", "org/a")[0] == 0

    def test_verify_reports_progress(self, three_sources: Cache) -> None:
        counts, expected = list[int](), list[int]()
        verify(three_sources.layout, counts.append, "", expected.append)
        assert (sum(counts), expected) == (3 * KB, [3 * KB])

    def test_a_thousand_models(self, cache: Cache) -> None:
        for number in range(1000):
            cache.stage(f"org/m{number}", "1", w=str(number).encode(), config=b"{}")
        code, said = self.run(cache, "ls")
        assert code == 0
        assert "1000 sources" in said


def test_sources_of_another_user_stay() -> None:
    need(os.geteuid() == 0, "this test needs the right to become another user: run it as root")
    with tempfile.TemporaryDirectory() as folder:  # only root may enter pytest's own folder
        Path(folder).chmod(0o755)
        cache = Cache(Path(folder) / "cache")
        for name in "abc":
            cache.stage(f"org/{name}", "1", w=name.encode() * KB)
        for path in (cache.layout.root, *cache.layout.root.rglob("*")):
            os.lchown(path, 4242, 4242)
        os.lchown(cache.layout.hub / "models--org--a", 0, 0)
        child = os.fork()
        if child == 0:
            try:
                os.setgid(4242)
                os.setuid(4242)
                os._exit(10 + len(evict(cache.layout, 0)))
            except BaseException:  # noqa: BLE001 -- the exit code reports it
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 12
        assert cache.names() == ["org/a@1"]
