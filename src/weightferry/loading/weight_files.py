"""Weights in several files: the index that names them, where they lie, and which file of a folder holds the weights."""

from __future__ import annotations

import os
from pathlib import Path

from weightferry.errors import LoadError, redact
from weightferry.loading.formats import Format, tell_format
from weightferry.origins.shard_index import LARGEST, MALFORMED
from weightferry.origins.shard_index import weight_map as parse

_MOST_LINKS = 40  # as Linux follows
# In a folder the first of these that names exactly one file is taken, as transformers does it.
_PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "*.safetensors.index.json",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.bin.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
)


def files_behind(path: Path) -> list[Path]:
    """Return the files that hold the weights of a loadable: itself, or what its index or folder means.

    What cannot be told is left to whoever reads it.
    """
    try:
        path = weights_in(path) if path.is_dir() else path
        if tell_format(path) is not Format.INDEX:
            return [path]
        named = dict.fromkeys(weight_map(path).values())
        folder = beside(path, next(iter(named)))
        return [folder / name for name in named if (folder / name).is_file()]
    except (LoadError, OSError):
        return []


def weight_map(index: Path) -> dict[str, str]:
    """Read which file holds which tensor.

    Raises
    ------
    LoadError
        It is no index, or names files outside of its folder.
    """
    subject = str(index)
    if index.stat().st_size > LARGEST:
        raise LoadError(f"{index} is too large for an index of shards", subject=subject)
    try:
        shards = parse(index.read_bytes())
    except MALFORMED as error:
        text = redact(f"{type(error).__name__}: {error}"[:200])
        raise LoadError(f"{index} is no index of shards, or is damaged ({text})", subject=subject) from error
    if not shards:
        raise LoadError(f"{index} names no tensors", subject=subject)
    return shards


def beside(index: Path, shard: str) -> Path:
    """Return the folder in which the shards of an index lie.

    The index may be a link, in a cache one link behind another: of the folders on the way, the one with the shards.

    Raises
    ------
    LoadError
        None has them.
    """
    path, seen = index.absolute(), []
    for _ in range(_MOST_LINKS):
        if (path.parent / shard).exists():
            return path.parent
        seen.append(str(path.parent))
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
    raise LoadError(
        f"{index} names the shard {shard}, which is not beside it; looked in {', '.join(dict.fromkeys(seen))}",
        subject=str(index),
    )


def weights_in(folder: Path) -> Path:
    """Return the file of a folder that holds its weights, or the index of them.

    Raises
    ------
    LoadError
        There is none, or it cannot be told which of several.
    """
    for pattern in _PREFERRED:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise LoadError(
                f"{folder} holds {len(found)} files that may be the weights ({names}); name the one that is meant",
                subject=str(folder),
            )
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise LoadError(f"{folder} holds no weights: there is {there}", subject=str(folder))
