"""Stage inside guards that let one rank, or one rank at a time, through; a rank under torchrun.

Each call of `stage` fails, since another rank does not make it at the same time. Writes what was logged meanwhile.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from accelerate import Accelerator
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed as dist
from transformers import TrainingArguments

import weightferry

calls: list[dict[str, Any]] = []  # of this rank
messages: list[tuple[float, str]] = []


class Recorder(logging.Handler):
    """Keeps the time and text of each warning."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.append((time.monotonic(), record.getMessage()))


def attempt(guard: str, stage: Callable[[], object]) -> None:
    """Make a call that fails, and note the warnings, the seconds until each, and the error."""
    messages.clear()
    began, error = time.monotonic(), ""
    try:
        stage()
    except weightferry.CollectError as caught:
        error = f"{type(caught).__name__}: {caught}"
    logged = [(at - began, text) for at, text in messages]
    calls.append({"guard": guard, "warnings": logged, "error": error, "seconds": time.monotonic() - began})


def stage() -> object:
    """Make the call, from one place for all guards."""
    return weightferry.stage(sys.argv[1])


class Model(lightning.LightningModule):
    """A model that stages where only one rank of a node does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def prepare_data(self) -> None:
        attempt("prepare_data", stage)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.layer.parameters(), lr=0.1)


@rank_zero_only
def on_rank_zero() -> None:
    """Run on rank 0, as Lightning has it."""
    attempt("rank_zero_only", stage)


def main(folder: Path) -> None:
    """Go through all guards."""
    logging.getLogger("weightferry").addHandler(Recorder(logging.WARNING))
    accelerator = Accelerator(cpu=True)
    arguments = TrainingArguments(output_dir=str(folder / "trainer"), use_cpu=True, report_to=[])
    with accelerator.main_process_first():
        attempt("main_process_first", stage)
    accelerator.wait_for_everyone()
    with accelerator.local_main_process_first():
        attempt("local_main_process_first", stage)
    accelerator.wait_for_everyone()
    with arguments.main_process_first(desc="stage"):
        attempt("TrainingArguments", stage)
    accelerator.wait_for_everyone()
    strategy = lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=1, **quiet)
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2))
    accelerator.wait_for_everyone()
    on_rank_zero()
    accelerator.wait_for_everyone()
    accelerator.on_main_process(lambda: attempt("on_main_process", stage))()
    accelerator.wait_for_everyone()
    if dist.get_rank() == 0:
        attempt("if rank == 0", stage)
    accelerator.wait_for_everyone()
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(calls))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # those of the libraries
    main(Path(sys.argv[2]))
