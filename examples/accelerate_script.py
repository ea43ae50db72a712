"""Stage with accelerate: call it on every rank, and not inside `main_process_first`.

accelerate launch --num_processes 2 --cpu examples/accelerate_script.py org/name
torchrun --nproc-per-node 2 examples/accelerate_script.py org/name
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoModel

import weightferry


def fingerprint(module: torch.nn.Module) -> float:
    """Return one number that depends on every parameter."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))


def main(source: str) -> None:
    """Stage, load, prepare, and take one step."""
    accelerator = Accelerator(cpu=True)
    folder = weightferry.stage(source)  # no guard around it: weightferry coordinates the ranks
    model = AutoModel.from_pretrained(folder)
    before = fingerprint(model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    words = torch.randint(5, 60, (4, 8))
    accelerator.backward(model(input_ids=words).pooler_output.pow(2).mean())
    optimizer.step()

    numbers = gather_object([(before, fingerprint(accelerator.unwrap_model(model)))])
    assert len(set(numbers)) == 1, f"the ranks hold different weights: {numbers}"
    print(f"rank {accelerator.process_index}: fingerprint {before:.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
