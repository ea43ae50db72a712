"""From a file to the state it holds, on the CPU and without running anything: torch's formats and safetensors."""

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
from weightferry.loading.formats import Format, tell_format
from weightferry.loading.pickles import LEGACY_PICKLES, allowed, explain, unsafe_globals
from weightferry.loading.weight_files import beside, weight_map, weights_in

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection

logger = logging.getLogger(__name__)

# What safetensors itself accepts (MAX_HEADER_SIZE in its tensor.rs).
_MAX_HEADER_BYTES = 100_000_000


def read_state(path: str | os.PathLike[str], *, mapped: bool = True, allow_globals: Collection[str] = ()) -> Any:
    """Read what `torch.save` or safetensors wrote, without running code from it.

    Parameters
    ----------
    path
        The file; its name does not matter. Or an index of shards, which lie beside it, or a folder that holds one of
        these.
    mapped
        Whether tensors may be views of the mapped file: nothing is read before it is used, and no second copy is
        held. The map is private, writing to a tensor never reaches the file. Without it tensors own their memory;
        ask for that when they are kept. Old torch files are never mapped.
    allow_globals
        ``module.name`` of what a pickle may use beyond tensors and plain containers. These modules are imported.

    Returns
    -------
    Any
        Usually a mapping from names to tensors, all on the CPU.

    Raises
    ------
    UnsafeFile
        The pickle wants more than tensors and plain containers. No switch turns this check off.
    LoadError
        The file cannot be read, is truncated or damaged, or holds something else.
    """
    try:
        with allowed(allow_globals):
            return _read(Path(path), mapped)
    except CollectError:
        raise
    except OSError as error:
        where = error.filename or path
        raise LoadError(f"cannot read {where}: {error.strerror or error}", subject=str(where)) from error


def _read(path: Path, mapped: bool) -> Any:
    if path.is_dir():
        return _read(weights_in(path), mapped)
    kind = tell_format(path)
    if kind is Format.INDEX:
        return _read_shards(path, mapped)
    try:
        return _READERS[kind](path, mapped)
    except (CollectError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - what torch raises on damaged input is of any class
        cause = _without_advice(error)
        text = f"{path} could not be read, it is truncated or damaged: {_first_line(cause)}"
        raise LoadError(text, subject=str(path)) from cause


def _read_shards(index: Path, mapped: bool) -> dict[str, Any]:
    """Join the shards of an index: views of mapped files, which are read where they are used."""
    named = weight_map(index)
    folder = beside(index, next(iter(named.values())))
    state: dict[str, Any] = {}
    for shard in dict.fromkeys(named.values()):
        part = _read(folder / shard, mapped)
        if not isinstance(part, Mapping):
            raise LoadError(f"{folder / shard} holds a {type(part).__name__}, no tensors", subject=str(folder / shard))
        wanted = [key for key, where in named.items() if where == shard]
        absent = [key for key in wanted if key not in part]
        if absent:
            raise LoadError(
                f"{folder / shard} lacks {len(absent)} of the {len(wanted)} tensors that {index.name} says are in it: "
                f"{', '.join(absent[:5])}",
                subject=str(folder / shard),
            )
        state.update((key, part[key]) for key in wanted)
    return {key: state[key] for key in named}


def _read_torch_zip(path: Path, mapped: bool) -> Any:
    data = _check_zip(path)
    try:
        # torch takes a file named .safetensors for one unread; only an open file is judged by its content.
        if mapped and path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception:
        with zipfile.ZipFile(path) as archive:
            _refuse_if_unsafe(path, unsafe_globals(io.BytesIO(archive.read(data))))
        raise


def _read_torch_legacy(path: Path, mapped: bool) -> Any:
    if mapped:
        _say_once(path)
    with path.open("rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except Exception:
            file.seek(0)
            _refuse_if_unsafe(path, unsafe_globals(file, LEGACY_PICKLES))
            raise


@cache
def _say_once(path: Path) -> None:
    logger.info(
        "%s is in torch's old format, which cannot be mapped: each rank holds a second copy while it loads", path
    )


def _refuse_tar(path: Path, mapped: bool) -> NoReturn:
    del mapped
    raise UnsafeFile(
        f"{path} is a tar archive. If it bundles other files, unpack it first; if torch before 0.1.10 saved it, it can "
        "only be read by running its pickle, which is refused: convert it once, where that does no harm.",
        subject=str(path),
    )


def _refuse_pickle(path: Path, mapped: bool) -> NoReturn:
    del mapped
    with path.open("rb") as file:
        _refuse_if_unsafe(path, unsafe_globals(file))
    raise LoadError(
        f"{path} is a pickle that torch.save did not write; save a mapping of tensors with torch.save or safetensors, "
        "or give a custom hook that reads it",
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
    """Check a zip's directory before torch allocates by it; return the name of the pickle in it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    # torch puts everything into one folder, named like the file at the time.
    names = {entry.filename.partition("/")[2]: entry.filename for entry in entries}
    if "data.pkl" not in names:
        shown = ", ".join(entry.filename for entry in entries[:3])
        raise LoadError(f"{path} is a zip archive, but not of torch.save; it holds {shown}", subject=str(path))
    if "constants.pkl" in names:
        raise LoadError(
            f"{path} is a TorchScript archive, which holds code; open it with torch.jit.load where that does no harm, "
            "and save its state_dict() with torch.save",
            subject=str(path),
        )
    # torch.save never compresses. A compressed entry cannot be mapped, and may be a bomb.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise LoadError(
            f"{path} was packed again, with compression; save it once more with torch.save", subject=str(path)
        )
    _check_fits(path, 0, sum(entry.file_size for entry in entries))
    return names["data.pkl"]


def _check_header(path: Path) -> None:
    """Check a safetensors header before anything is allocated by it."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            raise LoadError(
                f"{path} is damaged, or no safetensors file: its header claims {length} bytes", subject=str(path)
            )
        _check_fits(path, 8, length)
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise LoadError(f"{path} is damaged: its header is no JSON object", subject=str(path))
    spans = sorted((_span(entry), name) for name, entry in header.items() if name != "__metadata__")
    end, before = 0, ""
    for (start, stop), name in spans:
        if not end <= start <= stop:
            raise LoadError(f"{path} is damaged: {name!r} overlaps {before!r} in its header", subject=str(path))
        end, before = stop, name
    _check_fits(path, 8 + length, end)


def _span(entry: Any) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    return int(start), int(stop)


def _check_fits(path: Path, start: int, length: int) -> None:
    size = path.stat().st_size
    if start + length > size:
        raise LoadError(f"{path} is truncated: it promises {start + length} bytes and has {size}", subject=str(path))


def _refuse_if_unsafe(path: Path, wanted: list[str]) -> None:
    if wanted:
        # Without the cause: torch's own text advises to switch the check off.
        raise UnsafeFile(explain(path, wanted), subject=str(path)) from None


def _without_advice(error: Exception) -> BaseException:
    """Return the first error in place of torch's retelling, which advises to switch the safety check off."""
    if isinstance(error, pickle.UnpicklingError) and error.__context__ is not None:
        return error.__context__
    return error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
