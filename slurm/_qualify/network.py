"""Rates between neighbouring nodes, and from the origin."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from slurm._qualify.values import OriginRate, Peer
from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import CollectError, redact
from weightferry.settings import Settings
from weightferry.sources import SourceRequest

_PIECE = 64_000_000  # bytes
_PIECES = 4
_LIMIT = timedelta(seconds=120)  # four pieces at 20 Mbit/s
_ORIGIN_SECONDS = 20.0


def peer_rates(coordinator: Coordinator) -> list[Peer]:
    """Send round a ring over the job's gloo group, all nodes at the same time."""
    if coordinator.world_size == 1:
        return []
    rates: Mapping[int, float] = coordinator.round(
        "peers", lambda: _pass_on(coordinator.rank, coordinator.world_size), dict
    )
    size = coordinator.world_size
    return [{"sender": (rank - 1) % size, "receiver": rank, "mb_s": rates[rank]} for rank in sorted(rates)]


def _pass_on(rank: int, size: int) -> float:
    """Send to the right, receive from the left; MB/s of what came."""
    _exchange(rank, size, 1, 1)  # lets the neighbours begin together
    return round(_exchange(rank, size, _PIECE, _PIECES), 1)


def _exchange(rank: int, size: int, count: int, pieces: int) -> float:
    import torch
    from torch import distributed as dist

    sent, received = torch.zeros(count, dtype=torch.uint8), torch.empty(count, dtype=torch.uint8)
    began = time.monotonic()
    # What comes is not looked at: all pieces may land in one place.
    works = [dist.irecv(received, (rank - 1) % size) for _ in range(pieces)]
    works += [dist.isend(sent, (rank + 1) % size) for _ in range(pieces)]
    for work in works:
        assert work is not None  # noqa: S101 -- None only for ranks outside of the group
        work.wait(_LIMIT)
    return count * pieces / 1e6 / (time.monotonic() - began)


def origin_rate(coordinator: Coordinator, source: str | None, size: int, settings: Settings) -> OriginRate | None:
    """Read up to `size` bytes of a source on rank 0, over one connection and for some seconds at most."""
    if source is None:
        return None
    return coordinator.once("origin", lambda: _read_from(source, size, settings, coordinator))


def _read_from(source: str, size: int, settings: Settings, coordinator: Coordinator) -> OriginRate:
    from weightferry.origins.base import RangeIgnored, origin_for
    from weightferry.origins.pin_sources import resolve

    rate: OriginRate = {"source": redact(source), "error": None, "bytes": 0, "seconds": 0.0, "mb_s": None}
    try:
        pinned = resolve([SourceRequest.of(source)], settings, coordinator).manifest.sources[0]
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
