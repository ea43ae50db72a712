"""Whether all ranks hold the same numbers: a cheap digest of each tensor, compared between ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from weightferry.errors import LoadError, ranges
from weightferry.loading.dtensor import is_dtensor

Digests = dict[str, int]
"""By the name of a tensor, the CRC-32 of its bytes, shape and dtype."""

_AT_A_TIME = 64 << 20  # bytes brought to the CPU at a time


def tensor_digests(obj: Any) -> Digests:
    """Digest what ``obj.state_dict()`` holds, nested mappings and lists included.

    DTensors are left out, since each rank holds a part of its own. So are objects without ``state_dict``.
    """
    state = obj.state_dict() if callable(getattr(obj, "state_dict", None)) else {}
    return {name: _digest(value) for name, value in _leaves("", state) if not is_dtensor(value)}


def total(digests: Digests) -> int:
    """Join them into one number."""
    return zlib.crc32(repr(sorted(digests.items())).encode())


def different(totals: Mapping[int, Mapping[str, int]]) -> tuple[str, ...]:
    """Return the names of the loadables for which ranks said different totals."""
    names = dict.fromkeys(name for said in totals.values() for name in said)
    return tuple(name for name in names if len({said[name] for said in totals.values() if name in said}) > 1)


def explain_difference(name: str, said: Mapping[int, Digests], ranks: Sequence[int]) -> LoadError:
    """Make the error for a loadable that is not the same on all ranks.

    Parameters
    ----------
    said
        By rank of the operation, its digests.
    ranks
        By rank of the operation, the rank in the job.
    """
    keys = dict.fromkeys(key for digests in said.values() for key in digests)
    for key in keys:
        groups: dict[int | None, list[int]] = {}
        for rank, digests in said.items():
            groups.setdefault(digests.get(key), []).append(ranks[rank])
        if len(groups) > 1:
            told = [
                f"ranks {ranges(members)} {'have no such tensor' if crc is None else f'have CRC-32 {crc:08x}'}"
                for crc, members in sorted(groups.items(), key=lambda group: -len(group[1]))
            ]
            return LoadError(f"{name!r} is not the same on all ranks: of {key!r}, {', '.join(told)}", subject=name)
    return LoadError(f"{name!r} is not the same on all ranks", subject=name)


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
    for start in range(0, len(flat), _AT_A_TIME):
        crc = zlib.crc32(flat[start : start + _AT_A_TIME].cpu().numpy().data, crc)
    return crc
