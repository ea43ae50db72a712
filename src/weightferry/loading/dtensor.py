"""Cut this rank's shard out of a full tensor, for FSDP2 and tensor-parallel modules, whose tensors are DTensors."""

from __future__ import annotations

import sys
from typing import Any

import torch


def is_dtensor(tensor: object) -> bool:
    """Whether `tensor` is a DTensor. The check does not import DTensor, which takes seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(full: torch.Tensor, like: Any) -> Any:
    """Return a DTensor with this rank's shard of `full`, split as `like` is; no communication between ranks.

    Parameters
    ----------
    full
        Has the shape of `like`. It is a view of a mapped file, of which only the shard is read.
    like
        A DTensor.

    Returns
    -------
    DTensor
        Its local tensor is a view of `full` if `like` is on the CPU.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(full.shape, like.device_mesh, like.placements)
    shard = full[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    if like.device_mesh.device_type != shard.device.type:
        # The device of `like` has an index: without one, every rank of a node would copy to the first GPU.
        shard = shard.to(like.to_local().device)
    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=full.shape,
        stride=torch.empty(full.shape, device="meta").stride(),
    )
