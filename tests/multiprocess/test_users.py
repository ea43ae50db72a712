"""Two users and one cache: a private cache stays private, and a group's cache works for both, whatever their umask."""

from __future__ import annotations

import grp
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, failed_alike, sha256s, values
from weightferry.cache.evict import evict
from weightferry.cache.layout import CacheLayout
from weightferry.errors import BadRequest
from weightferry.testing.hub import Fault, HubServer

ANNE, BERT = 4242, 4343
GROUP = grp.getgrgid(100)
FILES = {"a.json": b"{}", "w/model.bin": os.urandom(3 << 20), "w/other.bin": os.urandom(2 << 20)}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Nodes in a folder that every user may enter. Only root may enter pytest's own folders."""
    need(os.geteuid() == 0, "this test needs the right to become another user: run it as root")
    with HubServer() as hub, tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        hub.add_repo("org/warm", {"config.json": b"{}", "model.bin": bytes(2 << 20)})
        hub.add_repo("org/model", FILES)
        hub.add_repo("org/second", {**FILES, "a.json": b"{2}"})
        yield Nodes(hub, Path(folder))


@pytest.fixture
def shared(nodes: Nodes) -> Nodes:
    nodes.variables["WEIGHTFERRY_CACHE_GROUP"] = GROUP.gr_name
    return nodes


def anne(call: Any) -> Any:
    return partial(jobs.as_user, call, ANNE, ANNE, GROUP.gr_gid)


def bert(call: Any) -> Any:
    return partial(jobs.as_user, call, BERT, BERT, GROUP.gr_gid, umask=0o022)


def stage(nodes: Nodes, who: Any, source: str = "org/model") -> list[Any]:
    return nodes.tries(who(partial(jobs.stage, source)), world_size=2)[0]


def test_another_user_cannot_read_a_private_cache(nodes: Nodes) -> None:
    values(stage(nodes, anne))
    root = nodes.cache(0)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for path in root.rglob("*"):
        assert path.is_symlink() or path.suffix == ".lock" or path.stat().st_mode & 0o007 == 0, path
    (path, _), _ = values(stage(nodes, anne))
    gots, refused = nodes.tries(
        partial(jobs.as_user, (path / "w/model.bin").read_bytes, BERT, BERT, GROUP.gr_gid),
        partial(jobs.stage, "org/model"),
        world_size=2,
    )
    assert {type(got.error) for got in gots} == {PermissionError}
    failed_alike(refused, BadRequest, "agree", {0, 1}, f"belongs to user {ANNE}")


def test_a_readable_cache_of_another_user(nodes: Nodes) -> None:
    """The other user may read the cache. It is refused anyway."""
    values(stage(nodes, anne))
    nodes.cache(0).chmod(0o755)
    failed_alike(stage(nodes, bert), BadRequest, "agree", {0, 1}, f"belongs to user {ANNE}")


def test_a_group_reuses_the_files_of_every_member(shared: Nodes) -> None:
    first = values(stage(shared, anne))
    assert [files for _, files in first] == [sha256s(FILES)] * 2
    shared.hub.reset()
    assert values(stage(shared, bert)) == first
    assert shared.hub.content_bytes("other.bin") == 0, "no file was downloaded again"
    values(stage(shared, bert, "org/second"))
    assert [files for _, files in values(stage(shared, anne, "org/second"))] == [
        sha256s({**FILES, "a.json": b"{2}"})
    ] * 2

    root = shared.cache(0)
    for path in (root, *root.rglob("*")):
        seen = path.lstat()
        if not path.is_symlink():
            assert seen.st_gid == GROUP.gr_gid, path
            assert seen.st_mode & 0o007 == 0 or path.suffix == ".lock", path
            assert seen.st_mode & stat.S_IWGRP, path


def test_a_group_member_resumes_the_partial_data_of_another(shared: Nodes) -> None:
    shared.hub.faults.add(Fault(kind="content", path_suffix="w/model.bin", bytes_per_second=1e6, times=None))
    with shared.start(anne(partial(jobs.stage, "org/model")), world_size=2):
        while shared.hub.content_bytes("w/model.bin") < 2 << 20:
            time.sleep(0.05)
    # The job is killed at the end of this context.
    shared.hub.faults.clear()
    shared.hub.reset()
    assert [files for _, files in values(stage(shared, bert))] == [sha256s(FILES)] * 2
    assert shared.hub.content_bytes("w/model.bin") <= 2 << 20


def test_a_group_member_evicts_the_files_of_every_member(shared: Nodes) -> None:
    values(stage(shared, anne))
    values(stage(shared, bert, "org/second"))
    layout = CacheLayout(shared.cache(0))
    (gone,) = shared.run(partial(jobs.as_user, partial(evict, layout, 0), BERT, BERT, GROUP.gr_gid), world_size=1)
    assert {one.source for one in gone} == {"org/model", "org/second"}
    values(stage(shared, anne))


def test_only_the_owner_removes_a_pin(shared: Nodes) -> None:
    values(stage(shared, anne))

    def command(who: int, *words: str) -> tuple[int, str, str]:
        call = partial(jobs.command, shared.place, "cache", *words, "org/model")
        (done,) = shared.run(partial(jobs.as_user, call, who, who, GROUP.gr_gid), world_size=1)
        return done  # type: ignore[no-any-return]

    assert command(ANNE, "pin")[0] == 0
    for path in shared.place.glob("rank0.*"):
        path.unlink()
    code, _, stderr = command(BERT, "unpin")
    assert (code, f"pinned by user id {ANNE}" in stderr) == (1, True), stderr
    layout = CacheLayout(shared.cache(0))
    assert evict(layout, 0) == [], "root does not evict a pinned source either"


def test_an_unknown_group(nodes: Nodes) -> None:
    nodes.variables["WEIGHTFERRY_CACHE_GROUP"] = "no-such-group"
    failed_alike(stage(nodes, anne), BadRequest, "agree", {0, 1}, "no group 'no-such-group'")
