"""SpeechBrain's inference interfaces with hyperparameters that name our Pretrainer."""

from __future__ import annotations

from functools import partial

import pytest

from tests.multiprocess.nodes import Nodes, values
from tests.speechbrain import recipes
from tests.speechbrain.test_recipes import STATE, saved

HYPERPARAMETERS = """
model: !new:torch.nn.Linear
  in_features: 4
  out_features: 4
modules:
  model: !ref <model>
pretrainer: !new:weightferry.Pretrainer
  loadables:
    model: !ref <model>
  paths: {}
"""
RIGHT = STATE["weight"].tolist()


@pytest.fixture
def model(nodes: Nodes) -> bytes:
    content = saved(STATE)
    nodes.hub.add_repo("org/model", {"model.ckpt": content, "hyperparams.yaml": HYPERPARAMETERS.encode()})
    return content


@pytest.mark.parametrize("savedir", ["save", None])
def test_alone(nodes: Nodes, model: bytes, savedir: str | None) -> None:
    nodes.by_rank[0] |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    folder = nodes.place / savedir if savedir else None
    assert nodes.run(recipes.interface, "org/model", folder, world_size=1) == [RIGHT]
    assert nodes.hub.content_bytes("model.ckpt") == len(model)
    asked = len(nodes.hub.requests)
    assert nodes.run(recipes.interface, "org/model", folder, world_size=1) == [RIGHT]
    assert savedir is None or len(nodes.hub.requests) == asked, "both files exist in the folder"


def test_on_every_rank_without_a_folder(nodes: Nodes, model: bytes) -> None:
    (gots,) = nodes.tries(partial(recipes.interface, "org/model", None))
    assert values(gots) == [RIGHT] * 4
    assert nodes.hub.content_bytes("model.ckpt") == len(model)


def test_on_every_rank_with_a_folder_on_each_node(nodes: Nodes, model: bytes) -> None:
    # SpeechBrain fetches the hyperparameters on the main process only, before they can name a Pretrainer.
    staged = partial(recipes.interface, "org/model", nodes.place / "save", recipes.stage_to)
    first, again = nodes.tries(staged, staged)
    assert values(first) == values(again) == [RIGHT] * 4
    assert nodes.hub.content_bytes() == len(model) + len(HYPERPARAMETERS)
    for node in (0, 1):
        link = nodes.place / f"save/node{node}/model.ckpt"
        assert link.resolve().is_relative_to(nodes.cache(2 * node))


def test_on_every_rank_from_a_local_folder(nodes: Nodes, model: bytes) -> None:
    source = nodes.place / "source"
    source.mkdir()
    text = HYPERPARAMETERS.replace("paths: {}", "paths: {model: org/model/model.ckpt}")
    (source / "hyperparams.yaml").write_text(text)
    nodes.ranks_a_node = 1  # two ranks of SpeechBrain that link one file in one folder disturb each other
    (gots,) = nodes.tries(partial(recipes.interface, str(source), nodes.place / "save"), world_size=2)
    assert values(gots) == [RIGHT] * 2
    assert nodes.hub.content_bytes() == len(model)
