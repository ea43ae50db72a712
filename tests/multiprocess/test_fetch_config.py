"""FetchConfig on two nodes with two ranks each: token, network, revision and the user's Hugging Face cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import weightferry
from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, failed_alike, values
from weightferry import BadRequest, FetchConfig, OriginUnreachable, SourceNotFound
from weightferry.errors import AccessDenied
from weightferry.testing.hub import HubServer

CONTENT = b"content" * 100_000
TOKEN, NO_ACCESS = "planted-token-without-a-prefix", "hf_valid0but0without0access"
NOWHERE = "http://127.0.0.1:9"  # nothing answers there


def collect(configs: Mapping[int, FetchConfig | None], source: str = "org/model", *, into: str = "") -> bytes:
    """Collect one file with the configuration of this rank, or of rank -1."""
    config = configs.get(jobs.rank(), configs.get(-1))
    pretrainer = weightferry.Pretrainer(Path(into) / str(jobs.rank()) if into else None, {"model": None})
    return pretrainer.collect_files(source, fetch_config=config)["model"].read_bytes()


def everywhere(**values: Any) -> Mapping[int, FetchConfig]:
    return {-1: FetchConfig(**values)}


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", {"model.ckpt": CONTENT})
    return nodes


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Nodes]:
    with HubServer(tokens=[TOKEN, NO_ACCESS]) as hub:
        hub.add_repo("org/model", {"model.ckpt": CONTENT}, private=True, allowed_tokens=[TOKEN])
        yield Nodes(hub, tmp_path)


class TestToken:
    def test_a_text(self, private: Nodes) -> None:
        (gots,) = private.tries(partial(collect, everywhere(token=TOKEN)))
        assert values(gots) == [CONTENT] * 4
        assert private.hub.content_bytes() == len(CONTENT)

    def test_a_text_on_rank_0_alone(self, private: Nodes) -> None:
        (gots,) = private.tries(partial(collect, {0: FetchConfig(token=TOKEN), -1: FetchConfig()}))
        assert values(gots) == [CONTENT] * 4
        assert private.hub.content_bytes() == len(CONTENT)

    def test_that_of_the_rank(self, private: Nodes) -> None:
        private.variables["HF_TOKEN"] = TOKEN
        gots, _ = private.tries(partial(collect, everywhere(token=True)), partial(collect, {}))
        assert values(gots) == [CONTENT] * 4

    def test_none_is_sent(self, private: Nodes) -> None:
        private.variables["HF_TOKEN"] = TOKEN
        (gots,) = private.tries(partial(collect, everywhere(token=False)))
        failed_alike(gots, SourceNotFound, "resolve", {0}, "pass FetchConfig(token=True)")
        assert private.hub.content_bytes() == 0

    def test_one_without_access(self, private: Nodes) -> None:
        private.variables["HF_TOKEN"] = TOKEN
        (gots,) = private.tries(partial(collect, everywhere(token=NO_ACCESS)))
        text = failed_alike(gots, SourceNotFound, "resolve", {0}, "the token in FetchConfig has no access")
        assert NO_ACCESS not in text

    def test_one_that_the_hub_does_not_know(self, private: Nodes) -> None:
        (gots,) = private.tries(partial(collect, everywhere(token=TOKEN[::-1])))
        text = failed_alike(gots, AccessDenied, "resolve", {0}, "the token in FetchConfig has no access")
        assert TOKEN[::-1] not in text

    def test_a_gated_repository(self, private: Nodes) -> None:
        private.hub.add_repo("org/gated", {"model.ckpt": CONTENT}, gated=True, allowed_tokens=[TOKEN])
        without, with_token = private.tries(
            partial(collect, everywhere(), "org/gated"), partial(collect, everywhere(token=TOKEN), "org/gated")
        )
        failed_alike(without, AccessDenied, "transfer", {0, 2}, "pass FetchConfig(token=True)")
        assert values(with_token) == [CONTENT] * 4


class TestNoNetwork:
    OFFLINE = everywhere(allow_network=False)

    def test_what_was_staged(self, model: Nodes) -> None:
        model.tries(partial(collect, {}))
        asked = len(model.hub.requests)
        (gots,) = model.tries(partial(collect, self.OFFLINE))
        assert values(gots) == [CONTENT] * 4
        assert len(model.hub.requests) == asked

    def test_what_one_node_has(self, model: Nodes) -> None:
        model.tries(partial(collect, {}), world_size=2)
        asked = len(model.hub.requests)
        (gots,) = model.tries(partial(collect, self.OFFLINE))
        assert values(gots) == [CONTENT] * 4
        assert len(model.hub.requests) == asked

    def test_what_no_cache_has(self, model: Nodes) -> None:
        (gots,) = model.tries(partial(collect, self.OFFLINE))
        failed_alike(
            gots, OriginUnreachable, "resolve", {0}, "allow_network of FetchConfig is False, and hf://org/model is not"
        )
        assert model.hub.requests == []

    def test_what_lost_its_content(self, model: Nodes) -> None:
        model.tries(partial(collect, {}))
        for rank in (0, 2):
            for blob in model.cache(rank).rglob("blobs/*"):
                blob.unlink()
        asked = len(model.hub.requests)
        (gots,) = model.tries(partial(collect, self.OFFLINE))
        failed_alike(gots, OriginUnreachable, "resolve", {0}, "allow_network of FetchConfig is False")
        assert len(model.hub.requests) == asked

    def test_a_url(self, model: Nodes) -> None:
        url = f"{model.hub.url}/org/model/resolve/main"
        into = str(model.place / "links")
        (gots,) = model.tries(partial(collect, self.OFFLINE, url, into=into))
        failed_alike(gots, BadRequest, "resolve", {0}, "files of a http source come over the network", "collect_in")
        assert model.hub.requests == []
        for rank in range(4):
            (model.place / f"links/{rank}/model.ckpt").write_bytes(b"placed")
        (gots,) = model.tries(partial(collect, self.OFFLINE, url, into=into))
        assert values(gots) == [b"placed"] * 4

    def test_a_local_source(self, model: Nodes) -> None:
        (model.place / "model.ckpt").write_bytes(CONTENT)
        (gots,) = model.tries(partial(collect, self.OFFLINE, str(model.place)))
        assert values(gots) == [CONTENT] * 4


def test_the_revision(model: Nodes) -> None:
    model.hub.add_tag("org/model", "v1")
    model.hub.add_repo("org/model", {"model.ckpt": b"later"})
    (gots,) = model.tries(partial(collect, everywhere(revision="v1")))
    assert values(gots) == [CONTENT] * 4


def test_the_hugging_face_cache(model: Nodes) -> None:
    from huggingface_hub import snapshot_download

    folder = model.place / "theirs"
    snapshot_download("org/model", endpoint=model.hub.url, cache_dir=folder)
    assert model.hub.content_bytes() == len(CONTENT)
    (gots,) = model.tries(partial(collect, everywhere(huggingface_cache_dir=str(folder))))
    assert values(gots) == [CONTENT] * 4
    assert model.hub.content_bytes() == len(CONTENT), "copied, not downloaded"
    model.variables["HF_ENDPOINT"] = NOWHERE
    offline = everywhere(huggingface_cache_dir=str(folder), allow_network=False)
    for rank in (0, 2):
        model.by_rank[rank] = {"WEIGHTFERRY_CACHE_DIR": str(model.place / f"new{rank}")}
        model.by_rank[rank + 1] = model.by_rank[rank]
    (gots,) = model.tries(partial(collect, offline))
    assert values(gots) == [CONTENT] * 4
