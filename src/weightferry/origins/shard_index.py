"""Which files an index of shards names, as `save_pretrained` writes it beside weights cut into several files."""

from __future__ import annotations

import json
import posixpath

from weightferry.errors import BadRequest, error_context
from weightferry.manifest import PinnedSource
from weightferry.origins.base import Origin
from weightferry.sources import SourceRequest, safe_path

INDEX_SUFFIX = ".index.json"
"""How such an index is named: ``model.safetensors.index.json``, ``pytorch_model.bin.index.json``."""
MAX_INDEX_SIZE = 256 << 20
"""Bytes of an index; those of the largest models of 2026 have 10 MB."""
MALFORMED_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What `weight_map` raises for what is no index; `BadRequest`, for a name that climbs out, is a ValueError."""


def is_index(name: str) -> bool:
    """Whether a file of this name is an index of shards."""
    return name.endswith(INDEX_SUFFIX)


def read_shard_paths(origin: Origin, pinned: PinnedSource, request: SourceRequest, path: str) -> tuple[str, ...]:
    """Read an index at its origin; return the paths of its shards, below the root as its own is.

    Raises
    ------
    BadRequest
        It is no index, or names files that lie elsewhere.
    CollectError
        As `Origin.read`.
    """
    file = pinned.file(path)
    content = bytearray()
    with error_context(subject=str(request)), origin.read(pinned, path, 0, None) as chunks:
        for chunk in chunks:
            content += chunk
            if len(content) > min(MAX_INDEX_SIZE, MAX_INDEX_SIZE if file.size is None else file.size):
                raise BadRequest(f"no index of shards: it has more than {len(content) - 1} bytes", subject=str(request))
    return tuple(posixpath.join(posixpath.dirname(path), name) for name in shard_names(bytes(content), str(request)))


def shard_names(content: bytes, subject: str) -> tuple[str, ...]:
    """Return the names of the files that an index names, each once, relative to its own folder.

    Raises
    ------
    BadRequest
        It is no index, or a name climbs out of its folder.
    """
    try:
        names = tuple(dict.fromkeys(weight_map(content).values()))
    except MALFORMED_ERRORS as error:
        raise BadRequest(f"no index of shards ({type(error).__name__}: {error})", subject=subject) from error
    if not names:
        raise BadRequest("this index names no shards", subject=subject)
    return names


def weight_map(content: bytes) -> dict[str, str]:
    """Return which file holds which tensor; what is no index raises one of `MALFORMED_ERRORS`."""
    return {name: safe_path(where) for name, where in json.loads(content)["weight_map"].items()}
