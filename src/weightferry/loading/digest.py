"""Check that all ranks hold the same values: compute a cheap digest of each tensor, and compare it between ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from weightferry.errors import LoadError, format_ranks
from weightferry.loading.dtensor import is_dtensor

Digests = dict[str, int]
"""By the name of a tensor, the CRC-32 of its bytes, shape and dtype."""

_CHUNK_SIZE = 64 << 20  # bytes copied to the CPU at a time


def tensor_digests(obj: Any) -> Digests:
    """Return the digest of each value in ``obj.state_dict()``, including those in nested mappings and lists.

    DTensors are left out, since each rank holds a different shard. Objects without ``state_dict`` have no digests.
    """
    state = obj.state_dict() if callable(getattr(obj, "state_dict", None)) else {}
    return {name: _digest(value) for name, value in _leaves("", state) if not is_dtensor(value)}


def combine_digests(digests: Digests) -> int:
    """Return one CRC-32 over all digests of a loadable."""
    return zlib.crc32(repr(sorted(digests.items())).encode())


def find_differing(combined: Mapping[int, Mapping[str, int]]) -> tuple[str, ...]:
    """Return the names of the loadables whose combined digests differ between ranks.

    Parameters
    ----------
    combined
        By rank, then by loadable: the value of `combine_digests`.
    """
    names = dict.fromkeys(name for by_name in combined.values() for name in by_name)
    return tuple(name for name in names if len({by_name[name] for by_name in combined.values() if name in by_name}) > 1)


def difference_error(name: str, digests_by_rank: Mapping[int, Digests], job_ranks: Sequence[int]) -> LoadError:
    """Return the error for a loadable that differs between ranks; it names the first value that differs.

    Parameters
    ----------
    digests_by_rank
        By rank of the operation, its digests.
    job_ranks
        By rank of the operation, the rank in the job.
    """
    detail = ""
    for key in dict.fromkeys(key for digests in digests_by_rank.values() for key in digests):
        groups: dict[int | None, list[int]] = {}
        for rank, digests in digests_by_rank.items():
            groups.setdefault(digests.get(key), []).append(job_ranks[rank])
        if len(groups) > 1:
            values = [
                f"{'missing' if crc is None else f'CRC-32 {crc:08x}'} on {_rank_list(members)}"
                for crc, members in sorted(groups.items(), key=lambda group: -len(group[1]))
            ]
            detail = f": {key!r} is {', '.join(values)}"
            break
    return LoadError(
        f"{name!r} is not the same on all ranks{detail}. Load the same file on every rank, or set "
        "LoadOptions(rank_specific=True) if ranks must load different values",
        subject=name,
    )


def _rank_list(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {format_ranks(ranks)}"


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), inner)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _leaves(f"{path}[{number}]", inner)
    elif isinstance(value, (torch.Tensor, int, float, bool, str, bytes)) or value is None:
        yield path, value


def _digest(value: Any) -> int:
    if not isinstance(value, torch.Tensor):
        return zlib.crc32(repr(value).encode())
    crc = zlib.crc32(f"{tuple(value.shape)} {value.dtype}".encode())
    if value.is_meta or value.layout is not torch.strided or value.numel() == 0:
        return crc
    flat = value.detach().contiguous().reshape(-1)
    if flat.is_quantized:
        flat = flat.int_repr()
    flat = flat.view(torch.uint8)
    for start in range(0, len(flat), _CHUNK_SIZE):
        crc = zlib.crc32(flat[start : start + _CHUNK_SIZE].cpu().numpy().data, crc)
    return crc
