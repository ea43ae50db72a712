"""Onto a device through two buffers: every byte in its place, and no buffer filled again before it was read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from weightferry.loading.device_copy import may_be_placed, place
from weightferry.loading.hooks import load_module
from weightferry.loading.options import LoadOptions


class SlowGate:
    """Copies only when it is waited for, as a device that lags behind: too early a fill would show."""

    def __init__(self) -> None:
        self.sent: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.most = 0

    def buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def await_free(self, turn: int) -> None:
        if turn in self.sent:
            content, to = self.sent.pop(turn)
            to.copy_(content)

    def send(self, turn: int, content: torch.Tensor, to: torch.Tensor) -> None:
        assert turn not in self.sent
        self.sent[turn] = (content, to)
        self.most = max(self.most, len(self.sent))

    def finish(self) -> None:
        for turn in list(self.sent):
            self.await_free(turn)


@pytest.mark.parametrize("seed", range(20))
def test_every_byte_comes(seed: int) -> None:
    rng = random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    theirs = []
    for _ in range(rng.randrange(1, 6)):
        shape = [rng.randrange(0, 30) for _ in range(rng.randrange(0, 4))]
        theirs.append(torch.rand(shape).mul(100).to(rng.choice(dtypes)))
    ours = [torch.zeros_like(tensor) for tensor in theirs]
    gate = SlowGate()
    place(zip(theirs, ours, strict=True), gate, size=rng.choice([1, 7, 64, 4096]))
    assert all(map(torch.equal, theirs, ours))


def test_two_are_under_way() -> None:
    gate = SlowGate()
    place([(torch.ones(100), torch.zeros(100))], gate, size=64)
    assert gate.most == 2


def test_what_stays_on_the_cpu_is_not_placed() -> None:
    assert not may_be_placed(torch.ones(3), torch.ones(3))


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
