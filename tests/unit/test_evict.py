"""Room is made with what was staged longest ago, never with what anybody uses; and the commands around it."""

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
    """A cache filled by hand, as staging leaves it."""

    def __init__(self, root: Path) -> None:
        self.layout = CacheLayout(root)
        self.clock = 1_000_000

    def stage(self, name: str, commit: str, **files: bytes) -> Path:
        """Let a commit look as staged, later than those before."""
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
def three(cache: Cache) -> Cache:
    for name in "abc":
        cache.stage(f"org/{name}", "1", w=name.encode() * KB)
    return cache


def test_what_was_staged_longest_ago_goes_first(three: Cache) -> None:
    three.stage("org/a", "1", w=b"a" * KB)  # again, and so the latest
    removed = evict(three.layout, 2 * KB)
    assert [(one.source, one.commit, one.size) for one in removed] == [("org/b", "1", KB)]
    assert three.names() == ["org/a@1", "org/c@1"]
    assert evict(three.layout, 2 * KB) == []


def test_content_that_another_commit_shows_stays(cache: Cache) -> None:
    cache.stage("org/a", "1", same=b"s" * KB, old=b"o" * KB)
    repo = cache.stage("org/a", "2", same=b"s" * KB, new=b"n" * KB)
    assert [one.size for one in evict(cache.layout, 2 * KB)] == [KB]
    assert cache.names() == ["org/a@2"]
    assert (repo / "snapshots/2/same").read_bytes() == b"s" * KB
    assert (repo / "refs/main").read_text() == "2"
    evict(cache.layout, 0)
    assert not repo.exists()


def test_content_that_nothing_shows_goes_last(cache: Cache) -> None:
    """A job that is killed between publish and link leaves it."""
    cache.stage("org/a", "1", w=b"a" * KB)
    cache.stage("org/b", "1", w=b"b" * KB)
    for name in "ac":
        blobs = cache.layout.hub / f"models--org--{name}/blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / "0123").write_bytes(b"0" * KB)
    removed = [(one.source, one.commit, one.size) for one in evict(cache.layout, 2 * KB)]
    assert removed == [("org/a", "1", 2 * KB)], "with the last commit of a source all of it"
    assert [(one.source, one.commit) for one in evict(cache.layout, 0)] == [
        ("org/b", "1"),
        ("unreferenced content of org/c", ""),
    ]
    assert list(cache.layout.hub.iterdir()) == []


def test_what_this_process_uses_stays(three: Cache) -> None:
    hold_source(three.layout.used_lock("models--org--a"), lambda: None)
    assert [one.source for one in evict(three.layout, 0)] == ["org/b", "org/c"]
    assert three.names() == ["org/a@1"]
    usage.release_held_sources()
    evict(three.layout, 0)
    assert three.names() == []


def test_a_pin_dies_with_its_process(three: Cache) -> None:
    lock = three.layout.used_lock("models--org--b")
    code = (
        "import time; from pathlib import Path; from weightferry.cache.usage import hold_source\n"
        f"hold_source(Path({str(lock)!r}), lambda: None); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [one.source for one in evict(three.layout, 0)] == ["org/a", "org/c"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [one.source for one in evict(three.layout, 0)] == ["org/b"]


def test_who_wants_a_source_waits_while_it_is_removed(three: Cache) -> None:
    lock = three.layout.used_lock("models--org--a")
    looks = []

    def look() -> None:
        looks.append(time.monotonic())
        if len(looks) == 3:
            stack.__exit__(None, None, None)

    stack = exclusive_use(lock)
    assert stack.__enter__()
    hold_source(lock, look)
    assert len(looks) == 3
    assert remove_source(three.layout, list_sources(three.layout)[0]) is None


def test_an_eviction_that_is_never_over(three: Cache) -> None:
    """A stopped process: whoever wants the source does not wait for ever, and is told who that is."""
    lock = three.layout.used_lock("models--org--a")
    with exclusive_use(lock), pytest.raises(Stalled, match=f"by process {os.getpid()}"):
        hold_source(lock, lambda: None, 0.2)
    with exclusive_use(three.layout.space_lock), serialized(three.layout.space_lock, lambda: None, 0.2):
        pass


def test_what_a_killed_eviction_left_is_swept(three: Cache) -> None:
    (three.layout.hub / "models--org--a").rename(three.layout.hub / ".trash-1")
    assert three.names() == ["org/b@1", "org/c@1"]
    evict(three.layout, 10 * KB)
    assert not list(three.layout.hub.glob(".trash*"))


def wanting(layout: CacheLayout, *files: File) -> tuple[CacheSurveyor, list[tuple[PinnedSource, File]]]:
    """A leader that has surveyed a cache which lacks these files of a new source."""
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

    def test_the_cache_stays_below_its_limit(self, three: Cache) -> None:
        self.make(three, Settings(max_size=4 * KB))
        assert three.names() == ["org/b@1", "org/c@1"]

    def test_nothing_is_evicted_without_a_limit(self, three: Cache) -> None:
        self.make(three, Settings())
        assert content_size(three.layout) == 3 * KB

    def test_what_is_in_use_is_no_room(self, three: Cache) -> None:
        for name in "abc":
            hold_source(three.layout.used_lock(f"models--org--{name}"), lambda: None)
        with pytest.raises(NoSpace, match="max_size"):
            self.make(three, Settings(max_size=4 * KB))
        assert content_size(three.layout) == 3 * KB

    def refused_beside(self, cache: Cache, *files: File) -> tuple[CacheSurveyor, list[tuple[PinnedSource, File]]]:
        """While one job brings 3 MB, another one has no room for as much; return that one."""
        first, lacking = wanting(cache.layout, *files)
        make_room(first, lacking, Settings(max_size=5 * MB), lambda: None)
        second, other = wanting(cache.layout, File("b.bin", 3 * MB))
        with pytest.raises(NoSpace, match="being downloaded"):
            make_room(second, other, Settings(max_size=5 * MB), lambda: None)
        second.release()
        first.release()
        return second, other

    def test_what_another_job_brings_counts(self, cache: Cache) -> None:
        """Each finds room by itself, and both together would not."""
        second, other = self.refused_beside(cache, File("a.bin", 3 * MB))
        assert list_partial_data(cache.layout) == [], "no byte came: the space is given back"
        make_room(second, other, Settings(max_size=5 * MB), lambda: None)
        second.release()

    def test_what_a_killed_job_left_makes_room_last(self, three: Cache) -> None:
        left, lacking = wanting(three.layout, File("left.bin", 3 * MB))
        left.reserve_space()
        path = three.layout.partial_of(*lacking[0])
        with path.with_name(f"{path.name}.journal").open("a") as journal:
            journal.write("0 1000 00000000\n")
        (there,) = list_partial_data(three.layout)
        self.make(three, Settings(max_size=5 * MB + 2 * KB + there.disk_size), size=5 * MB)
        assert (three.names(), path.exists()) == (["org/b@1", "org/c@1"], True)
        with pytest.raises(NoSpace):
            self.make(three, Settings(max_size=4 * MB), size=2 * MB)
        assert path.exists(), "its job lives"
        left.release()
        self.make(three, Settings(max_size=4 * MB), size=2 * MB)
        assert not path.exists()

    def test_small_files_of_another_job_count(self, cache: Cache) -> None:
        self.refused_beside(cache, *(File(f"{number}.bin", 300 * KB) for number in range(10)))
        assert list_partial_data(cache.layout) == []

    def test_what_a_killed_job_took_for_small_files_is_taken_over(self, cache: Cache) -> None:
        files = [File(f"{number}.bin", 300 * KB) for number in range(10)]
        path = cache.layout.small_files_partial(PinnedSource(Source("hf", "org/new"), "1" * 40, ()))
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(3 * MB))
        surveyor, lacking = wanting(cache.layout, *files)
        make_room(surveyor, lacking, Settings(max_size=4 * MB), lambda: None)
        surveyor.release()
        assert list_partial_data(cache.layout) == []

    def test_what_a_killed_job_took_for_nothing_goes_at_once(self, cache: Cache) -> None:
        left, _ = wanting(cache.layout, File("left.bin", 3 * MB))
        left.reserve_space()
        self.make(cache, Settings())
        assert len(list_partial_data(cache.layout)) == 1, "its job lives"
        left._locks.release()  # as when it is killed
        self.make(cache, Settings())
        assert list_partial_data(cache.layout) == []

    def test_what_never_fits_takes_nothing_away(self, three: Cache) -> None:
        hold_source(three.layout.used_lock("models--org--a"), lambda: None)
        for size in (9 * KB, int(3.5 * KB)):
            with pytest.raises(NoSpace, match="max_size"):
                self.make(three, Settings(max_size=4 * KB), size=size)
        assert len(three.names()) == 3
        self.make(three, Settings(max_size=4 * KB), size=3 * KB)
        assert three.names() == ["org/a@1"]

    def test_who_makes_room_does_so_alone(self, three: Cache) -> None:
        surveyor, lacking = wanting(three.layout, File("w.bin", 2 * KB))

        class Looked(Exception):
            pass

        def look() -> None:
            raise Looked

        with exclusive_use(three.layout.space_lock), pytest.raises(Looked):
            make_room(surveyor, lacking, Settings(), look)
        surveyor.release()

    def test_what_must_stay_free(self, three: Cache, wanted: Any) -> None:
        free = os.statvfs(three.layout.root).f_bavail * os.statvfs(three.layout.root).f_frsize
        with pytest.raises(NoSpace, match=r"min_free.*Free"):
            check_space(three.layout, wanted, free)

    def test_a_disk_that_is_short_of_room_evicts_where_it_may(
        self, three: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def disk(_: object) -> Any:
            free = 10 * KB - content_size(three.layout)
            return os.statvfs_result((1, 1, free, free, free, 1000, 1000, 1000, 0, 255))

        monkeypatch.setattr(space.os, "statvfs", disk)  # type: ignore[attr-defined]
        self.make(three, Settings(max_size=1000 * KB, min_free=4 * KB), size=4096)
        assert three.names() == ["org/c@1"]

    def test_inodes_count(self, three: Cache, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        full = os.statvfs_result((4096, 4096, 10**9, 10**9, 10**9, 1000, 3, 3, 0, 255))
        monkeypatch.setattr(space.os, "statvfs", lambda _: full)  # type: ignore[attr-defined]
        with pytest.raises(NoSpace, match=r"not enough inodes: .* has 3"):
            check_space(three.layout, wanted, 0)


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("1000", 1000), ("50GB", 50e9), ("1.5TiB", 1.5 * 2**40), ("3 MB", 3e6), ("2k", 2000)]
)
def test_sizes(text: str, count: float) -> None:
    assert byte_count(text) == count
    assert Settings.from_environ({"WEIGHTFERRY_MAX_SIZE": text}).max_size == count


@pytest.mark.parametrize("text", ["", "many", "-1", "1XB", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        byte_count(text)


class TestCommand:
    @pytest.fixture(autouse=True)
    def _quiet(self) -> Iterator[None]:
        """Leave the logging of this process as it was: the command sets it up for itself."""
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

    def test_where_and_ls(self, three: Cache) -> None:
        assert self.run(three, "where") == (0, f"{three.layout.root}\n")
        hold_source(three.layout.used_lock("models--org--b"), lambda: None)
        self.run(three, "pin", "org/a")
        said = self.run(three, "ls", "--json")[1]
        rows = json.loads(said)
        assert [(row["source"], row["bytes"], row["pinned"], row["in_use"]) for row in rows] == [
            ("org/a", KB, True, False),
            ("org/b", KB, False, True),
            ("org/c", KB, False, False),
        ]
        assert "3 sources, 3 kB" in self.run(three, "ls")[1]

    def test_a_cache_that_is_not_there(self, cache: Cache) -> None:
        assert self.run(cache, "ls", "--json") == (0, "[]\n")
        assert self.run(cache, "evict", "--to", "0")[0] == 0

    def test_pinned_sources_stay(self, three: Cache) -> None:
        self.run(three, "pin", "org/a")
        assert self.run(three, "evict", "--to", "0")[0] == 1
        assert three.names() == ["org/a@1"]
        assert self.run(three, "rm", "org/a")[0] == 1
        self.run(three, "unpin", "org/a")
        assert self.run(three, "rm", "org/a") == (0, "removed org/a  1 kB\n")

    def test_what_killed_jobs_left(self, cache: Cache) -> None:
        left, lacking = wanting(cache.layout, File("left.bin", 3 * MB))
        left.reserve_space()
        path = cache.layout.partial_of(*lacking[0])
        with path.with_name(f"{path.name}.journal").open("a") as journal:
            journal.write("0 1000 00000000\n")
        assert "3 MB on their way, or left by jobs" in self.run(cache, "ls")[1]
        assert self.run(cache, "evict", "--to", "0")[0] == 1, "its job lives"
        left.release()
        code, said = self.run(cache, "evict", "--to", "0")
        assert (code, path.exists()) == (0, False)
        assert "removed what killed jobs left  3 MB" in said

    @pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("evict", "--to", "0"), ("where",), ("rm", "org/a")])
    def test_what_is_wrong_is_told_in_one_line(
        self, three: Cache, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WEIGHTFERRY_MAX_SIZE", "many")
        code, said = self.run(three, *arguments)
        assert (code, said.count("\n")) == (1, 1)
        assert "WEIGHTFERRY_MAX_SIZE is 'many', but must be a size" in said

    def test_what_is_no_cache(self, three: Cache, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        code, said = self.run(Cache(tmp_path / "file"), "ls")
        assert (code, "is no folder" in said) == (1, True)
        done = CliRunner().invoke(main, ["cache", "evict", "--to", "0", "--cache-dir", ""])
        assert (done.exit_code, "may not be empty" in done.output) == (2, True)

    def test_a_name_that_is_not_there(self, three: Cache) -> None:
        code, said = self.run(three, "rm", "org/aa")
        assert code == 1
        assert "closest there: org/a" in said

    def test_verify(self, three: Cache) -> None:
        assert self.run(three, "verify")[0] == 0
        (blob,) = (three.layout.hub / "models--org--b/blobs").iterdir()
        blob.write_bytes(b"x" * KB)
        code, said = self.run(three, "verify", "--json")
        assert code == 1
        (node,) = json.loads(said)
        assert (node["files"], node["bytes"]) == (3, 3 * KB)
        assert [(one["source"], one["paths"]) for one in node["damaged"]] == [("org/b", ["w"])]
        assert self.run(three, "verify", "org/a")[0] == 0

    def test_verifying_tells_how_far_it_is(self, three: Cache) -> None:
        told, expected = list[int](), list[int]()
        verify(three.layout, told.append, "", expected.append)
        assert (sum(told), expected) == (3 * KB, [3 * KB])

    def test_a_thousand_models(self, cache: Cache) -> None:
        for number in range(1000):
            cache.stage(f"org/m{number}", "1", w=str(number).encode(), config=b"{}")
        code, said = self.run(cache, "ls")
        assert code == 0
        assert "1000 sources" in said


def test_what_belongs_to_somebody_else_stays() -> None:
    need(os.geteuid() == 0, "to be two users needs the right to become them: run this test as root")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be entered by root alone
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
            except BaseException:  # noqa: BLE001 -- told
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 12
        assert cache.names() == ["org/a@1"]
