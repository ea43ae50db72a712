"""The ways in which recipes of SpeechBrain collect files, on two nodes with two ranks and a disk each."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from speechbrain.utils import fetching

from tests.multiprocess.nodes import Nodes, check_cache, failed_alike
from tests.speechbrain import recipes
from weightferry import LocalStrategy
from weightferry.errors import BadRequest, SourceNotFound

STATE = {"weight": torch.arange(16.0).reshape(4, 4), "bias": torch.ones(4)}
ON_MAIN = (
    recipes.collect_on_main,
    recipes.collect_on_main_from,
    recipes.collect_on_main_with,
    recipes.collect_if_main,
    recipes.collect_if_main_and,
    recipes.collect_inside_of_a_decorator,
    recipes.collect_once_per_node,
)
ON_ALL = (recipes.collect_on_main, recipes.collect_on_main_from, recipes.collect_inside_of_a_decorator)
COPIES = (recipes.collect_on_main_with,)


@pytest.fixture
def model(nodes: Nodes) -> bytes:
    content = saved(STATE)
    nodes.hub.add_repo("org/model", {"model.ckpt": content})
    return content


def saved(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("idiom", [*ON_MAIN, recipes.collect_everywhere], ids=lambda idiom: idiom.__name__)
def test_every_idiom_loads_the_right_numbers(nodes: Nodes, model: bytes, idiom: Callable[..., Any]) -> None:
    by_rank = nodes.run(recipes.recipe, idiom, nodes.place / "save")
    for rank, (returned, numbers, pretrainer) in enumerate(by_rank):
        assert numbers == STATE["weight"].tolist()
        path = nodes.place / f"save/node{rank // 2}/model.ckpt"
        assert pretrainer.paths == {"model": str(path)}
        assert pretrainer.is_local == ["model"]
        assert path.is_symlink() is (idiom not in COPIES)
        assert path.read_bytes() == model
        if idiom in ON_ALL:
            assert returned == {"model": nodes.place / "save/node0/model.ckpt"}, "what the main process returns"
    assert nodes.hub.content_bytes() == len(model)
    assert len(nodes.hub.metadata_requests) == 1
    for rank in (0, 2):
        check_cache(nodes.cache(rank))


@pytest.mark.parametrize("idiom", [recipes.collect_on_main, recipes.collect_if_main], ids=lambda idiom: idiom.__name__)
def test_without_a_folder_for_links(nodes: Nodes, model: bytes, idiom: Callable[..., Any]) -> None:
    by_rank = nodes.run(recipes.recipe, idiom, None)
    for rank, (returned, numbers, pretrainer) in enumerate(by_rank):
        assert numbers == STATE["weight"].tolist()
        assert pretrainer.paths["model"].startswith(str(nodes.cache(rank)))
        # Its path contains the commit, which is not known before the Hub is asked.
        assert not returned
    assert nodes.hub.content_bytes() == len(model)


def test_a_changed_model_is_collected_again(nodes: Nodes, model: bytes) -> None:
    nodes.run(recipes.recipe, recipes.collect_on_main, nodes.place / "save")
    nodes.hub.add_repo("org/model", {"model.ckpt": saved({**STATE, "weight": STATE["weight"] + 1})})
    by_rank = nodes.run(recipes.recipe, recipes.collect_on_main, nodes.place / "save")
    assert [numbers for _, numbers, _ in by_rank] == [(STATE["weight"] + 1).tolist()] * 4


def test_twice_in_one_job(nodes: Nodes, model: bytes) -> None:
    by_rank = nodes.run(recipes.twice, recipes.collect_on_main, nodes.place / "save")
    assert by_rank == [([STATE["weight"].tolist()] * 2, "hf://org/model")] * 4
    assert nodes.hub.content_bytes() == len(model)


def test_load_on_main_loads_there_alone(nodes: Nodes, model: bytes) -> None:
    by_rank = nodes.run(recipes.load_on_main, nodes.place / "save")
    assert by_rank[0] == STATE["weight"].tolist()
    assert all(numbers != by_rank[0] for numbers in by_rank[1:])
    assert nodes.hub.content_bytes() == len(model)
    assert not nodes.cache(2).exists()


@pytest.mark.parametrize("idiom", ON_MAIN, ids=lambda idiom: idiom.__name__)
def test_a_missing_file_is_an_error_on_every_rank(nodes: Nodes, idiom: Callable[..., Any]) -> None:
    nodes.hub.add_repo("org/model", {"other.ckpt": b"content"})
    (gots,) = nodes.tries(partial(recipes.recipe, idiom, nodes.place / "save"))
    text = failed_alike(gots, SourceNotFound, "resolve", {0}, "model.ckpt", "did you mean other.ckpt")
    assert text.startswith("collect failed in resolve")
    assert not list((nodes.place / "save").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["org/model", "copy"], "must be True or False (internal_ddp_handling) or a LocalStrategy (SYMLINK, COPY,"),
        (["org/model", True, "copy"], "local_strategy must be LocalStrategy.SYMLINK, LocalStrategy.COPY, "),
        (["org/model", True, LocalStrategy.COPY, "copy"], "fetch_config must be None or a FetchConfig"),
        ([fetching.FetchSource("hf", "org/model")], "must be FetchFrom.LOCAL, FetchFrom.HUGGING_FACE, FetchFrom.URI, "),
    ],
)
def test_a_bad_argument_is_an_error_on_every_rank(nodes: Nodes, arguments: list[Any], said: str) -> None:
    on_main, everywhere = nodes.tries(
        partial(recipes.recipe, partial(recipes.collect_on_main, arguments=arguments), nodes.place / "save"),
        partial(recipes.recipe, partial(recipes.collect_everywhere, arguments=arguments), nodes.place / "save"),
    )
    failed_alike(on_main, BadRequest, "agree", {0}, said)
    failed_alike(everywhere, BadRequest, "agree", {0, 1, 2, 3}, said)
    assert not (nodes.place / "save").exists()
    assert nodes.hub.requests == []


def test_a_group_needs_every_rank(nodes: Nodes) -> None:
    (gots,) = nodes.tries(partial(recipes.recipe, recipes.collect_on_main_in_a_group, None))
    failed_alike(gots, BadRequest, "agree", {0}, "collect_files(group=...) was called inside SpeechBrain's run_on_main")


def test_a_token_of_the_main_process_stays_there(nodes: Nodes, model: bytes) -> None:
    token = "planted-token-without-a-prefix"
    nodes.hub.add_repo("org/model", {"model.ckpt": model}, private=True, allowed_tokens=[token])
    config = fetching.FetchConfig(token=token)
    arguments = ["org/model", fetching.LocalStrategy.SYMLINK, config]
    by_rank = nodes.run(recipes.recipe_and_store, partial(recipes.collect_on_main, arguments=arguments), nodes.place)
    assert [numbers for numbers, _ in by_rank] == [STATE["weight"].tolist()] * 4
    assert not any(token.encode() in value for _, written in by_rank for value in written)
    assert all(written for _, written in by_rank)
    assert nodes.hub.content_bytes() == len(model)


def test_one_process_collects_at_once(nodes: Nodes, model: bytes) -> None:
    nodes.by_rank[0] |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    ((returned, numbers, pretrainer),) = nodes.run(
        recipes.recipe, recipes.collect_on_main_and_read, nodes.place / "save", world_size=1
    )
    assert returned == model
    assert numbers == STATE["weight"].tolist()
    assert pretrainer.report is not None
