"""Stage a model, then fine-tune it with the `Trainer` of transformers, which makes the process group by itself.

torchrun --nproc-per-node 2 examples/transformers_trainer.py org/name
"""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import distributed as dist
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

import weightferry


def fingerprint(module: torch.nn.Module) -> float:
    """Return one number that depends on every parameter."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sixteen sentences of eight random words."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = torch.randint(5, 60, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": words, "labels": words}


def main(source: str) -> None:
    """Load before there is a process group, as most scripts do."""
    model = AutoModelForMaskedLM.from_pretrained(weightferry.stage(source))
    before = fingerprint(model)
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no"}
        arguments = TrainingArguments(folder, use_cpu=True, ddp_backend="gloo", **options)
        Trainer(model=model, args=arguments, train_dataset=Sentences()).train()
    numbers: list[tuple[float, float]] = [(0.0, 0.0)] * dist.get_world_size()
    dist.all_gather_object(numbers, (before, fingerprint(model)))
    assert len(set(numbers)) == 1, f"the ranks hold different weights: {numbers}"
    assert numbers[0][0] != numbers[0][1], "the training changed nothing"
    print(f"rank {dist.get_rank()}: fingerprint {before:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
