"""Copy tensors from the CPU to a GPU through two pinned buffers.

While the device reads one buffer, the CPU fills the other one from the mapped file. A copy from pageable memory does
these steps one after the other: it waits for the driver's staging buffer and for the page faults of the mapping.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

_BUFFER_SIZE = 32 << 20  # bytes of each of the two buffers: the bus reaches its full speed at a few MB


class DeviceCopier(Protocol):
    """Copies from buffers in pinned memory to one device."""

    def allocate(self, size: int) -> torch.Tensor:
        """Return a buffer of `size` bytes that the device can read directly."""

    def wait_until_free(self, buffer_index: int) -> None:
        """Wait until the device has read what was last sent from this buffer."""

    def start_copy(self, buffer_index: int, content: torch.Tensor, target: torch.Tensor) -> None:
        """Start to copy `content`, a part of this buffer, to `target` on the device."""

    def synchronize(self) -> None:
        """Wait until all copies are complete. Later work on the device then sees the new values."""


class CudaDeviceCopier:
    """Copies to a CUDA device on a stream of its own, beside the stream of the program.

    Parameters
    ----------
    device
        The device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device)
        # The program may still read the old values: its queued work runs first.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._copies: dict[int, Any] = {}

    def allocate(self, size: int) -> torch.Tensor:
        """See `DeviceCopier.allocate`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def wait_until_free(self, buffer_index: int) -> None:
        """See `DeviceCopier.wait_until_free`."""
        if buffer_index in self._copies:
            self._copies.pop(buffer_index).synchronize()

    def start_copy(self, buffer_index: int, content: torch.Tensor, target: torch.Tensor) -> None:
        """See `DeviceCopier.start_copy`."""
        with torch.cuda.stream(self._stream):
            target.copy_(content, non_blocking=True)
            self._copies[buffer_index] = self._stream.record_event()

    def synchronize(self) -> None:
        """See `DeviceCopier.synchronize`."""
        self._stream.synchronize()


def can_copy_directly(source: object, target: object) -> bool:
    """Whether the bytes of `source` on the CPU can be copied unchanged to `target` on a GPU."""
    return (
        type(source) is torch.Tensor
        and isinstance(target, torch.Tensor)
        and target.is_cuda
        and source.device.type == "cpu"
        and source.dtype == target.dtype
        and source.shape == target.shape
        and source.is_contiguous()
        and target.is_contiguous()
    )


def copy_to_device(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], copier: DeviceCopier, buffer_size: int = _BUFFER_SIZE
) -> None:
    """Copy the first tensor of each pair, on the CPU, into the second one, byte for byte.

    Parameters
    ----------
    pairs
        The two tensors of a pair have the same shape and dtype, and are contiguous.
    buffer_size
        Bytes of each of the two buffers.
    """
    buffers = [copier.allocate(buffer_size) for _ in range(2)]
    buffer_index = 0
    for source, target in pairs:
        source_bytes = source.detach().reshape(-1).view(torch.uint8)
        target_bytes = target.detach().view(-1).view(torch.uint8)
        for start in range(0, len(source_bytes), buffer_size):
            chunk = source_bytes[start : start + buffer_size]
            copier.wait_until_free(buffer_index)
            content = buffers[buffer_index][: len(chunk)]
            content.copy_(chunk)
            copier.start_copy(buffer_index, content, target_bytes[start : start + len(chunk)])
            buffer_index = 1 - buffer_index
    copier.synchronize()
