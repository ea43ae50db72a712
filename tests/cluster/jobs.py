"""Functions for the tasks of the tests; every node can import them by name."""

from __future__ import annotations

import os
import time

import torch
from torch import distributed as dist


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
