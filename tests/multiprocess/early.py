"""What a training script does: stage before there is a process group, twice, then train with one."""

from __future__ import annotations

import sys
from pathlib import Path

import weightferry

first = weightferry.stage("org/model")
second = weightferry.stage("org/model", allow_patterns="*.json")

import torch  # noqa: E402 -- as late as in a script that leaves it to its trainer
from torch import distributed as dist  # noqa: E402

dist.init_process_group("gloo")
ones = torch.ones(1)
dist.all_reduce(ones)
third = weightferry.stage("org/model")
size = (third / "model.safetensors").stat().st_size
Path(sys.argv[1], f"rank{dist.get_rank()}").write_text(f"{first == second == third} {int(ones)} {size}")
dist.destroy_process_group()
