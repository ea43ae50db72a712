"""Stage a base model and a LoRA adapter, and join them with PEFT on every rank.

torchrun --nproc-per-node 2 examples/peft_lora.py org/name org/adapter
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from torch import distributed as dist
from transformers import AutoModel

import weightferry


def fingerprint(module: torch.nn.Module) -> float:
    """Return one number that depends on every parameter."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))


def main(base: str, adapter: str) -> None:
    """Stage both, join them."""
    model = AutoModel.from_pretrained(weightferry.stage(base))
    model = PeftModel.from_pretrained(model, weightferry.stage(adapter), is_trainable=True)

    dist.init_process_group("gloo")
    numbers: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(numbers, fingerprint(model))
    assert len(set(numbers)) == 1, f"the ranks hold different weights: {numbers}"
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"rank {dist.get_rank()}: fingerprint {numbers[0]:.6f}, {trainable} numbers of the adapter are trained")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
