"""Disk errors on one node or on all nodes: the same error on every rank, and the next call works."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

import weightferry
from tests.conftest import need
from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, check_cache, failed_alike, sha256s, values
from tests.store_answers import known
from weightferry.errors import BadRequest, CollectError, LoadError, NoSpace, SourceNotFound
from weightferry.testing.hub import Fault

FILES = {"small.ckpt": b"small", "big.bin": os.urandom(3 << 20)}
ALL = {0, 1, 2, 3}


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", FILES)
    nodes.hub.add_repo("org/little", {"a.bin": b"abc"})
    return nodes


@pytest.fixture
def little_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, or of the size that the test requests."""
    folder = tmp_path / "node1"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '1m')}", "weightferry-test", str(folder)]
    need(
        os.geteuid() == 0 and run(mount, capture_output=True, check=False).returncode == 0,
        "this test mounts a small tmpfs, which needs root: run it with sudo make test, in a "
        "container with --cap-add SYS_ADMIN",
    )
    try:
        yield folder
    finally:
        run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_on_one_node(model: Nodes, little_disk: Path) -> None:
    gots, after = model.tries(partial(jobs.stage, "org/model"), partial(jobs.stage, "org/little"))
    failed_alike(gots, NoSpace, "survey", {2}, "needs 3.15 MB for 2 files", str(little_disk), "leader of ranks 2-3")
    assert model.hub.content_bytes() == len(b"abc"), "found before the first byte of the big model arrived"
    assert max(got.seconds for got in gots) < 30
    assert [files for _, files in values(after)] == [sha256s({"a.bin": b"abc"})] * 4
    check_cache(model.cache(0), failed=True)
    check_cache(little_disk, failed=True)


def copy_big(folders: tuple[Path, Path]) -> bytes:
    """Collect the big file as a real file in a folder of this node."""
    pretrainer = weightferry.Pretrainer(folders[jobs.rank() // 2], {"big": None}, {"big": "org/model/big.bin"})
    return pretrainer.collect_files(local_strategy=weightferry.LocalStrategy.COPY)["big"].read_bytes()


def test_a_disk_that_is_too_small_for_copies(model: Nodes, little_disk: Path) -> None:
    model.shared = True
    folders = model.place / "copies", little_disk
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "big.ckpt").write_bytes(b"before")
    failed, after = model.tries(partial(copy_big, folders), partial(copy_big, (folders[0], model.place / "elsewhere")))
    failed_alike(failed, NoSpace, "link", {2}, str(little_disk / "big.ckpt"))
    assert [path.name for path in little_disk.iterdir()] == ["big.ckpt"]
    assert (little_disk / "big.ckpt").read_bytes() == b"before"
    assert values(after) == [FILES["big.bin"]] * 4
    assert model.hub.content_bytes() == len(FILES["big.bin"])


def test_a_quota_shows_before_a_byte_moves(model: Nodes) -> None:
    need(known(), "the system call numbers of this machine are unknown")
    quota = partial(jobs.answered, partial(jobs.stage, "org/model"), "fallocate", errno.EDQUOT, [2])
    (gots,) = model.tries(quota)
    failed_alike(gots, NoSpace, "survey", {2}, "Disk quota exceeded", "3145728 bytes are needed", "org/model")
    assert model.hub.content_bytes() == 0
    assert check_cache(model.cache(0)) == check_cache(model.cache(2)) == [], "the space is freed on all nodes"
    assert [files for _, files in values(model.tries(partial(jobs.stage, "org/model"))[0])] == [sha256s(FILES)] * 4


MANY = {"big.bin": os.urandom(3 << 20), **{f"small{number}.bin": os.urandom(50_000) for number in range(40)}}


@pytest.mark.parametrize("little_disk", ["8m"], indirect=True)
def test_a_disk_that_another_process_fills_during_the_transfer(nodes: Nodes, little_disk: Path) -> None:
    """The same error on all ranks; the next call resumes."""
    nodes.hub.add_repo("org/many", MANY)
    nodes.hub.faults.add(Fault(kind="content", bytes_per_second=1e6, times=None))
    with nodes.start(jobs.each, partial(jobs.stage, "org/many")) as ranks:
        while nodes.hub.content_bytes() < 1e6:
            time.sleep(0.05)
        with contextlib.suppress(OSError), (little_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(1 << 12)):
                pass
        gots = [outcome.get()[0] for outcome in ranks.outcomes(60)]
    failed_alike(gots, NoSpace, "transfer", {2}, "No space left on device")
    check_cache(nodes.cache(0), failed=True)
    check_cache(little_disk, failed=True)
    (little_disk / "filler").unlink()
    nodes.hub.faults.clear()
    (after,) = nodes.tries(partial(jobs.stage, "org/many"))
    assert [files for _, files in values(after)] == [sha256s(MANY)] * 4
    # Bytes for a file that could not be written are lost: up to four connections of two leaders.
    assert nodes.hub.content_bytes() <= sum(map(len, MANY.values())) + 8 * 50_000


def test_a_cache_that_one_node_may_not_write(model: Nodes) -> None:
    leaders = (0, 2)
    folders = [model.cache(leader, case) for case, leader in enumerate(leaders)]
    for folder in folders:
        folder.mkdir()
        folder.chmod(0o555)
    calls = (
        partial(jobs.as_nobody, partial(jobs.stage, "org/model")),
        partial(jobs.stage, "org/little"),
        partial(jobs.stage, __file__),
    )
    by_case = model.cases(calls, calls)
    for case, (leader, folder, (gots, after, local)) in enumerate(zip(leaders, folders, by_case, strict=True)):
        for error in (gots, after):
            failed_alike(error, CollectError, "transfer", {leader}, "Permission denied", str(folder))
        values(local)  # needs no cache
        folder.chmod(0o755)
        check_cache(model.cache(0, case), failed=True)
        check_cache(model.cache(2, case), failed=True)


def test_a_complete_read_only_cache_is_enough(model: Nodes) -> None:
    model.run(jobs.stage, "org/model")
    folders = [folder for rank in (0, 2) for folder, _, _ in os.walk(model.cache(rank))]
    for folder in folders:
        Path(folder).chmod(0o555)
    try:
        (gots,) = model.tries(partial(jobs.as_nobody, partial(jobs.stage, "org/model")))
    finally:
        for folder in folders:
            Path(folder).chmod(0o755)
    assert [files for _, files in values(gots)] == [sha256s(FILES)] * 4


def test_a_cache_that_is_a_file_on_one_node(model: Nodes) -> None:
    leaders = (0, 2)
    files = [model.cache(leader, case) for case, leader in enumerate(leaders)]
    for file in files:
        file.write_text("not a folder")
    calls = (partial(jobs.stage, "org/model"), partial(jobs.stage, __file__))
    by_case = model.cases(calls, calls)
    for case, (leader, file, (gots, local)) in enumerate(zip(leaders, files, by_case, strict=True)):
        # The ranks of this node share no folder, so each leads itself.
        failed_alike(gots, CollectError, "transfer", {leader, leader + 1}, str(file))
        values(local)
        check_cache(model.cache(2 - leader, case), failed=True)


def test_a_folder_of_links_that_cannot_be_made_on_one_rank(model: Nodes) -> None:
    (model.place / "file").write_text("")
    bad = partial(jobs.stage, "org/model", to=model.place / "file/links")
    good = partial(jobs.stage, "org/model", to=model.place / "links")
    gots, after = model.tries(partial(jobs.by_rank, {3: bad}, good), good)
    failed_alike(gots, CollectError, "agree", {3}, "Not a directory")
    values(after)


def test_a_folder_in_the_way_of_a_link(model: Nodes) -> None:
    into = model.place / "links"
    (into / "a.ckpt").mkdir(parents=True)
    paths = {"a": "org/model/small.ckpt"}
    gots, after = model.tries(partial(jobs.collect, paths, into), partial(jobs.collect, {"b": paths["a"]}, into))
    failed_alike(gots, BadRequest, "link", {0}, "a folder is in the way", str(into / "a.ckpt"))
    assert [path.name for path in into.iterdir() if path.name != "a.ckpt"] == ["b.ckpt"]
    values(after)


def unreadable(folder: Path, what: str) -> Path:
    folder.mkdir()
    path = folder / "bad.ckpt"
    if what == "dangling":
        path.symlink_to("nowhere")
    elif what == "empty folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path)
    elif what == "mode 000":
        path.write_bytes(b"abc")
        path.chmod(0)
    elif what == "below a file":
        path.write_bytes(b"abc")
        path = path / "w.bin"
    return path


def test_an_unreadable_path(model: Nodes) -> None:
    expected: list[tuple[Any, str, type[CollectError], str, set[int], str]] = [
        (jobs.stage, "missing", SourceNotFound, "resolve", {0}, "no such"),
        (jobs.stage, "dangling", SourceNotFound, "resolve", {0}, ""),
        (jobs.stage, "pipe", CollectError, "resolve", {0}, ""),
        (jobs.stage, "empty folder", BadRequest, "resolve", {0}, "it has no files"),
        (jobs.stage, "mode 000", CollectError, "link", ALL, "Permission denied"),
        (jobs.collect, "missing", SourceNotFound, "resolve", {0}, "no such"),
        (jobs.collect, "dangling", SourceNotFound, "resolve", {0}, "broken symbolic link to nowhere"),
        (jobs.collect, "loop", CollectError, "resolve", {0}, ""),
        (jobs.collect, "empty folder", BadRequest, "resolve", {0}, "it has no files"),
        (jobs.collect, "pipe", BadRequest, "resolve", {0}, "neither a file nor a folder"),
        (jobs.collect, "below a file", SourceNotFound, "resolve", {0}, "no such"),
        (jobs.collect, "mode 000", CollectError, "link", ALL, "Permission denied"),
    ]
    paths = [str(unreadable(model.place / f"case{case}", what)) for case, (_, what, *_) in enumerate(expected)]
    calls = [
        partial(call, path) if call is jobs.stage else partial(call, {"a": path})
        for path, (call, *_) in zip(paths, expected, strict=True)
    ]
    by_case = model.cases(*((partial(jobs.as_nobody, call), partial(jobs.stage, "org/little")) for call in calls))
    for path, (_, _, kind, phase, ranks, text), (gots, after) in zip(paths, expected, by_case, strict=True):
        failed_alike(gots, kind, phase, ranks, text, path.partition("/w.bin")[0])
        values(after)


def test_a_folder_without_weights(model: Nodes) -> None:
    (model.place / "bad.ckpt").mkdir()
    (model.place / "bad.ckpt/w.bin").write_bytes(b"abc")
    call = partial(jobs.load, {"model": str(model.place / "bad.ckpt")}, jobs.only_model)
    gots, after = model.tries(call, partial(jobs.stage, "org/little"))
    failed_alike(gots, LoadError, "load", ALL, "bad.ckpt", "holds no weights")
    values(after)
