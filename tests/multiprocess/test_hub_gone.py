"""The Hub cannot be reached, or need not be asked: what the caches know is right on every rank, and never a guess."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess import jobs
from tests.multiprocess.jobs import Got
from tests.multiprocess.nodes import Nodes, check_cache, failed_alike, sha256s, values
from weightferry.cache.layout import CacheLayout
from weightferry.errors import AccessDenied, OriginError, OriginUnreachable, SourceNotFound
from weightferry.testing.hub import Fault

NOWHERE = "http://127.0.0.1:9"
FILES = {"config.json": b"{}", "w/model.bin": os.urandom(3 << 20), "w/other.bin": os.urandom(2 << 20)}
MOVED = {**FILES, "config.json": b'{"moved": 1}'}
LIMIT = 5.0
"""Seconds that a staged branch or commit may take when the Hub is gone."""


@pytest.fixture
def nodes(nodes: Nodes) -> Nodes:
    """Two nodes with one rank each."""
    nodes.ranks_a_node = 1
    return nodes


@pytest.fixture
def staged(nodes: Nodes) -> Nodes:
    """The branch `main`, staged on two nodes with disks of their own."""
    nodes.hub.add_repo("org/model", FILES)
    nodes.hub.add_tag("org/model", "v1")
    nodes.run(jobs.stage, "org/model", world_size=2)
    nodes.hub.reset()
    return nodes


def stage(nodes: Nodes, source: str = "org/model", **options: Any) -> list[Got]:
    """Stage on every rank; each value is the files of that rank and its warnings."""
    (gots,) = nodes.tries(partial(jobs.warned, partial(jobs.stage, source, **options)), world_size=2)
    return gots


def right(gots: Sequence[Got], files: Mapping[str, bytes] = FILES) -> list[str]:
    """Check that every rank has these files at one commit, and return the warnings of all ranks."""
    found = values(gots)
    assert [read for (_, read), _ in found] == [sha256s(files)] * len(gots)
    assert len({path.name for (path, _), _ in found}) == 1, "one commit"
    return [text for _, texts in found for text in texts]


def warned_once(texts: Sequence[str], commit: str, branch: str = "main") -> None:
    """Check that the whole job warned once, with repository, branch, commit and date."""
    (text,) = texts
    assert re.search(rf"hf://org/model\b.*{branch}.*{commit}.*{time.strftime('%Y', time.gmtime())}-\d\d-\d\d", text)


def stage_twice(nodes: Nodes, source: str = "org/model", *, world_size: int = 2, **options: Any) -> list[str]:
    """Stage in a new process and again in the same process, check both, and return the warnings of the first call.

    The limit is for the second call: the first one imports packages, which takes long on a busy machine.
    """
    call = partial(jobs.warned, partial(jobs.stage, source, **options))
    first, second = nodes.tries(call, call, world_size=world_size)
    texts = right(first)
    assert len(right(second)) == len(texts)
    seconds = [max(got.seconds for got in gots) for gots in (first, second)]
    print(f"{source} on {world_size} ranks: {seconds[0]:.1f} s in a new process, then {seconds[1]:.1f} s")
    assert seconds[1] < LIMIT
    return texts


def own_metadata(nodes: Nodes, rank: int) -> list[Path]:
    return sorted((nodes.cache(rank) / "manifests").rglob("*.json"))


class TestNothingIsAsked:
    """A commit id whose files the caches know."""

    def test_a_commit_that_every_node_has(self, staged: Nodes) -> None:
        assert right(stage(staged, revision=staged.hub.commit("org/model"))) == []
        assert staged.hub.requests == []

    @pytest.mark.parametrize("node", [0, 1])
    def test_a_node_without_the_files_gets_them_from_the_other(self, staged: Nodes, node: int) -> None:
        commit = staged.hub.commit("org/model")
        lost = staged.cache(node)
        shutil.rmtree(lost / "hub")
        assert right(stage(staged, revision=commit)) == []
        assert staged.hub.requests == []
        check_cache(lost)

    def test_another_node_learns_what_the_files_of_the_commit_are(self, staged: Nodes) -> None:
        commit = staged.hub.commit("org/model")
        shutil.rmtree(staged.cache(1))
        right(stage(staged, revision=commit))
        assert [path.parent.name for path in own_metadata(staged, 1)] == [commit]
        shutil.rmtree(staged.cache(0))
        staged.hub.close()
        assert right(stage(staged, revision=commit)) == []

    def test_files_that_no_node_has_come_from_the_origin(self, nodes: Nodes) -> None:
        nodes.hub.add_repo("org/model", FILES)
        commit = nodes.hub.commit("org/model")
        assert right(stage(nodes, allow_patterns="*.json"), {"config.json": b"{}"}) == []
        nodes.hub.reset()
        assert right(stage(nodes, revision=commit)) == []
        assert nodes.hub.metadata_requests == [], "the listing of the first call had all files"
        assert nodes.hub.content_bytes("config.json") == 0
        assert nodes.hub.content_bytes("w/model.bin") == len(FILES["w/model.bin"])

    def test_paths_that_nobody_asked_for_yet_are_looked_up(self, nodes: Nodes) -> None:
        nodes.hub.add_repo("org/model", FILES)
        commit = nodes.hub.commit("org/model")
        right(stage(nodes, f"hf://org/model@{commit}/config.json"), {"config.json": b"{}"})
        nodes.hub.reset()
        right(stage(nodes, f"hf://org/model@{commit}/w/other.bin"), {"other.bin": FILES["w/other.bin"]})
        assert len(nodes.hub.metadata_requests) == 1
        nodes.hub.reset()
        right(stage(nodes, f"hf://org/model@{commit}/w/model.bin"), {"model.bin": FILES["w/model.bin"]})
        right(stage(nodes, revision=commit))
        assert len(nodes.hub.metadata_requests) == 2
        nodes.hub.reset()
        right(stage(nodes, revision=commit))
        right(stage(nodes, f"hf://org/model@{commit}/w"), {p[2:]: FILES[p] for p in FILES if p.startswith("w/")})
        assert nodes.hub.requests == []

    def test_a_file_that_the_commit_does_not_have(self, staged: Nodes) -> None:
        gots = stage(staged, f"hf://org/model@{staged.hub.commit('org/model')}/w/modle.bin")
        failed_alike(gots, SourceNotFound, "resolve", {0}, "w/modle.bin", "did you mean w/model.bin")

    def test_an_index_of_shards(self, nodes: Nodes) -> None:
        shards = {"a.safetensors": b"a" * 2_000_000, "b.safetensors": b"b" * 2_000_000}
        index = json.dumps({"weight_map": {name[0]: name for name in shards}}).encode()
        nodes.hub.add_repo("org/model", {**shards, "model.safetensors.index.json": index, "other": b"1"})
        call = partial(jobs.collect, {"m": "org/model/model.safetensors.index.json"})
        (cold,) = nodes.tries(call, world_size=2)
        commit = nodes.hub.commit("org/model")
        nodes.hub.reset()
        at_commit = partial(jobs.collect, {"m": f"hf://org/model@{commit}/model.safetensors.index.json"})
        (warm,) = nodes.tries(at_commit, world_size=2)
        assert [got["m"][1] for got in values(warm)] == [got["m"][1] for got in values(cold)]
        assert nodes.hub.requests == []
        nodes.hub.close()
        shutil.rmtree(nodes.cache(0))
        gots, again = nodes.tries(call, at_commit, world_size=2)
        assert [got["m"][1] for got in values(gots)] == [got["m"][1] for got in values(cold)]
        assert [got["m"][1] for got in values(again)] == [got["m"][1] for got in values(cold)]


class TestOnline:
    """A branch is looked up with one request, and followed."""

    @pytest.mark.parametrize("revision", [None, "main", "v1"])
    def test_one_request(self, staged: Nodes, revision: str | None) -> None:
        right(stage(staged, revision=revision))
        staged.hub.reset()
        assert right(stage(staged, revision=revision)) == []
        # huggingface_hub 2.x asks for /api/agent-harnesses, of the kind "other", once in each process.
        assert [request.kind for request in staged.hub.requests if request.kind != "other"] == ["metadata"]

    def test_a_moved_branch_is_followed(self, staged: Nodes) -> None:
        staged.hub.add_repo("org/model", MOVED)
        assert right(stage(staged), MOVED) == []
        assert len(staged.hub.metadata_requests) == 2
        staged.hub.close()
        warned_once(right(stage(staged), MOVED), staged.hub.commit("org/model"))

    def test_a_branch_that_moved_back_is_followed(self, staged: Nodes) -> None:
        staged.hub.add_repo("org/model", MOVED)
        right(stage(staged), MOVED)
        staged.hub.add_repo("org/model", FILES)
        back = staged.hub.commit("org/model")
        assert right(stage(staged)) == []
        staged.hub.close()
        warned_once(right(stage(staged)), back)

    def test_too_many_requests_are_not_the_end_of_the_network(self, staged: Nodes) -> None:
        """The Hub is there, and says when to ask again. The branch may have moved."""
        staged.hub.add_repo("org/model", MOVED)
        staged.hub.faults.add(Fault(kind="metadata", status=429, headers={"Retry-After": "1"}))
        assert right(stage(staged), MOVED) == []

    def test_a_gateway_is_asked_before_a_cache_is_believed(self, staged: Nodes) -> None:
        staged.by_rank = {rank: {"HF_ENDPOINT": NOWHERE} for rank in (0,)}
        staged.hub.add_repo("org/model", MOVED)
        assert right(stage(staged), MOVED) == []


def refused(nodes: Nodes) -> None:
    nodes.hub.close()


def failing(nodes: Nodes) -> None:
    nodes.hub.faults.add(Fault(status=503, times=None))


def silent(nodes: Nodes) -> None:
    nodes.variables["WEIGHTFERRY_CONNECT_TIMEOUT"] = "1"
    nodes.hub.faults.add(Fault(delay=float("inf"), times=None))


@pytest.fixture
def blackhole() -> Iterator[str]:
    """An address that answers nothing: the kernel drops connections to a listener whose queue is full."""
    with ExitStack() as sockets:
        full = sockets.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(2):
            client = sockets.enter_context(socket.socket())
            client.settimeout(0.3)
            client.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"


class TestTheHubIsGone:
    @pytest.mark.parametrize("break_hub", [refused, failing, silent])
    def test_a_staged_branch_and_a_staged_commit(self, staged: Nodes, break_hub: Callable[[Nodes], None]) -> None:
        commit = staged.hub.commit("org/model")
        break_hub(staged)
        warned_once(stage_twice(staged), commit)
        assert stage_twice(staged, revision=commit) == []

    def test_two_ranks_a_node(self, staged: Nodes) -> None:
        staged.ranks_a_node = 2
        commit = staged.hub.commit("org/model")
        staged.hub.close()
        warned_once(stage_twice(staged, world_size=4), commit)
        assert stage_twice(staged, world_size=4, revision=commit) == []

    def test_packets_vanish(self, staged: Nodes, blackhole: str) -> None:
        commit = staged.hub.commit("org/model")
        staged.variables |= {"HF_ENDPOINT": blackhole, "WEIGHTFERRY_CONNECT_TIMEOUT": "1"}
        shutil.rmtree(staged.cache(1) / "hub")
        warned_once(stage_twice(staged), commit)
        shutil.rmtree(staged.cache(1) / "hub")
        assert stage_twice(staged, revision=commit) == []

    @pytest.mark.parametrize("revision", ["v1", "dev/next"])
    def test_tags_and_other_branches(self, staged: Nodes, revision: str) -> None:
        staged.hub.add_repo("org/model", MOVED, revision="dev/next")
        files = FILES if revision == "v1" else MOVED
        commit = staged.hub.commit("org/model", revision)
        right(stage(staged, revision=revision), files)
        staged.hub.close()
        warned_once(right(stage(staged, revision=revision), files), commit, revision)

    @pytest.mark.parametrize(("node", "break_hub"), [(0, refused), (1, refused), (0, failing)])
    def test_a_node_without_anything_gets_it_from_the_other(
        self, staged: Nodes, node: int, break_hub: Callable[[Nodes], None]
    ) -> None:
        break_hub(staged)
        shutil.rmtree(staged.cache(node))
        warned_once(stage_twice(staged), staged.hub.commit("org/model"))
        check_cache(staged.cache(node))

    def test_one_node(self, staged: Nodes) -> None:
        staged.hub.close()
        warned_once(stage_twice(staged, world_size=1), staged.hub.commit("org/model"))

    @pytest.mark.parametrize("newer", [0, 1])
    def test_the_commit_that_was_staged_last_wins(self, nodes: Nodes, newer: int) -> None:
        nodes.hub.add_repo("org/model", FILES)
        for node, files in ((1 - newer, FILES), (newer, MOVED)):
            nodes.hub.add_repo("org/model", files)
            nodes.run(partial(jobs.stage, "org/model", cache_dir=nodes.cache(node)), world_size=1)
        commit = nodes.hub.commit("org/model")
        nodes.hub.close()
        warned_once(right(stage(nodes), MOVED), commit)

    def test_an_older_commit_that_is_staged_by_its_id_is_not_the_branch(self, staged: Nodes) -> None:
        older = staged.hub.commit("org/model")
        staged.hub.add_repo("org/model", MOVED)
        right(stage(staged), MOVED)
        right(stage(staged, revision=older))
        staged.hub.close()
        warned_once(right(stage(staged), MOVED), staged.hub.commit("org/model"))

    def test_two_sources(self, staged: Nodes) -> None:
        staged.hub.add_repo("org/other", {"o.bin": b"o"})
        paths = {"m": "org/model/config.json", "o": "org/other/o.bin"}
        staged.tries(partial(jobs.collect, paths), world_size=2)
        staged.hub.close()
        shutil.rmtree(staged.cache(0) / "hub/models--org--other")
        shutil.rmtree(staged.cache(0) / "manifests/models--org--other")
        (gots,) = staged.tries(partial(jobs.warned, partial(jobs.collect, paths)), world_size=2)
        found = values(gots)
        assert {collected["o"][1] for collected, _ in found} == {sha256s({"o": b"o"})["o"]}
        assert sorted(text.split(":")[1] for _, texts in found for text in texts) == ["//org/model", "//org/other"]


class TestNothingIsPaperedOver:
    @pytest.mark.parametrize(("status", "kind"), [(401, AccessDenied), (403, AccessDenied), (404, SourceNotFound)])
    def test_refusals(self, staged: Nodes, status: int, kind: type[OriginError]) -> None:
        staged.hub.faults.add(Fault(kind="metadata", status=status, times=None))
        failed_alike(stage(staged), kind, "resolve", {0}, "org/model")

    def test_a_repository_that_became_private(self, staged: Nodes) -> None:
        staged.hub.add_repo("org/model", FILES, private=True, allowed_tokens=["hf_mine"])
        failed_alike(stage(staged), SourceNotFound, "resolve", {0}, "org/model")

    def test_gated_files_that_no_cache_has(self, staged: Nodes) -> None:
        staged.hub.add_repo("org/model", MOVED, gated=True, allowed_tokens=["hf_mine"])
        failed_alike(stage(staged), AccessDenied, "transfer", {0, 1}, "HTTP 401")

    def test_a_branch_that_was_removed(self, staged: Nodes) -> None:
        right(stage(staged, revision="v1"))
        with staged.hub._repositories.edit("model", "org/model") as repo:
            del repo.tags["v1"]
        failed_alike(stage(staged, revision="v1"), SourceNotFound, "resolve", {0}, "no revision 'v1'")

    @pytest.mark.parametrize("by_commit", [True, False])
    def test_files_that_no_node_has(self, staged: Nodes, by_commit: bool) -> None:
        commit = staged.hub.commit("org/model")
        staged.hub.close()
        for rank in (0, 1):
            (blob,) = [
                b
                for b in CacheLayout.blobs(staged.cache(rank) / "hub/models--org--model").iterdir()
                if b.read_bytes() == FILES["w/other.bin"]
            ]
            blob.unlink()
        gots = stage(staged, revision=commit if by_commit else None)
        text = failed_alike(gots, OriginUnreachable, "transfer", {0, 1}, "no node has 1 files")
        assert "w/other.bin" in text
        assert "w/model.bin" not in text

    def test_files_that_were_never_looked_up(self, nodes: Nodes) -> None:
        nodes.hub.add_repo("org/model", FILES)
        right(stage(nodes, "org/model/config.json"), {"config.json": b"{}"})
        nodes.hub.close()
        gots = stage(nodes, "org/model/w/model.bin")
        failed_alike(gots, OriginUnreachable, "resolve", {0}, "only config.json, and not w/model.bin")

    @pytest.mark.parametrize("break_hub", [refused, failing])
    def test_the_fallback_is_forbidden(self, staged: Nodes, break_hub: Callable[[Nodes], None]) -> None:
        staged.variables["WEIGHTFERRY_OFFLINE_FALLBACK"] = "0"
        commit = staged.hub.commit("org/model")
        break_hub(staged)
        kind = OriginUnreachable if break_hub is refused else OriginError
        failed_alike(stage(staged), kind, "resolve", {0}, "attempts in a row")
        assert right(stage(staged, revision=commit)) == [], "a commit id needs no fallback"

    def test_one_leader_forbids_the_fallback(self, staged: Nodes) -> None:
        staged.by_rank = {rank: {"WEIGHTFERRY_OFFLINE_FALLBACK": "0"} for rank in (1,)}
        staged.hub.close()
        failed_alike(stage(staged), OriginUnreachable, "resolve", {0}, "WEIGHTFERRY_OFFLINE_FALLBACK")

    def test_a_branch_that_neither_the_hub_nor_a_cache_knows(self, staged: Nodes) -> None:
        failed_alike(stage(staged, revision="dev"), SourceNotFound, "resolve", {0}, "no revision 'dev'")
        staged.hub.close()
        text = failed_alike(stage(staged, revision="dev"), OriginUnreachable, "resolve", {0}, "hf://org/model@dev")
        assert "main" in text, "what to ask for instead"
        before = own_metadata(staged, 0)
        failed_alike(stage(staged, "org/none"), OriginUnreachable, "resolve", {0}, "hf://org/none")
        assert own_metadata(staged, 0) == before
        assert not (staged.cache(0) / "hub/models--org--none").exists()

    def test_a_damaged_manifest_counts_as_none(self, staged: Nodes) -> None:
        commit = staged.hub.commit("org/model")
        for rank, text in ((0, ""), (1, '{"version": 1, "paths": [""]}')):
            for path in own_metadata(staged, rank):
                path.write_text(text)
        assert right(stage(staged, revision=commit)) == []
        assert len(staged.hub.metadata_requests) == 1
        staged.hub.close()
        assert right(stage(staged, revision=commit)) == [], "it was written again"
