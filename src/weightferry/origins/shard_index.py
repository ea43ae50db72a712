"""Reads an index of shards: the file that `save_pretrained` writes beside weights in several files."""

from __future__ import annotations

import json
import posixpath

from weightferry.errors import BadRequest, error_context
from weightferry.manifest import PinnedSource
from weightferry.origins.base import Origin
from weightferry.sources import SourceRequest, safe_path

INDEX_SUFFIX = ".index.json"
"""End of the name of an index: ``model.safetensors.index.json``, ``pytorch_model.bin.index.json``."""
MAX_INDEX_SIZE = 256 << 20
"""Maximum bytes of an index; the indexes of the largest models of 2026 have 10 MB."""
MALFORMED_ERRORS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors of `weight_map` for a file that is not an index. `BadRequest`, for a bad file name, is a `ValueError`."""


def is_index(name: str) -> bool:
    """Return whether `name` is the file name of an index of shards."""
    return name.endswith(INDEX_SUFFIX)


def read_shard_paths(origin: Origin, pinned: PinnedSource, request: SourceRequest, path: str) -> tuple[str, ...]:
    """Read an index at its origin; return the paths of its shards below the root of the source.

    Raises
    ------
    BadRequest
        The file is not an index, or it names files outside of its folder.
    CollectError
        As of `Origin.read`.
    """
    file = pinned.file(path)
    content = bytearray()
    with error_context(subject=str(request)), origin.read(pinned, path, 0, None) as chunks:
        for chunk in chunks:
            content += chunk
            if len(content) > min(MAX_INDEX_SIZE, MAX_INDEX_SIZE if file.size is None else file.size):
                raise BadRequest(f"not an index of shards: more than {len(content) - 1} bytes", subject=str(request))
    return tuple(posixpath.join(posixpath.dirname(path), name) for name in shard_names(bytes(content), str(request)))


def shard_names(content: bytes, subject: str) -> tuple[str, ...]:
    """Return the file names in an index, each once, relative to the folder of the index.

    Raises
    ------
    BadRequest
        `content` is not an index, or a name is outside of its folder.
    """
    try:
        names = tuple(dict.fromkeys(weight_map(content).values()))
    except MALFORMED_ERRORS as error:
        raise BadRequest(f"not an index of shards ({type(error).__name__}: {error})", subject=subject) from error
    if not names:
        raise BadRequest("the index names no shards", subject=subject)
    return names


def weight_map(content: bytes) -> dict[str, str]:
    """Return, for each tensor, the name of its file; raise one of `MALFORMED_ERRORS` if it is not an index."""
    return {tensor: safe_path(file) for tensor, file in json.loads(content)["weight_map"].items()}
