"""Of a whole tensor the part that this rank owns: for FSDP2 and tensor-parallel modules, whose tensors are DTensors."""

from __future__ import annotations

import sys
from typing import Any

import torch


def is_dtensor(tensor: object) -> bool:
    """Whether this is a DTensor; asked without the seconds that importing them costs."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(whole: torch.Tensor, like: Any) -> Any:
    """Make a DTensor that is split as `like` is, from this rank's part of `whole`; no rank speaks to another.

    Parameters
    ----------
    whole
        Of the shape of `like`; a view of a mapped file, of which only the part is read.
    like
        A DTensor.

    Returns
    -------
    DTensor
        Its part is a view of `whole` where `like` lives on the CPU.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
    part = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    if like.device_mesh.device_type != part.device.type:
        # With its index: a rank's tensors never come to be on the first GPU by accident.
        part = part.to(like.to_local().device)
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )
