"""A recipe of SpeechBrain that torchrun starts on two nodes with two ranks and a disk each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.multiprocess.launched import clean_environ, meeting_point, together
from tests.multiprocess.nodes import Nodes
from tests.speechbrain.test_recipes import STATE, saved

RECIPE = Path(__file__).with_name("recipe.py")


@pytest.mark.parametrize("when", ["group first", "group later"])
def test_a_whole_recipe(nodes: Nodes, tmp_path: Path, when: str) -> None:
    nodes.by_rank = {}
    nodes.hub.add_repo("org/model", {"model.ckpt": saved(STATE)})
    out = tmp_path / "out"
    out.mkdir()
    with meeting_point() as port:
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
        run += ["--rdzv-backend", "c10d", "--rdzv-id", "recipe", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        run += ["--rdzv-conf", "is_host=0", "--local-addr", "127.0.0.1", str(RECIPE)]
        agents = [
            ([*run, str(tmp_path / f"save{node}"), when, str(out)], clean_environ(nodes, 2 * node)) for node in (0, 1)
        ]
        done = together(agents, tmp_path / "agents")
    assert [agent.code for agent in done] == [0, 0], done
    right = str((torch.ones(1, 4) @ STATE["weight"].T + STATE["bias"]).tolist())
    assert {path.name: path.read_text() for path in out.iterdir()} == {f"rank{rank}": right for rank in range(4)}
    assert nodes.hub.content_bytes() == len(saved(STATE))
    for node in (0, 1):
        assert (tmp_path / f"save{node}/model.ckpt").resolve().is_relative_to(nodes.cache(2 * node))
