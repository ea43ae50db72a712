"""Stage a model once for the whole job, then load it on every rank with `from_pretrained`.

torchrun --nproc-per-node 2 examples/transformers_from_pretrained.py org/name
"""

from __future__ import annotations

import sys

import torch
from torch import distributed as dist
from transformers import AutoModel

import weightferry


def fingerprint(module: torch.nn.Module) -> float:
    """Return one number that depends on every parameter."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))


def main(source: str) -> None:
    """Stage and load; the process group may come later, or never."""
    folder = weightferry.stage(source, allow_patterns=["*.json", "*.safetensors"])
    model = AutoModel.from_pretrained(folder)

    dist.init_process_group("gloo")
    numbers: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(numbers, fingerprint(model))
    assert len(set(numbers)) == 1, f"the ranks hold different weights: {numbers}"
    print(f"rank {dist.get_rank()}: fingerprint {numbers[0]:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
