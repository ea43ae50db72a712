"""Copies to a device through two buffers: every byte arrives, and no buffer is filled again before it was read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from weightferry.loading.device_copy import can_copy_directly, copy_to_device
from weightferry.loading.hooks import load_module
from weightferry.loading.options import LoadOptions


class SlowCopier:
    """Copies only when it is waited for, like a slow device: a buffer that is filled too early fails the test."""

    def __init__(self) -> None:
        self.pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.max_pending = 0

    def allocate(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def wait_until_free(self, buffer_index: int) -> None:
        if buffer_index in self.pending:
            content, target = self.pending.pop(buffer_index)
            target.copy_(content)

    def start_copy(self, buffer_index: int, content: torch.Tensor, target: torch.Tensor) -> None:
        assert buffer_index not in self.pending
        self.pending[buffer_index] = (content, target)
        self.max_pending = max(self.max_pending, len(self.pending))

    def synchronize(self) -> None:
        for buffer_index in list(self.pending):
            self.wait_until_free(buffer_index)


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_arrives(seed: int) -> None:
    rng = random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    sources = []
    for _ in range(rng.randrange(1, 6)):
        shape = [rng.randrange(0, 12) for _ in range(rng.randrange(0, 4))]
        sources.append(torch.rand(shape).mul(100).to(rng.choice(dtypes)))
    targets = [torch.zeros_like(tensor) for tensor in sources]
    copier = SlowCopier()
    copy_to_device(zip(sources, targets, strict=True), copier, buffer_size=rng.choice([1, 7, 64, 4096]))
    assert all(map(torch.equal, sources, targets))


def test_two_copies_are_pending() -> None:
    copier = SlowCopier()
    copy_to_device([(torch.ones(100), torch.zeros(100))], copier, buffer_size=64)
    assert copier.max_pending == 2


def test_a_target_on_the_cpu_is_not_copied_directly() -> None:
    assert not can_copy_directly(torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("device", [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["no device"])
@pytest.mark.parametrize("meta", [False, True])
def test_on_a_gpu(device: str, meta: bool, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    saved = nn.Sequential(nn.Linear(4096, 4096), nn.BatchNorm1d(4096))
    torch.save(saved.state_dict(), tmp_path / "file")
    with torch.device("meta" if meta else device):
        module = nn.Sequential(nn.Linear(4096, 4096), nn.BatchNorm1d(4096))
    load_module(module, tmp_path / "file", options=LoadOptions(device=device))
    for key, tensor in module.state_dict().items():
        assert str(tensor.device) == device
        assert torch.equal(tensor.cpu(), saved.state_dict()[key])
