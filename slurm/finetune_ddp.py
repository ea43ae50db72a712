"""Fine-tune the real MiniLM weights with DDP on several nodes, through submitit; continue after a requeue.

    python slurm/finetune_ddp.py --nodes 2 --tasks-per-node 2 --source sentence-transformers/all-MiniLM-L6-v2

The task is small and generated: distinguish sentences about food from sentences about machines. Each rank has its part
of the batch, and the loss goes down. Rank 0 writes a checkpoint every few steps; a requeued job continues from it.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import weightferry

FOOD = ("bread", "soup", "an apple", "the rice", "cheese", "a cake", "the salad", "pasta")
MACHINES = ("the engine", "a pump", "the printer", "a turbine", "the lathe", "a crane", "the drill", "a motor")
PATTERNS = ("we looked at {} today", "{} was near the window", "nobody asked for {}", "my sister likes {}", "{} again")


@dataclass(frozen=True)
class TrainingPlan:
    """Options of the training.

    Attributes
    ----------
    source : str
        A repository with a BERT model: config.json, model.safetensors, tokenizer.json.
    folder : str
        For checkpoints and logs; every node must see it.
    steps : int
        Optimizer steps.
    save_every : int
        Steps between checkpoints.
    pause : float
        Seconds to wait after each step; it makes the job long enough for a test of the requeue.
    """

    source: str
    folder: str
    steps: int = 30
    save_every: int = 5
    pause: float = 0.0


def train(plan: TrainingPlan) -> dict[str, Any]:
    """Train on one rank; `weightferry.launch` has initialised the process group.

    Returns
    -------
    dict
        ``first_loss``, ``last_loss``, ``started_at`` (the first step after the checkpoint), ``steps``.
    """
    import torch
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = weightferry.stage(plan.source)
    encoder, tokenizer = _build(folder)
    pretrainer = weightferry.Pretrainer(None, {"encoder": encoder}, {"encoder": str(folder / "model.safetensors")})
    pretrainer.collect_files()
    pretrainer.load_collected()
    model = DistributedDataParallel(Classifier.of(encoder), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    checkpoint = Path(plan.folder) / "checkpoint.pt"
    started_at, losses = _resume(checkpoint, model, optimizer)
    for step in range(started_at, plan.steps):
        ids, mask, labels = _batch(tokenizer, step, dist.get_rank())
        loss = torch.nn.functional.cross_entropy(model(ids, mask), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)  # noqa: T201 -- the job's log
            if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
                _save(checkpoint, model, optimizer, losses)
        time.sleep(plan.pause)
    return {"first_loss": losses[0], "last_loss": losses[-1], "started_at": started_at, "steps": len(losses)}


class Classifier:
    """Makes the module in a function, so that the import of this file does not import torch."""

    @staticmethod
    def of(encoder: Any) -> Any:
        """Return the encoder with a linear layer of two outputs on the mean of its last layer."""
        import torch

        class Head(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = encoder
                self.head = torch.nn.Linear(encoder.config.hidden_size, 2)

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
                """Return logits of shape (batch, 2)."""
                hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
                weights = mask.unsqueeze(-1).to(hidden.dtype)
                return self.head((hidden * weights).sum(1) / weights.sum(1))

        return Head()


def _build(folder: Path) -> tuple[Any, Any]:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    return BertModel(BertConfig.from_json_file(folder / "config.json")), tokenizer


def _batch(tokenizer: Any, step: int, rank: int, size: int = 8) -> tuple[Any, Any, Any]:
    """Return this rank's part of a batch: token ids and mask of shape (size, length), labels of shape (size,)."""
    import torch

    generator = random.Random(1000 * step + rank)  # noqa: S311 -- data, not secrets
    labels = [generator.randrange(2) for _ in range(size)]
    texts = [generator.choice(PATTERNS).format(generator.choice((FOOD, MACHINES)[label])) for label in labels]
    encoded = tokenizer.encode_batch(texts)
    ids = torch.tensor([each.ids for each in encoded])
    mask = torch.tensor([each.attention_mask for each in encoded])
    return ids, mask, torch.tensor(labels)


def _save(path: Path, model: Any, optimizer: Any, losses: list[float]) -> None:
    import torch

    temporary = path.with_suffix(".part")
    torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}, temporary)
    temporary.replace(path)


def _resume(path: Path, model: Any, optimizer: Any) -> tuple[int, list[float]]:
    """Load the checkpoint, if there is one; rank 0 decides for all ranks. Return the next step and the losses."""
    import torch
    from torch import distributed as dist

    checkpoint: list[Any] = [None]
    if dist.get_rank() == 0 and path.exists():
        checkpoint = [torch.load(path, weights_only=True)]
    dist.broadcast_object_list(checkpoint)
    if checkpoint[0] is None:
        return 0, []
    model.module.load_state_dict(checkpoint[0]["model"])
    optimizer.load_state_dict(checkpoint[0]["optimizer"])
    return len(checkpoint[0]["losses"]), list(checkpoint[0]["losses"])


@click.command()
@click.option("--nodes", default=2, show_default=True, help="Number of nodes.")
@click.option("--tasks-per-node", default=2, show_default=True, help="Ranks on each node.")
@click.option("--source", default="sentence-transformers/all-MiniLM-L6-v2", show_default=True, help="The model.")
@click.option(
    "--folder", default="finetune", show_default=True, help="For checkpoints and logs; all nodes must see it."
)
@click.option("--steps", default=30, show_default=True, help="Optimizer steps.")
@click.option("--save-every", default=5, show_default=True, help="Steps between checkpoints.")
@click.option("--pause", default=0.0, show_default=True, help="Seconds after each step.")
@click.option("--timeout-min", default=60, show_default=True, help="The job's time limit in minutes.")
@click.option(
    "--cluster", type=click.Choice(["slurm", "local"]), default="slurm", show_default=True, help="Where the job runs."
)
@click.option("--partition", help="Slurm partition.")
def main(nodes: int, tasks_per_node: int, timeout_min: int, cluster: str, partition: str | None, **plan: Any) -> None:
    """Submit the training, print its output, and print the result of rank 0."""
    from weightferry.launch import submit
    from weightferry.launch.follow import follow

    folder = Path(plan.pop("folder")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"slurm_partition": partition} if partition else {}
    job = submit(
        train,
        TrainingPlan(folder=str(folder), **plan),
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        cluster=cluster,
        folder=folder / "jobs",
        timeout_min=timeout_min,
        stage=[plan["source"]],
        **options,
    )
    click.echo(f"job {job.job_id}, logs in {folder / 'jobs'}")
    code = follow(job, click.echo)
    if code == 0:
        click.echo(json.dumps(job.task(0).result()))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
