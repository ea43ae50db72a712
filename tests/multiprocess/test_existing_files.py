"""Files that exist in `collect_in` before: with a FetchConfig they are used as they are, if all ranks have the same."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import weightferry
from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, values
from weightferry import FetchConfig, LocalStrategy

SOURCE = b"from the Hub" * 1000
MINE = b"mine" * 3000  # of the same size
assert len(MINE) == len(SOURCE)


def collect(
    names: Mapping[int, list[str]], config: FetchConfig | None, place: Path, strategy: Any = LocalStrategy.SYMLINK
) -> tuple[dict[str, bytes], list[str]]:
    """Collect on a folder of this node; the content by name, and the warnings."""
    warnings = jobs.record_warnings()
    wanted = names.get(jobs.rank(), ["model"])
    pretrainer = weightferry.Pretrainer(place / f"links{jobs.rank() // 2}", dict.fromkeys(wanted))
    found = pretrainer.collect_files("org/model", local_strategy=strategy, fetch_config=config)
    return {name: path.read_bytes() for name, path in found.items()}, [text for text in warnings if "existing" in text]


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", {"model.ckpt": SOURCE, "other.ckpt": SOURCE})
    return nodes


def put(model: Nodes, *contents: bytes, name: str = "model") -> None:
    """Write a file into the folder of each node; empty content for none."""
    for node, content in enumerate(contents):
        (model.place / f"links{node}").mkdir(exist_ok=True)
        if content:
            (model.place / f"links{node}/{name}.ckpt").write_bytes(content)


@pytest.mark.parametrize("strategy", list(LocalStrategy))
def test_the_same_file_on_all_nodes(model: Nodes, strategy: LocalStrategy) -> None:
    put(model, MINE, MINE)
    (gots,) = model.tries(partial(collect, {}, FetchConfig(), model.place, strategy))
    assert values(gots) == [({"model": MINE}, [])] * 4
    assert model.hub.requests == []


@pytest.mark.parametrize(
    "contents",
    [(MINE, b"me" * 6000), (MINE, MINE[:-1]), (MINE, b""), (b"", MINE)],
    ids=["content", "size", "first", "second"],
)
def test_different_files_are_collected_everywhere(model: Nodes, contents: tuple[bytes, ...]) -> None:
    put(model, *contents)
    (gots,) = model.tries(partial(collect, {}, FetchConfig(), model.place))
    assert [found for found, _ in values(gots)] == [{"model": SOURCE}] * 4
    (warning,) = gots[0].value[1]
    assert warning.startswith("model: the existing file is not the same on all ranks, so every rank gets it from org/m")
    assert not any(got.value[1] for got in gots[1:])
    assert model.hub.content_bytes() == len(SOURCE)


@pytest.mark.parametrize("config", [None, FetchConfig(overwrite=True), FetchConfig(allow_updates=True)])
def test_files_that_are_compared_with_the_source(model: Nodes, config: FetchConfig | None) -> None:
    put(model, MINE, MINE)
    (gots,) = model.tries(partial(collect, {}, config, model.place))
    assert values(gots) == [({"model": SOURCE}, [])] * 4


def test_links_of_an_earlier_job(model: Nodes) -> None:
    for _ in range(2):
        (gots,) = model.tries(partial(collect, {}, FetchConfig(), model.place))
        assert values(gots) == [({"model": SOURCE}, [])] * 4
        model.variables["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing answers there


def test_a_link_whose_content_was_evicted(model: Nodes) -> None:
    call = partial(collect, {}, FetchConfig(), model.place)
    model.tries(call)
    for blob in model.cache(2).rglob("blobs/*"):
        blob.unlink()
    (gots,) = model.tries(call)
    assert [found for found, _ in values(gots)] == [{"model": SOURCE}] * 4
    assert model.hub.content_bytes() == len(SOURCE), "the other node has it"


def test_ranks_that_want_different_files(model: Nodes) -> None:
    put(model, MINE, b"")
    put(model, b"", MINE, name="other")
    names = {0: ["model"], 1: ["model"], 2: ["other"], 3: []}
    (gots,) = model.tries(partial(collect, names, FetchConfig(), model.place))
    assert values(gots) == [({"model": MINE}, []), ({"model": MINE}, []), ({"other": MINE}, []), ({}, [])]
    assert model.hub.requests == []


def test_copies_on_two_nodes(model: Nodes) -> None:
    (gots,) = model.tries(partial(collect, {}, None, model.place, LocalStrategy.COPY))
    assert values(gots) == [({"model": SOURCE}, [])] * 4
    for node in (0, 1):
        copy = model.place / f"links{node}/model.ckpt"
        assert not copy.is_symlink()
        assert [path.name for path in copy.parent.iterdir()] == ["model.ckpt"]
    assert model.hub.content_bytes() == len(SOURCE)
