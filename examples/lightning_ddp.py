"""Stage in `configure_model`, which runs on every rank (`prepare_data` does not), and train with DDP.

torchrun --nproc-per-node 2 examples/lightning_ddp.py org/name
"""

from __future__ import annotations

import os
import sys

import lightning
import torch
from torch import distributed as dist
from transformers import AutoModel

import weightferry


def fingerprint(module: torch.nn.Module) -> float:
    """Return one number that depends on every parameter."""
    return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))


class Encoder(lightning.LightningModule):
    """A pretrained encoder that learns to give small numbers."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.encoder, self.before = source, None, 0.0

    def configure_model(self) -> None:
        """Stage and load: Lightning calls this on every rank."""
        if self.encoder is None:
            self.encoder = AutoModel.from_pretrained(weightferry.stage(self.source)).train()
            self.before = fingerprint(self.encoder)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:  # noqa: D102
        return self.encoder(input_ids=batch).pooler_output.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.SGD(self.encoder.parameters(), lr=0.1)


def main(source: str) -> None:
    """Train two steps on every rank."""
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy = lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=2, **quiet)
    model = Encoder(source)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randint(5, 60, (16, 8)), batch_size=4))
    numbers: list[tuple[float, float]] = [(0.0, 0.0)] * dist.get_world_size()
    dist.all_gather_object(numbers, (model.before, fingerprint(model.encoder)))
    assert len(set(numbers)) == 1, f"the ranks hold different weights: {numbers}"
    print(f"rank {dist.get_rank()}: fingerprint {model.before:.6f}")


if __name__ == "__main__":
    main(sys.argv[1])
