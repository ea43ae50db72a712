"""A SpeechBrain recipe: its hyperparameters name `!new:weightferry.Pretrainer`, and every other line stays as it is.

torchrun --nproc-per-node 2 examples/speechbrain_recipe.py org/name
"""

from __future__ import annotations

import sys

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import ddp_init_group, run_on_main
from torch import distributed as dist

HYPERPARAMETERS = """
source: !PLACEHOLDER
model: !new:torch.nn.Linear {in_features: 4, out_features: 4}
pretrainer: !new:weightferry.Pretrainer  # was: !new:speechbrain.utils.parameter_transfer.Pretrainer
  loadables: {model: !ref <model>}
  paths: {model: !ref <source>/model.ckpt}
"""
RUN = {"device": "cpu", "distributed_backend": "gloo"}


def fingerprint(module: torch.nn.Module) -> float:
    """Return one number that depends on every parameter."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))


class Recipe(sb.Brain):
    """Learn to give small numbers."""

    def compute_forward(self, batch: torch.Tensor, stage: sb.Stage) -> torch.Tensor:  # noqa: D102
        return self.modules.model(batch)

    def compute_objectives(self, predictions: torch.Tensor, batch: torch.Tensor, stage: sb.Stage) -> torch.Tensor:  # noqa: D102
        return predictions.pow(2).mean()


def main(source: str) -> None:
    """Collect on the main process, load on every rank, train."""
    ddp_init_group(RUN)
    hparams = load_hyperpyyaml(HYPERPARAMETERS, {"source": source})
    run_on_main(hparams["pretrainer"].collect_files)
    hparams["pretrainer"].load_collected()
    before = fingerprint(hparams["model"])

    recipe = Recipe({"model": hparams["model"]}, lambda weights: torch.optim.SGD(weights, lr=0.1), hparams, RUN)
    recipe.fit(range(1), torch.rand(8, 4), train_loader_kwargs={"batch_size": 4}, progressbar=False)
    numbers: list[tuple[float, float]] = [(0.0, 0.0)] * dist.get_world_size()
    dist.all_gather_object(numbers, (before, fingerprint(recipe.modules["model"])))
    assert len(set(numbers)) == 1, f"the ranks hold different weights: {numbers}"
    assert numbers[0][0] != numbers[0][1], "the training changed nothing"
    print(f"rank {dist.get_rank()}: fingerprint {before:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
