"""Read the state in a file to the CPU, without running code from the file: torch's formats and safetensors."""

from __future__ import annotations

import io
import json
import logging
import pickle
import struct
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import safetensors.torch
import torch

from weightferry.errors import CollectError, LoadError, UnsafeFile
from weightferry.loading.formats import Format, detect_format
from weightferry.loading.pickles import LEGACY_PICKLES, allow_globals_in_torch, refusal_text, unsafe_globals
from weightferry.loading.weight_files import find_weights, read_weight_map, shard_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection

logger = logging.getLogger(__name__)

# The limit of safetensors itself (MAX_HEADER_SIZE in its tensor.rs).
_MAX_HEADER_BYTES = 100_000_000


def read_state(path: str | os.PathLike[str], *, mapped: bool = True, allow_globals: Collection[str] = ()) -> Any:
    """Return the state that `torch.save` or safetensors wrote to a file, without running code from the file.

    Parameters
    ----------
    path
        The file; its name does not matter. Or an index of shards, with the shards in its folder, or a folder that holds
        one of these.
    mapped
        Whether tensors may be views of the mapped file: bytes are read when they are used, and there is no second copy
        in memory. The mapping is private: writing to a tensor does not change the file. If False, tensors own their
        memory; use this for tensors that you keep. Old torch files are never mapped.
    allow_globals
        ``module.name`` of each name that a pickle may import beyond tensors and plain containers. These modules are
        imported.

    Returns
    -------
    Any
        Usually a mapping from names to tensors, all on the CPU.

    Raises
    ------
    UnsafeFile
        The pickle needs more than tensors and plain containers. This check cannot be switched off.
    LoadError
        The file cannot be read, is truncated or damaged, or has another format.
    """
    try:
        with allow_globals_in_torch(allow_globals):
            return _read(Path(path), mapped)
    except CollectError:
        raise
    except OSError as error:
        file = error.filename or path
        raise LoadError(f"cannot read {file}: {error.strerror or error}", subject=str(file)) from error


def _read(path: Path, mapped: bool) -> Any:
    if path.is_dir():
        return _read(find_weights(path), mapped)
    file_format = detect_format(path)
    if file_format is Format.INDEX:
        return _read_shards(path, mapped)
    try:
        return _READERS[file_format](path, mapped)
    except (CollectError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - torch raises exceptions of any class on damaged input
        cause = _first_error(error)
        text = f"cannot read {path}: it is truncated or damaged ({_first_line(cause)}). Download it again"
        raise LoadError(text, subject=str(path)) from cause


def _read_shards(index: Path, mapped: bool) -> dict[str, Any]:
    """Return the tensors of all shards of an index; if `mapped`, they are views of the mapped shards."""
    weight_map = read_weight_map(index)
    folder = shard_folder(index, next(iter(weight_map.values())))
    state: dict[str, Any] = {}
    for name in dict.fromkeys(weight_map.values()):
        shard = folder / name
        if shard.is_dir() or detect_format(shard) is Format.INDEX:  # an index that names itself would have no end
            raise LoadError(
                f"{index} names the shard {name}, which is a folder or an index, not a file of tensors. Download the "
                "index again",
                subject=str(index),
            )
        content = _read(shard, mapped)
        if not isinstance(content, Mapping):
            raise LoadError(f"{shard} holds a {type(content).__name__}, not a mapping of tensors", subject=str(shard))
        keys = [key for key, where in weight_map.items() if where == name]
        absent = [key for key in keys if key not in content]
        if absent:
            raise LoadError(
                f"{shard} lacks {len(absent)} of the {len(keys)} tensors that {index.name} says are in it: "
                f"{', '.join(absent[:5])}. Download the index and its shards again from one revision",
                subject=str(shard),
            )
        state.update((key, content[key]) for key in keys)
    return {key: state[key] for key in weight_map}


def _read_torch_zip(path: Path, mapped: bool) -> Any:
    pickle_name = _check_zip(path)
    try:
        # For a path that ends in .safetensors, torch assumes that format. For an open file it checks the content.
        if mapped and path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception:
        with zipfile.ZipFile(path) as archive:
            _refuse_if_unsafe(path, unsafe_globals(io.BytesIO(archive.read(pickle_name))))
        raise


def _read_torch_legacy(path: Path, mapped: bool) -> Any:
    if mapped:
        _log_unmapped_once(path)
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except Exception:
            file.seek(0)
            _refuse_if_unsafe(path, unsafe_globals(file, LEGACY_PICKLES))
            raise


@cache
def _log_unmapped_once(path: Path) -> None:
    logger.info(
        "%s has torch's old format, which cannot be mapped: each rank needs memory for a second copy while it loads",
        path,
    )


def _refuse_tar(path: Path, mapped: bool) -> NoReturn:
    del mapped
    raise UnsafeFile(
        f"refused to load {path}: it is a tar archive. If it contains other files, unpack it first. If torch before "
        "0.1.10 saved it, reading it runs its pickle: convert it once with torch.save, where this is safe.",
        subject=str(path),
    )


def _refuse_pickle(path: Path, mapped: bool) -> NoReturn:
    del mapped
    with path.open("rb") as file:
        _refuse_if_unsafe(path, unsafe_globals(file))
    raise LoadError(
        f"cannot load {path}: it is a pickle that torch.save did not write. Save a mapping of tensors with torch.save "
        "or safetensors, or give a custom hook that reads the file",
        subject=str(path),
    )


def _read_safetensors(path: Path, mapped: bool) -> dict[str, torch.Tensor]:
    _check_header(path)
    state = safetensors.torch.load_file(path, device="cpu")
    return state if mapped else {name: tensor.clone() for name, tensor in state.items()}


_READERS: dict[Format, Callable[[Path, bool], Any]] = {
    Format.TORCH_ZIP: _read_torch_zip,
    Format.TORCH_LEGACY: _read_torch_legacy,
    Format.TORCH_TAR: _refuse_tar,
    Format.PICKLE: _refuse_pickle,
    Format.SAFETENSORS: _read_safetensors,
}


def _check_zip(path: Path) -> str:
    """Check the directory of a zip, before torch allocates memory for it; return the name of the pickle in it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    # torch puts all entries into one folder. Its name is that of the file when it was saved.
    names = {entry.filename.partition("/")[2]: entry.filename for entry in entries}
    if "data.pkl" not in names:
        shown = ", ".join(entry.filename for entry in entries[:3])
        raise LoadError(
            f"cannot load {path}: it is a zip archive that torch.save did not write; it contains {shown}",
            subject=str(path),
        )
    if "constants.pkl" in names:
        raise LoadError(
            f"cannot load {path}: it is a TorchScript archive, which contains code. Open it with torch.jit.load on a "
            "machine where this is safe, and save its state_dict() with torch.save",
            subject=str(path),
        )
    # torch.save never compresses. A compressed entry cannot be mapped, and may expand to any size (a zip bomb).
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise LoadError(
            f"cannot load {path}: its zip entries have compression, which torch.save never uses. Save the state again "
            "with torch.save",
            subject=str(path),
        )
    _check_fits(path, 0, sum(entry.file_size for entry in entries))
    return names["data.pkl"]


def _check_header(path: Path) -> None:
    """Check a safetensors header, before memory is allocated for it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            raise LoadError(
                f"{path} is damaged, or is not a safetensors file: its header claims {length} bytes, the limit is "
                f"{_MAX_HEADER_BYTES}",
                subject=str(path),
            )
        _check_fits(path, 8, length)
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise LoadError(f"{path} is damaged: its header is not a JSON object", subject=str(path))
    spans = sorted((_span(entry), name) for name, entry in header.items() if name != "__metadata__")
    end, previous = 0, ""
    for (start, stop), name in spans:
        if not end <= start <= stop:
            raise LoadError(f"{path} is damaged: {name!r} overlaps {previous!r} in its header", subject=str(path))
        end, previous = stop, name
    _check_fits(path, 8 + length, end)


def _span(entry: Any) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    return int(start), int(stop)


def _check_fits(path: Path, start: int, length: int) -> None:
    size = path.stat().st_size
    if start + length > size:
        raise LoadError(
            f"{path} is truncated: its header promises {start + length} bytes, the file has {size}. Download it again",
            subject=str(path),
        )


def _refuse_if_unsafe(path: Path, names: list[str]) -> None:
    if names:
        # `from None`: the text of torch's error recommends to switch the check off.
        raise UnsafeFile(refusal_text(path, names), subject=str(path)) from None


def _first_error(error: Exception) -> BaseException:
    """Return the original error. torch replaces it by one whose text recommends to switch the safety check off."""
    if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
        return error.__context__
    return error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
