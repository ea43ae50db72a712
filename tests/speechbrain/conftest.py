"""Fixtures for tests with SpeechBrain."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.multiprocess.nodes import Nodes
from weightferry.testing.hub import HubServer
from weightferry.testing.ranks import _PRELOAD

# Without SpeechBrain no test is found, and `make test-speechbrain` fails.
collect_ignore_glob = [] if find_spec("speechbrain") else ["test_*.py"]


@pytest.fixture(scope="session")
def warm_ranks() -> None:
    """Start the server that forks the ranks after it has imported SpeechBrain, which takes five seconds."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*_PRELOAD, "tests.speechbrain.recipes"])
    forkserver.ensure_running()


@pytest.fixture
def nodes(tmp_path: Path, warm_ranks: None) -> Iterator[Nodes]:
    with HubServer() as hub:
        two = Nodes(hub, tmp_path)
        two.by_rank = {rank: variables(rank, tmp_path) for rank in range(4)}
        yield two


def variables(rank: int, place: Path) -> dict[str, str]:
    """The variables of torchrun, from which SpeechBrain reads the rank, and a Hugging Face cache for each node."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "4",
        "LOCAL_RANK": str(rank % 2),
        "LOCAL_WORLD_SIZE": "2",
        "HF_HUB_CACHE": str(place / f"huggingface{rank // 2}"),
    }
