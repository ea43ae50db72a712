"""Find the files that hold weights: the weights file of a folder, and the shards that an index names."""

from __future__ import annotations

import os
from pathlib import Path

from weightferry.errors import LoadError, redact
from weightferry.loading.formats import Format, detect_format
from weightferry.origins.shard_index import MALFORMED_ERRORS, MAX_INDEX_SIZE
from weightferry.origins.shard_index import weight_map as parse_weight_map

_MAX_LINKS = 40  # symbolic links that Linux follows for one path
# The first pattern with exactly one match in a folder gives its weights, as in transformers.
_PREFERRED_PATTERNS = (
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


def list_weight_files(path: Path) -> list[Path]:
    """Return the files that hold the weights of a loadable: the file itself, or the files of its index or folder.

    Returns nothing if these files cannot be found; the reader of `path` then raises the error.
    """
    try:
        path = find_weights(path) if path.is_dir() else path
        if detect_format(path) is not Format.INDEX:
            return [path]
        shards = dict.fromkeys(read_weight_map(path).values())
        folder = shard_folder(path, next(iter(shards)))
        return [folder / shard for shard in shards if (folder / shard).is_file()]
    except (LoadError, OSError):
        return []


def read_weight_map(index: Path) -> dict[str, str]:
    """Return, by the name of a tensor, the name of the shard that holds it.

    Raises
    ------
    LoadError
        `index` is not an index of shards, or names files outside of its folder.
    """
    subject = str(index)
    if index.stat().st_size > MAX_INDEX_SIZE:
        raise LoadError(
            f"{index} is too large for an index of shards: more than {MAX_INDEX_SIZE} bytes", subject=subject
        )
    try:
        shards = parse_weight_map(index.read_bytes())
    except MALFORMED_ERRORS as error:
        text = redact(f"{type(error).__name__}: {error}"[:200])
        raise LoadError(f"{index} is not an index of shards, or is damaged ({text})", subject=subject) from error
    if not shards:
        raise LoadError(f"{index} names no tensors; download it again", subject=subject)
    return shards


def shard_folder(index: Path, shard: str) -> Path:
    """Return the folder that holds the shards of an index.

    The index may be a symbolic link, and in a cache a link to another link. The result is the first folder on this way
    that contains `shard`.

    Raises
    ------
    LoadError
        None of these folders contains `shard`.
    """
    path, searched = index.absolute(), []
    for _ in range(_MAX_LINKS):
        if (path.parent / shard).exists():
            return path.parent
        searched.append(str(path.parent))
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
    raise LoadError(
        f"{index} names the shard {shard}, which does not exist beside it; searched in "
        f"{', '.join(dict.fromkeys(searched))}. Copy or download all shards of the index into its folder",
        subject=str(index),
    )


def find_weights(folder: Path) -> Path:
    """Return the file in a folder that holds the weights, or their index.

    Raises
    ------
    LoadError
        The folder holds no weights, or several files that may be the weights.
    """
    for pattern in _PREFERRED_PATTERNS:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise LoadError(
                f"{folder} holds {len(found)} files that may be the weights ({names}); "
                "give the path of one file instead of the folder",
                subject=str(folder),
            )
    content = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise LoadError(
        f"{folder} holds no weights: it contains {content}. Give a folder with a weights file, or the path of the file",
        subject=str(folder),
    )
