"""Load sharded safetensors into an FSDP2 model that was built on the meta device: each rank reads its own part.

torchrun --nproc-per-node 2 examples/fsdp2_meta.py org/name
"""

from __future__ import annotations

import sys

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import weightferry


def build() -> torch.nn.Module:
    """Return the architecture; its parameters need no memory yet."""
    with torch.device("meta"):
        layers = [layer for _ in range(4) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
        return torch.nn.Sequential(*layers)


def fingerprint(module: torch.nn.Module) -> float:
    """Return one number that depends on every parameter, gathered from all ranks."""
    return float(sum(parameter.full_tensor().double().abs().sum() for parameter in module.parameters()))


def main(source: str) -> None:
    """Build, split, collect, load."""
    dist.init_process_group("gloo")
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    pretrainer = weightferry.Pretrainer(None, {"model": model}, {"model": f"{source}/model.safetensors.index.json"})
    pretrainer.collect_files()  # the index and its shards, onto every node
    pretrainer.load_collected()  # of each tensor the part of this rank
    own = sum(parameter.to_local().numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert own < whole, f"rank {dist.get_rank()} holds all {whole} numbers"
    print(f"rank {dist.get_rank()}: fingerprint {fingerprint(model):.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
