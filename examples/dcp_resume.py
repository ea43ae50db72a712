"""Stage a checkpoint folder of torch.distributed.checkpoint (DCP), and resume from it with another number of ranks.

    torchrun --nproc-per-node 2 examples/dcp_resume.py org/checkpoint

Each rank opens the local copy of its node; DCP reads from it what this rank owns.
"""

from __future__ import annotations

import sys

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import weightferry


def main(source: str) -> None:
    """Stage, read with DCP, go on."""
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())  # other numbers on every rank, to show that the checkpoint replaces them
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())

    folder = weightferry.stage(source)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    number = float(sum(parameter.full_tensor().double().abs().sum() for parameter in model.parameters()))
    print(f"rank {dist.get_rank()}: fingerprint {number:.6f} at step {int(state['step'])}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
