"""Measures the rate between neighbouring nodes, and the rate from the origin."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from weightferry.cluster.coordinator import Coordinator
from weightferry.doctor.findings import OriginRate, PeerRate
from weightferry.errors import CollectError, redact
from weightferry.settings import Settings
from weightferry.sources import SourceRequest

_MESSAGE = 64_000_000  # bytes
_MESSAGES = 4
_TIMEOUT = timedelta(seconds=120)  # four messages at 20 Mbit/s
_ORIGIN_SECONDS = 20.0


def measure_peers(coordinator: Coordinator) -> list[PeerRate]:
    """Send bytes round a ring over the job's gloo group, on all nodes at the same time."""
    if coordinator.world_size == 1:
        return []
    rates: Mapping[int, float] = coordinator.run_phase(
        "peers", lambda: _receive_rate(coordinator.rank, coordinator.world_size), dict
    )
    size = coordinator.world_size
    return [{"sender": (rank - 1) % size, "receiver": rank, "mb_s": rates[rank]} for rank in sorted(rates)]


def _receive_rate(rank: int, size: int) -> float:
    """Send to the next rank, receive from the previous one; return the MB/s received."""
    _exchange(rank, size, 1, 1)  # a first byte, so that the neighbours start together
    return round(_exchange(rank, size, _MESSAGE, _MESSAGES), 1)


def _exchange(rank: int, size: int, count: int, messages: int) -> float:
    import torch
    from torch import distributed as dist

    sent, received = torch.zeros(count, dtype=torch.uint8), torch.empty(count, dtype=torch.uint8)
    began = time.monotonic()
    # The content is not used: all messages arrive in one buffer.
    works = [dist.irecv(received, (rank - 1) % size) for _ in range(messages)]
    works += [dist.isend(sent, (rank + 1) % size) for _ in range(messages)]
    for work in works:
        assert work is not None  # noqa: S101 -- None only for ranks outside of the group
        work.wait(_TIMEOUT)
    return count * messages / 1e6 / (time.monotonic() - began)


def measure_origin(coordinator: Coordinator, source: str | None, size: int, settings: Settings) -> OriginRate | None:
    """Read up to `size` bytes of a source on rank 0, over one connection and for at most 20 seconds."""
    if source is None:
        return None
    return coordinator.run_on_rank0("origin", lambda: _read_origin(source, size, settings, coordinator))


def _read_origin(source: str, size: int, settings: Settings, coordinator: Coordinator) -> OriginRate:
    from weightferry.origins.base import RangeIgnored
    from weightferry.origins.pin_sources import pin_sources
    from weightferry.origins.registry import origin_for

    rate: OriginRate = {"source": redact(source), "error": None, "bytes": 0, "seconds": 0.0, "mb_s": None}
    try:
        pinned = pin_sources([SourceRequest.of(source)], settings, coordinator).manifest.sources[0]
        largest = max(pinned.files, key=lambda file: file.size or 0)
        began = time.monotonic()
        with origin_for(pinned.source.scheme, settings).read(pinned, largest.path) as chunks:
            for chunk in chunks:
                rate["bytes"] += len(chunk)
                rate["seconds"] = round(time.monotonic() - began, 3)
                if rate["bytes"] >= size or rate["seconds"] > _ORIGIN_SECONDS:
                    break
    except (CollectError, RangeIgnored, OSError) as error:
        rate["error"] = redact(f"{type(error).__name__}: {error}")
    if rate["seconds"]:
        rate["mb_s"] = round(rate["bytes"] / 1e6 / rate["seconds"], 1)
    return rate
