"""Other caches: a tier is used in place, and the user's Hugging Face cache is read before the network."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download

from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, check_cache, failed_alike, sha256s, values
from weightferry.cache.evict import evict
from weightferry.cache.layout import CacheLayout
from weightferry.errors import BadRequest, OriginUnreachable

NOWHERE = "http://127.0.0.1:9"
FILES = {"config.json": b"{}", "w/model.bin": os.urandom(3 << 20), "w/other.bin": os.urandom(2 << 20)}
SIZE = sum(map(len, FILES.values()))


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the state of every file below a folder, to detect changes."""
    status = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {str(path): (stat.st_mtime_ns, stat.st_size) for path, stat in status.items()}


def staged(nodes: Nodes, source: str = "org/model", **options: Any) -> list[dict[str, str]]:
    (gots,) = nodes.tries(partial(jobs.stage, source, **options))
    return [files for _, files in values(gots)]


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", FILES)
    return nodes


class TestTier:
    @pytest.fixture
    def tier(self, model: Nodes) -> Path:
        folder = model.place / "tier"
        model.run(partial(jobs.stage, "org/model", cache_dir=folder), world_size=1)
        model.variables["WEIGHTFERRY_CACHE_TIERS"] = f"{model.place}/none,{folder}"
        model.hub.reset()
        return folder

    def test_a_tier_is_used_in_place(self, model: Nodes, tier: Path) -> None:
        before = tree(tier)
        assert staged(model) == [sha256s(FILES)] * 4
        assert model.hub.content_bytes() == 0
        assert tree(tier) == before
        for rank in (0, 2):
            hub = model.cache(rank) / "hub"
            assert not list(hub.glob("*/blobs/*")), "no content is copied"
            assert scan_cache_dir(hub).warnings == []
            found = hf_hub_download("org/model", "w/model.bin", cache_dir=hub, local_files_only=True)
            assert Path(found).resolve().is_relative_to(tier)

    def test_a_read_only_tier(self, model: Nodes, tier: Path) -> None:
        folders = [path for path in (tier, *tier.rglob("*")) if path.is_dir() and not path.is_symlink()]
        for folder in folders:
            folder.chmod(0o555)
        (gots,) = model.tries(partial(jobs.as_nobody, partial(jobs.stage, "org/model")))
        assert [files for _, files in values(gots)] == [sha256s(FILES)] * 4
        for folder in folders:
            folder.chmod(0o755)

    def test_missing_and_damaged_files_of_a_tier_are_downloaded(self, model: Nodes, tier: Path) -> None:
        (blobs,) = tier.glob("hub/*/blobs")
        big = next(path for path in blobs.iterdir() if path.stat().st_size == 3 << 20)
        big.write_bytes(bytes(3 << 20))
        model.hub.add_repo("org/model", {**FILES, "config.json": b"{2}"})
        before = tree(tier)
        assert staged(model) == [sha256s({**FILES, "config.json": b"{2}"})] * 4
        assert model.hub.content_bytes() == (3 << 20) + 3
        assert tree(tier) == before
        for rank in (0, 2):
            assert len(check_cache(model.cache(rank))) == 2

    def test_files_in_the_tier_of_one_node_reach_the_other_nodes(self, model: Nodes, tier: Path) -> None:
        for rank in (2, 3):
            model.by_rank[rank] = {"WEIGHTFERRY_CACHE_TIERS": ""}
        assert staged(model) == [sha256s(FILES)] * 4
        assert model.hub.content_bytes() == 0
        assert len(check_cache(model.cache(2))) == 3

    def test_a_tier_that_disappears(self, model: Nodes, tier: Path) -> None:
        staged(model)
        shutil.rmtree(tier)
        assert staged(model) == [sha256s(FILES)] * 4
        assert model.hub.content_bytes() == SIZE

    def test_eviction_does_not_touch_a_tier(self, model: Nodes, tier: Path) -> None:
        staged(model)
        before = tree(tier / "hub")
        evict(CacheLayout(model.cache(0)), -1)
        assert tree(tier / "hub") == before
        assert staged(model) == [sha256s(FILES)] * 4
        assert model.hub.content_bytes() == 0

    def test_a_tier_that_every_user_may_write_to(self, model: Nodes, tier: Path) -> None:
        tier.chmod(0o777)
        (gots,) = model.tries(partial(jobs.stage, "org/model"))
        failed_alike(gots, BadRequest, "agree", {0, 1, 2, 3}, "every user may write", str(tier))


@pytest.fixture
def user_cache(model: Nodes) -> Path:
    """The user's Hugging Face cache with the model. All nodes see it."""
    folder = model.place / "huggingface" / "hub"
    snapshot_download("org/model", cache_dir=folder, endpoint=model.hub.url)
    model.variables["HF_HUB_CACHE"] = str(folder)
    model.hub.reset()
    return folder


class TestUserCache:
    def test_the_user_cache_is_read_before_the_network(self, model: Nodes, user_cache: Path) -> None:
        before = tree(user_cache)
        (gots,) = model.tries(partial(jobs.report, "org/model"))
        total = values(gots)[0]["total"]
        assert (total["copied_bytes"], total["origin_bytes"], total["peer_bytes"]) == (SIZE, 0, SIZE), "read once"
        assert model.hub.content_bytes() == 0
        assert tree(user_cache) == before
        for rank in (0, 2):
            assert len(check_cache(model.cache(rank))) == 3
            assert not any(path.is_symlink() for path in model.cache(rank).glob("hub/*/blobs/*"))

    def test_one_node_has_the_files_and_no_node_a_network(self, model: Nodes, user_cache: Path) -> None:
        lock = str(model.place / "weights.lock")
        model.run(jobs.command, model.place, "prefetch", "org/model", "--lockfile", lock, world_size=1)
        shutil.rmtree(model.cache(0))
        model.variables["HF_ENDPOINT"] = NOWHERE
        for rank in (0, 1):
            model.by_rank[rank] = {"HF_HUB_CACHE": str(model.place / "empty")}
        assert staged(model, lockfile=lock) == [sha256s(FILES)] * 4

    def test_wrong_bytes_in_the_user_cache(self, model: Nodes, user_cache: Path) -> None:
        for name, content in FILES.items():
            (user_cache / f"models--org--model/snapshots/{model.hub.commit('org/model')}/{name}").resolve().write_bytes(
                bytes(len(content))
            )
        assert staged(model) == [sha256s(FILES)] * 4
        assert model.hub.content_bytes() == SIZE

    def test_the_user_cache_is_the_cache_itself(self, model: Nodes) -> None:
        model.variables["HF_HUB_CACHE"] = str(model.cache(0) / "hub")
        for rank in (2, 3):
            model.by_rank[rank] = {"HF_HUB_CACHE": str(model.cache(2) / "hub")}
        assert staged(model) == [sha256s(FILES)] * 4
        assert model.hub.content_bytes() == SIZE


class TestOffline:
    @pytest.fixture(autouse=True)
    def _offline(self, model: Nodes) -> None:
        model.variables["HF_HUB_OFFLINE"] = "1"

    def test_files_of_the_cache(self, model: Nodes) -> None:
        model.variables["HF_HUB_OFFLINE"] = ""
        staged(model)
        model.variables["HF_HUB_OFFLINE"] = "1"
        model.hub.reset()
        assert staged(model) == [sha256s(FILES)] * 4
        (gots,) = model.tries(partial(jobs.collect, {"m": "org/model/w/model.bin"}))
        assert [found["m"][1] for found in values(gots)] == [sha256s(FILES)["w/model.bin"]] * 4
        assert model.hub.requests == []

    def test_files_of_the_user_cache(self, model: Nodes, user_cache: Path) -> None:
        assert staged(model) == [sha256s(FILES)] * 4
        assert model.hub.requests == []

    def test_files_that_only_another_node_has(self, model: Nodes, user_cache: Path) -> None:
        for rank in (0, 1):
            model.by_rank[rank] = {"HF_HUB_CACHE": str(model.place / "empty")}
        assert staged(model) == [sha256s(FILES)] * 4
        assert model.hub.requests == []

    def test_content_that_was_deleted_on_one_node(self, model: Nodes) -> None:
        model.variables["HF_HUB_OFFLINE"] = ""
        staged(model)
        model.variables["HF_HUB_OFFLINE"] = "1"
        max(model.cache(0).glob("hub/*/blobs/*"), key=lambda path: path.stat().st_size).unlink()
        assert staged(model) == [sha256s(FILES)] * 4

    def test_content_that_was_deleted_everywhere(self, model: Nodes, user_cache: Path) -> None:
        (user_cache / f"models--org--model/snapshots/{model.hub.commit('org/model')}/w/model.bin").resolve().unlink()
        gots, other = model.tries(partial(jobs.stage, "org/model"), partial(jobs.stage, "org/model/w/other.bin"))
        failed_alike(gots, OriginUnreachable, "resolve", {0}, "lacks the content of w/model.bin")
        values(other)

    def test_two_caches_have_parts_of_one_commit(self, model: Nodes, user_cache: Path) -> None:
        model.variables["HF_HUB_OFFLINE"] = ""
        staged(model, allow_patterns="*.json")
        model.variables["HF_HUB_OFFLINE"] = "1"
        assert staged(model) == [sha256s(FILES)] * 4

    def test_files_that_no_node_has(self, model: Nodes, user_cache: Path) -> None:
        gots, part, index = model.tries(
            partial(jobs.stage, "org/modle"),
            partial(jobs.stage, "org/model/w/none.bin"),
            partial(jobs.stage, "org/model", revision="v2"),
        )
        climbing, *_ = model.tries(partial(jobs.stage, "org/model", revision="../../../x"))
        failed_alike(climbing, BadRequest, "resolve", {0}, "must be a relative path")
        failed_alike(gots, OriginUnreachable, "resolve", {0}, "HF_HUB_OFFLINE is set", "did you mean org/model?")
        failed_alike(part, OriginUnreachable, "resolve", {0}, "HF_HUB_OFFLINE is set")
        failed_alike(index, OriginUnreachable, "resolve", {0}, "HF_HUB_OFFLINE is set")
        assert max(got.seconds for got in (*gots, *part, *index)) < 20
        assert model.hub.requests == []

    def test_a_lock_file_names_what_is_missing(self, model: Nodes) -> None:
        model.variables["HF_HUB_OFFLINE"] = ""
        lock = str(model.place / "weights.lock")
        model.run(jobs.command, model.place, "prefetch", "org/model", "--lockfile", lock, world_size=1)
        model.variables["HF_HUB_OFFLINE"] = "1"
        model.hub.reset()
        (gots,) = model.tries(partial(jobs.stage, "org/model", lockfile=lock, cache_dir=model.place / "cold"))
        text = failed_alike(gots, OriginUnreachable, "transfer", {0}, "no node has 3 files", "HF_HUB_OFFLINE is set")
        assert all(name in text for name in FILES)
        assert model.hub.requests == []
