"""Pretrainer on several ranks: collect, link and load, with the same or different files per rank."""

from __future__ import annotations

import hashlib
import os
import sys
from functools import partial
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, check_cache, failed_alike, values
from weightferry.errors import PlanMismatch
from weightferry.sources import FetchFrom, FetchSource

A, B = b"a" * 1000, b"b" * 2000
DIGEST = {name: hashlib.sha256(content).hexdigest() for name, content in (("a", A), ("b", B))}


@pytest.fixture
def files(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", {"a.ckpt": A, "b.ckpt": B})
    return nodes


def weights() -> dict[str, torch.Tensor]:
    """Return a state for `jobs.network`."""
    numbers = torch.Generator().manual_seed(7)
    shapes = {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (4, 16), "2.bias": (4,)}
    return {name: torch.rand(shape, generator=numbers) for name, shape in shapes.items()}


def momentum() -> dict[str, Any]:
    """Return a state for the optimizer of `jobs.plain_module`, made by hand: importing one takes five seconds."""
    buffers = {number: {"momentum_buffer": -value} for number, value in enumerate(weights().values())}
    switches = dict.fromkeys(("nesterov", "maximize", "differentiable"), False) | {"foreach": None, "fused": None}
    group = {"lr": 0.25, "momentum": 0.9, "dampening": 0, "weight_decay": 0, **switches, "params": [0, 1, 2, 3]}
    return {"state": buffers, "param_groups": [group]}


def test_every_rank_loads_the_published_values(nodes: Nodes) -> None:
    """From two formats, with a folder of links and without; four cases with empty caches."""
    contents = {"safetensors": save(weights()), "pickle": jobs.saved(weights())}
    nodes.hub.add_repo("org/model", {f"{kind}/model.any": content for kind, content in contents.items()})
    calls = [
        partial(jobs.load, {"model": f"org/model/{kind}/model.any"}, jobs.only_model, into)
        for kind in contents
        for into in (nodes.place / f"links-{kind}", None)
    ]
    for case, (loaded,) in enumerate(nodes.cases(*([call] for call in calls))):
        assert values(loaded) == [{"model": {name: value.tolist() for name, value in weights().items()}}] * 4
        for rank in (0, 2):
            check_cache(nodes.cache(rank, case))
    for kind, content in contents.items():
        assert nodes.hub.content_bytes(f"{kind}/model.any") == 2 * len(content), "once for each of two cases"


def test_a_module_and_its_optimizer(nodes: Nodes) -> None:
    nodes.ranks_a_node = 1
    nodes.hub.add_repo("org/model", {"model.safetensors": save(weights()), "optimizer.bin": jobs.saved(momentum())})
    paths = {"model": "org/model/model.safetensors", "optimizer": "org/model/optimizer.bin"}
    first, second = nodes.run(jobs.load, paths, jobs.plain_module, world_size=2)
    assert first == second
    assert first["model"] == {name: value.tolist() for name, value in weights().items()}
    state = first["optimizer"]
    assert [one["momentum_buffer"] for one in state["state"].values()] == [(-v).tolist() for v in weights().values()]
    assert state["param_groups"][0]["lr"] == 0.25


def test_a_module_in_ddp(nodes: Nodes) -> None:
    nodes.ranks_a_node = 1
    nodes.hub.add_repo("org/model", {"model.ckpt": jobs.saved(weights())})
    loaded = nodes.run(jobs.load, {"model": "org/model/model.ckpt"}, jobs.ddp_module, nodes.place / "in", world_size=2)
    assert loaded == [{"model": {f"module.{name}": value.tolist() for name, value in weights().items()}}] * 2


def test_one_folder_of_links_for_all_ranks(files: Nodes) -> None:
    into = files.place / "a/new/folder"
    (gots,) = files.tries(partial(jobs.collect, {"a": "org/model/a.ckpt", "b": None}, into, "org/model"))
    assert values(gots) == [{name: (into / f"{name}.ckpt", DIGEST[name]) for name in "ab"}] * 4
    assert sorted(path.name for path in into.iterdir()) == ["a.ckpt", "b.ckpt"]
    assert len(files.hub.metadata_requests) == 1
    assert files.hub.content_bytes() == (len(A) + len(B))


def test_a_folder_of_links_per_node(files: Nodes) -> None:
    (gots,) = files.tries(partial(collect_per_node, files.place))
    assert values(gots) == [{"a": (files.place / f"links{rank // 2}/a.ckpt", DIGEST["a"])} for rank in range(4)]
    for rank in (0, 2):
        assert (files.place / f"links{rank // 2}/a.ckpt").resolve().is_relative_to(files.cache(rank))


def collect_per_node(place: Path) -> object:
    return jobs.collect({"a": "org/model/a.ckpt"}, place / f"links{jobs.rank() // 2}")


def test_a_second_collect_changes_no_link(files: Nodes) -> None:
    into = files.place / "links"
    files.run(jobs.collect, {"a": "org/model/a.ckpt"}, into)
    before = (into / "a.ckpt").lstat()
    files.run(jobs.collect, {"a": "org/model/a.ckpt"}, into)
    after = (into / "a.ckpt").lstat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_old_file_and_a_dangling_link_are_replaced(files: Nodes) -> None:
    into = files.place / "links"
    into.mkdir()
    (into / "a.ckpt").write_bytes(b"old")
    (into / "b.ckpt").symlink_to("nowhere")
    (gots,) = files.tries(partial(jobs.collect, {"a": None, "b": None}, into, "org/model"))
    assert values(gots) == [{name: (into / f"{name}.ckpt", DIGEST[name]) for name in "ab"}] * 4


def test_ranks_that_want_different_files_get_their_own(files: Nodes) -> None:
    folders = (files.place / "links", None)
    pairs = [[partial(jobs.collect, {name: f"org/model/{name}.ckpt"}, folder) for name in "ab"] for folder in folders]
    by_case = files.cases(*([partial(jobs.by_rank, {0: first, 1: first}, last)] for first, last in pairs))
    for folder, (gots,) in zip(folders, by_case, strict=True):
        for rank, found in enumerate(values(gots)):
            name = "ab"[rank // 2]
            assert {key: digest for key, (_, digest) in found.items()} == {name: DIGEST[name]}
            assert found[name][0] == (folder / f"{name}.ckpt" if folder else found[name][0])
    # Every node stages the files of all ranks, once for each case.
    assert files.hub.content_bytes() == 2 * (len(A) + len(B))


def test_a_rank_without_files_takes_part(files: Nodes) -> None:
    call = partial(jobs.collect, {"a": "org/model/a.ckpt"})
    (gots,) = files.tries(partial(jobs.by_rank, {2: partial(jobs.collect, {})}, call))
    assert [list(found) for found in values(gots)] == [["a"], ["a"], [], ["a"]]


def test_one_name_with_two_sources_is_an_error_that_names_two_ranks(files: Nodes) -> None:
    into = files.place / "links"
    one, other = (partial(jobs.collect, {"x": f"org/model/{name}.ckpt"}, into) for name in "ab")
    good = partial(jobs.collect, {"a": None}, into, "org/model")
    gots, after = files.tries(partial(jobs.by_rank, {3: other}, one), good)
    failed_alike(gots, PlanMismatch, "agree", {0}, "a.ckpt on rank 0", "b.ckpt on rank 3")
    assert [path.name for path in into.iterdir()] == ["a.ckpt"]
    values(after)


def test_one_name_with_two_sources_in_two_folders_is_none(files: Nodes) -> None:
    one, other = (partial(jobs.collect, {"x": f"org/model/{n}.ckpt"}, files.place / f"links-{n}") for n in "ab")
    (gots,) = files.tries(partial(jobs.by_rank, {3: other}, one))
    assert [found["x"][1] for found in values(gots)] == [DIGEST["a"]] * 3 + [DIGEST["b"]]


def test_without_ddp_handling_a_rank_does_not_wait(files: Nodes) -> None:
    alone = partial(jobs.collect, {"a": "org/model/a.ckpt"}, internal=False)
    first, together = files.tries(
        partial(jobs.by_rank, {2: alone}, dict), partial(jobs.collect, {"b": "org/model/b.ckpt"})
    )
    assert values(first)[2]["a"][1] == DIGEST["a"]
    assert [found["b"][1] for found in values(together)] == [DIGEST["b"]] * 4
    assert files.hub.content_bytes("a.ckpt") == len(A)


def test_a_local_source_is_used_where_it_is(files: Nodes) -> None:
    (files.place / "local").mkdir()
    (files.place / "local/a.ckpt").write_bytes(A)
    source = FetchSource(FetchFrom.LOCAL, str(files.place / "local"))
    (gots,) = files.tries(partial(jobs.collect, {"a": None}, None, source))
    assert values(gots) == [{"a": (files.place / "local/a.ckpt", DIGEST["a"])}] * 4
    assert files.hub.requests == []


def test_ranks_that_cannot_find_each_other(files: Nodes) -> None:
    code = "import weightferry; weightferry.stage('org/model')"
    environ = {**os.environ, **files.environ(0), "RANK": "1", "WORLD_SIZE": "2"}
    done = run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert any(line.startswith("weightferry.errors.NotDistributed: torchrun started 2 ranks") for line in lines), lines
    assert any("set MASTER_ADDR to its address" in line for line in lines), lines
    assert files.hub.requests == []
