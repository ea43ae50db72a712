"""Submit a training function to Slurm through submitit; the job goes on after a time-out or preemption.

    python examples/submitit_requeue.py org/name --nodes 2 --tasks-per-node 2

On the login node. Slurm starts the job again under the same id; what its first run staged is on the nodes.
"""

from __future__ import annotations

import argparse

from weightferry.launch import submit


def train(source: str) -> float:
    """Run on every rank, with an initialised process group; the source is staged on the node."""
    import torch
    from torch import distributed as dist
    from transformers import AutoModel

    import weightferry

    model = AutoModel.from_pretrained(weightferry.stage(source))  # already there: no byte moves
    number = float(sum(parameter.detach().double().abs().sum() for parameter in model.parameters()))
    total = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(total)
    assert abs(float(total) / dist.get_world_size() - number) < 1e-6 * number, "the ranks hold different weights"
    return number


def main() -> None:
    """Submit, wait, and print what every rank returned."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tasks-per-node", type=int, default=2)
    parser.add_argument("--cluster", default="slurm", help="slurm, or local for processes on this machine")
    parser.add_argument("--folder", default="weightferry-jobs")
    given = parser.parse_args()
    options = {"nodes": given.nodes, "tasks_per_node": given.tasks_per_node, "cluster": given.cluster}
    job = submit(train, given.source, **options, folder=given.folder, stage=[given.source], requeue=True)
    for rank, number in enumerate(job.results()):
        print(f"rank {rank}: fingerprint {number:.6f}")


if __name__ == "__main__":
    main()
