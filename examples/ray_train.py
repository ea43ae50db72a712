"""Stage in the training function of a Ray Train `TorchTrainer`: Ray makes the process group.

python examples/ray_train.py org/name --workers 2
"""

from __future__ import annotations

import argparse
from typing import Any

import ray.train
import ray.train.torch


def train(config: dict[str, Any]) -> list[float]:
    """Run on every worker: stage, load, compare; Ray hands on what rank 0 returns."""
    from torch import distributed as dist
    from transformers import AutoModel

    import weightferry

    model = AutoModel.from_pretrained(weightferry.stage(config["source"]))
    number = float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))
    numbers: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    assert len(set(numbers)) == 1, f"the workers hold different weights: {numbers}"
    return numbers


def main() -> None:
    """Start a local cluster, or join the one that RAY_ADDRESS names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"source": given.source},
        scaling_config=ray.train.ScalingConfig(num_workers=given.workers),
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
    )
    for rank, number in enumerate(trainer.fit().return_value):
        print(f"rank {rank}: fingerprint {number:.6f}")


if __name__ == "__main__":
    main()
