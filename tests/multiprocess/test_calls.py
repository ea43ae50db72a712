"""Calls as people make them: before any process group, on some ranks only, and different ones on different ranks."""

from __future__ import annotations

import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess import jobs
from tests.multiprocess.launched import clean_environ, meeting_point, together
from tests.multiprocess.nodes import Nodes, check_cache, values
from weightferry.errors import CollectError, LeaderLost, NotDistributed, PlanMismatch

FILES = {"config.json": b"{}", "model.safetensors": os.urandom(1_000_000)}
TOTAL = sum(map(len, FILES.values()))
EARLY = Path(__file__).with_name("early.py")


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", FILES)
    return nodes


def check_early(model: Nodes, out: Path, ranks: int) -> None:
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        f"rank{rank}": f"True {ranks} {len(FILES['model.safetensors'])}" for rank in range(ranks)
    }
    assert model.hub.content_bytes() == TOTAL
    for rank in (0, 2):
        assert len(check_cache(model.cache(rank))) == 2


def test_before_a_process_group_under_torchrun(model: Nodes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with meeting_point() as port:
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
        run += ["--rdzv-backend", "c10d", "--rdzv-id", "early", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        run += ["--rdzv-conf", "is_host=0", "--local-addr", "127.0.0.1", str(EARLY), str(out)]
        done = together([(run, clean_environ(model, rank)) for rank in (0, 2)], tmp_path / "agents")
    assert [agent.code for agent in done] == [0, 0], done
    check_early(model, out, 4)


def test_before_a_process_group_by_variables_alone(model: Nodes, tmp_path: Path) -> None:
    """As srun and mpirun start ranks: nobody holds a store, and MASTER_PORT stays free for the process group."""
    out = tmp_path / "out"
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        {
            **clean_environ(model, rank),
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank % 2),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(3)  # a leader of two ranks, its follower, and another leader
    ]
    command = [sys.executable, str(EARLY), str(out)]
    done = together([(command, environ) for environ in ranks], tmp_path / "ranks")
    assert [rank.code for rank in done] == [0] * 3, done
    check_early(model, out, 3)


def on_some(ranks: set[int], call: Any) -> Any:
    """Make a call on some ranks, while the others wait outside of it; what it logged and raised."""
    from torch import distributed as dist

    messages = jobs.record_warnings()
    store = dist.distributed_c10d._get_default_store()
    error = None
    if jobs.rank() in ranks:
        try:
            call()
        except CollectError as caught:
            error = caught
        store.add("done", 1)
    else:
        while store.add("done", 0) < len(ranks):
            jobs.wait(0.1)
    return messages, error


@pytest.mark.parametrize("ranks", [{0}, {1, 3}], ids=["rank 0", "two others"])
def test_a_call_that_only_some_ranks_make(model: Nodes, ranks: set[int]) -> None:
    model.variables |= {
        "WEIGHTFERRY_AGREE_TIMEOUT": "4",
        "WEIGHTFERRY_BEAT_INTERVAL": "0.5",
        "WEIGHTFERRY_BEAT_TIMEOUT": "2",
    }
    (gots,) = model.tries(partial(on_some, ranks, partial(jobs.stage, "org/model")))
    absent = "ranks 1-3" if ranks == {0} else "ranks 0, 2"
    for rank, (messages, error) in enumerate(values(gots)):
        if rank not in ranks:
            continue
        (warning,) = [message for message in messages if "for all ranks to call" in message]
        assert "stage() at jobs.py:" in warning
        assert f"{absent} did not call yet" in warning
        assert isinstance(error, LeaderLost)
        assert "stage() at jobs.py:" in str(error)
        assert f"{absent} did not call yet" in str(error)
    assert model.hub.requests == []


def collect_or_load(loading: set[int]) -> Any:
    """Load on some ranks and collect on the others, as code does that collects in a guard."""
    import torch

    import weightferry

    pretrainer = weightferry.Pretrainer(None, {"m": torch.nn.Linear(2, 2)}, {"m": "org/linear/linear.ckpt"})
    pretrainer.collect_files()
    return pretrainer.load_collected() if jobs.rank() in loading else pretrainer.collect_files()


def test_different_calls(model: Nodes) -> None:
    """Also where rank 0 alone ends the first phase of its call, and would go on without the others."""
    import torch

    model.hub.add_repo("org/linear", {"linear.ckpt": jobs.saved({"weight": torch.ones(2, 2), "bias": torch.ones(2)})})
    model.variables |= {"WEIGHTFERRY_BEAT_INTERVAL": "0.3", "WEIGHTFERRY_BEAT_TIMEOUT": "5"}
    load, collect = "load_collected() at test_calls.py:", "collect_files() at test_calls.py:"
    cases = [
        (partial(collect_or_load, {1, 2, 3}), f"rank 0 calls {collect}", f"ranks 1-3 call {load}"),
        (partial(collect_or_load, {0}), "rank 0 calls load_collected()", f"ranks 1-3 call {collect}"),
        (partial(collect_or_load, {2}), f"ranks 0-1, 3 call {collect}", f"rank 2 calls {load}"),
    ]
    for (_, *texts), gots in zip(cases, model.tries(*(call for call, *_ in cases)), strict=True):
        for got in gots:
            assert isinstance(got.error, PlanMismatch), got
            assert "the ranks make different calls: " in str(got.error)
            assert [text for text in texts if text not in str(got.error)] == []


def stage_alone() -> Any:
    """Stage on rank 1 alone."""
    import weightferry

    return weightferry.stage("org/model", coordinate=False) if jobs.rank() == 1 else None


def test_one_process_alone(model: Nodes) -> None:
    (gots,) = model.tries(stage_alone)
    first, path, *others = values(gots)
    assert [first, *others] == [None] * 3
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not model.cache(2).exists()


def test_what_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    import weightferry

    for name, value in {"PMI_RANK": "0", "PMI_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotDistributed, match="set MASTER_ADDR"):
        weightferry.stage("org/model")
