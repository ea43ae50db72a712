"""Onto a GPU through pinned buffers: while one is on its way, the next is filled from the mapped file.

A copy from pageable memory waits for a staging buffer of the driver's own and for the page faults of the mapping, one
after the other; through two pinned buffers both go on at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

_BUFFER = 32 << 20  # bytes of each of the two: the bus is at its full speed from a few MB on


class DeviceCopier(Protocol):
    """What leads to a device."""

    def buffer(self, size: int) -> torch.Tensor:
        """Make a buffer that the device can read by itself, of `size` bytes."""

    def await_free(self, turn: int) -> None:
        """Wait until what was sent from buffer number `turn` has been read."""

    def send(self, turn: int, content: torch.Tensor, to: torch.Tensor) -> None:
        """Begin to copy; `content` is a part of buffer number `turn`."""

    def finish(self) -> None:
        """Wait until all has arrived, and let what follows on the device see it."""


class CudaDeviceCopier:
    """A stream of its own beside the one that the program uses.

    Parameters
    ----------
    device
        With its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device)
        # What the program still does with the old numbers comes first.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._sent: dict[int, Any] = {}

    def buffer(self, size: int) -> torch.Tensor:
        """See `DeviceCopier.buffer`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def await_free(self, turn: int) -> None:
        """See `DeviceCopier.await_free`."""
        if turn in self._sent:
            self._sent.pop(turn).synchronize()

    def send(self, turn: int, content: torch.Tensor, to: torch.Tensor) -> None:
        """See `DeviceCopier.send`."""
        with torch.cuda.stream(self._stream):
            to.copy_(content, non_blocking=True)
            self._sent[turn] = self._stream.record_event()

    def finish(self) -> None:
        """See `DeviceCopier.finish`."""
        self._stream.synchronize()


def may_be_placed(theirs: object, ours: object) -> bool:
    """Whether the bytes of one are copied to the other as they are, from the CPU to a GPU."""
    return (
        type(theirs) is torch.Tensor
        and isinstance(ours, torch.Tensor)
        and ours.is_cuda
        and theirs.device.type == "cpu"
        and theirs.dtype == ours.dtype
        and theirs.shape == ours.shape
        and theirs.is_contiguous()
        and ours.is_contiguous()
    )


def place(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], gate: DeviceCopier, size: int = _BUFFER) -> None:
    """Copy each first tensor, on the CPU, into the second one, byte for byte.

    Parameters
    ----------
    pairs
        Of equal shapes and dtypes, contiguous.
    size
        Bytes of each of two buffers.
    """
    buffers = [gate.buffer(size) for _ in range(2)]
    turn = 0
    for theirs, ours in pairs:
        source = theirs.detach().reshape(-1).view(torch.uint8)
        target = ours.detach().view(-1).view(torch.uint8)
        for start in range(0, len(source), size):
            part = source[start : start + size]
            gate.await_free(turn)
            content = buffers[turn][: len(part)]
            content.copy_(part)
            gate.send(turn, content, target[start : start + len(part)])
            turn = 1 - turn
    gate.finish()
