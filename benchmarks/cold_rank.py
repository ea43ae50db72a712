"""One rank of `cold_start.py`: it joins the process group, gets the weights in one of several ways, and loads them.

    srun ... python benchmarks/cold_rank.py WAY REPOSITORY CACHE OUT

It writes the seconds since all ranks have joined to OUT/RANK.json. All imports are done before that, for every way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import distributed as dist

import weightferry
import weightferry.origins.hub
import weightferry.transfer.relay.ring

State = Mapping[str, torch.Tensor]


def load(folder: Path) -> list[State]:
    """Load every file of weights with `torch.load`, as most scripts do."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]


def weightferry_stage(repo: str, cache: Path) -> Path:
    """Stage with weightferry, as in the README."""
    return weightferry.stage(repo, cache_dir=cache)


def local_rank_first(repo: str, cache: Path) -> Path:
    """Download with huggingface_hub inside the logic of accelerate's `local_main_process_first`."""
    first = os.environ["SLURM_LOCALID"] == "0"
    if not first:
        dist.barrier()
    folder = snapshot_download(repo, cache_dir=cache)
    if first:
        dist.barrier()
    return Path(folder)


def every_rank(repo: str, cache: Path) -> Path:
    """Call `snapshot_download` on every rank."""
    return Path(snapshot_download(repo, cache_dir=cache))


def rank_0_broadcasts(repo: str, cache: Path) -> None:
    """Download and load on rank 0, and broadcast each tensor."""
    states = load(every_rank(repo, cache)) if dist.get_rank() == 0 else []
    shapes: list[Any] = [[{key: (value.shape, value.dtype) for key, value in state.items()} for state in states]]
    dist.broadcast_object_list(shapes)
    for number, names in enumerate(shapes[0]):
        for key, (shape, dtype) in names.items():
            dist.broadcast(states[number][key] if states else torch.empty(shape, dtype=dtype), 0)


WAYS: dict[str, Callable[[str, Path], Path | None]] = {
    "weightferry": weightferry_stage,
    "local rank first": local_rank_first,
    "rank 0 broadcasts": rank_0_broadcasts,
    "every rank downloads": every_rank,
}


def main() -> None:
    """Measure one way on this rank."""
    way, repo, cache, out = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://node1:{sys.argv[5]}", rank=rank, world_size=size)
    dist.barrier()
    began = time.monotonic()
    folder = WAYS[way](repo, cache)
    downloaded = time.monotonic()
    if folder is not None:
        load(folder)
    ended = time.monotonic()
    result = {"bring": downloaded - began, "load": ended - downloaded, "seconds": ended - began}
    (out / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
