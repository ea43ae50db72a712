"""Functions for the tasks of the tests; every node can import them by name."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time

import submitit
import torch
from torch import distributed as dist

import weightferry
from tests.cluster.origin import REPO, SIZES


def add_up() -> tuple[int, float, str]:
    """Return (rank, sum of ones over all ranks, host)."""
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return dist.get_rank(), float(ones), os.uname().nodename


def raise_on(rank: int, *, others_sleep: bool) -> None:
    """Raise an error on one rank; the other ranks are in a collective, or in a call that does not return."""
    if dist.get_rank() == rank:
        time.sleep(1)
        raise ValueError("planted on purpose")
    if others_sleep:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))


def wait_for_ever(ready: str) -> None:
    """Write a file as soon as this rank runs, then sleep."""
    with open(f"{ready}-{dist.get_rank()}", "w") as file:  # noqa: PTH123
        file.write(str(os.getpid()))
    time.sleep(600)


def stage_then_group(join: str) -> dict[str, object]:
    """Stage twice before there is a process group, then make one as a trainer does, and stage in it.

    Parameters
    ----------
    join
        How the variables of the process group come about: ``submitit``, ``slurm``, or ``set`` beforehand.
    """
    first = weightferry.stage(REPO)
    second = weightferry.stage(REPO, allow_patterns="*.json")
    assert not dist.is_initialized()
    if join == "submitit":
        submitit.helpers.TorchDistributedEnvironment().export()
    elif join == "slurm":
        os.environ |= {"RANK": os.environ["SLURM_PROCID"], "WORLD_SIZE": os.environ["SLURM_NTASKS"]}
        os.environ |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    third = weightferry.stage(REPO)
    found = {
        "rank": dist.get_rank(),
        "sum": float(ones),
        "host": os.uname().nodename,
        "same folder": first == second == third,
        "sha256": {path: hashlib.sha256((third / path).read_bytes()).hexdigest() for path in SIZES},
    }
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(stage_then_group(sys.argv[1])) + "\n")
