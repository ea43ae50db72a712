"""More than a hundred malformed files, and a program that tries to load each of them.

    python -m tests.unit.loading.malformed FOLDER

It prints one line of JSON: the files that were not refused as expected, and by how many bytes memory grew.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from weightferry.errors import LoadError
from weightferry.loading.hooks import load_module, transfer_module

WIDTH = 64


class RunsCommand:
    """Runs a command that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def network() -> nn.Module:
    """Return the module to load into."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4))


def torch_zip(state: Any, **options: Any) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with any header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: Any, stop: Any, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    """Return one entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def repacked(content: bytes, change: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip in which ``change(name, bytes)`` has changed each entry."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return buffer.getvalue()


def tar(content: bytes = b"x") -> bytes:
    """Return a tar archive with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def deep(levels: int) -> bytes:
    """Return a pickle of nested lists, made by hand: pickle itself would recurse.

    100,000 levels overflow a stack of 8 MB if a level takes more than 84 bytes of it, as a call in C does.
    """
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def files(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each malformed file."""
    state = dict(network().state_dict())
    forms = {"zip": torch_zip(state), "old": torch_zip(state, _use_new_zipfile_serialization=False), "st": save(state)}
    for form, content in forms.items():
        for part in (0, 1, 7, 8, 9, 30, 100, 255, 1000):
            yield f"{form} cut at {part}", content[:part]
        for tenth in range(1, 10):
            yield f"{form} cut at {tenth}0 %", content[: len(content) * tenth // 10]
        yield f"{form} without its last byte", content[:-1]
        yield f"{form} with its head in zeros", bytes(512) + content[512:]
        yield f"{form} in noise", random.Random(form).randbytes(len(content))
    yield from _headers(state)
    yield from _pickles(marker, forms["zip"])
    yield from _states(state)
    yield "html", b"<!DOCTYPE html><html><body>502</body></html>"
    yield "json", b'{"error": "Entry not found"}'
    yield "lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "index of nothing", b'{"weight_map": {}}'
    yield "index of absent shards", b'{"weight_map": {"0.weight": "absent.safetensors"}}'
    yield "index that climbs", b'{"weight_map": {"0.weight": "../../../etc/passwd"}}'
    yield "index of itself", b'{"weight_map": {"0.weight": "index of itself"}}'
    yield "deep json", b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def _headers(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, bytes]]:
    yield "header of 100 GB", header(b"{}", length=100 << 30)
    yield "header of 2**64", struct.pack("<Q", (1 << 64) - 1) + b"{}"
    yield "header of 99 MB that is not there", header(b"{}", length=99_000_000)
    yield "header of a list", header([1, 2])
    yield "header of no json", header(b"{nonsense")
    yield "header nested deep", header(b'{"a":' * 50_000)
    yield "header in utf-16", header('{"a": 1}'.encode("utf-16"))
    yield "overlap", header({"0.weight": entry(0, 4), "0.bias": entry(2, 6)}, bytes(6))
    yield "out of range", header({"0.weight": entry(0, 1 << 40, (1 << 38,))}, bytes(8))
    yield "backwards", header({"0.weight": entry(8, 4)}, bytes(8))
    yield "negative", header({"0.weight": entry(-4, 4)}, bytes(8))
    yield "shape against offsets", header({"0.weight": entry(0, 4, (1000, 1000))}, bytes(4))
    yield "shape that overflows", header({"0.weight": entry(0, 4, (1 << 62, 1 << 62))}, bytes(4))
    yield "negative shape", header({"0.weight": entry(0, 4, (-1,))}, bytes(4))
    yield "no dtype", header({"0.weight": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    yield "odd dtype", header({"0.weight": entry(0, 4, (1,), "F99")}, bytes(4))
    yield "offsets of text", header({"0.weight": entry("a", "b")}, bytes(4))
    yield "offsets of three", header({"0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, bytes(4))
    yield "a gap", header({"0.weight": entry(4, 8)}, bytes(8))
    yield "more bytes than tensors", save(state) + bytes(100)
    yield "many names", header({f"n{number}": entry(0, 0, (0,)) for number in range(25_000)} | {"x": entry(0, 9)})


def _pickles(marker: Path, good: bytes) -> Iterator[tuple[str, bytes]]:
    evil = {"0.weight": RunsCommand(marker)}
    yield "command in zip", torch_zip(evil)
    yield "command in old format", torch_zip(evil, _use_new_zipfile_serialization=False)
    for protocol in range(6):
        yield f"command in pickle {protocol}", pickle.dumps(evil, protocol)
    yield "command in tar", tar(pickle.dumps(evil))
    yield "eval", b'cbuiltins\neval\n(S\'open("%s", "w")\'\ntR.' % str(marker).encode()
    yield "whole module", torch_zip(network())
    yield "lambda by name", b"\x80\x02c__main__\n<lambda>\n."
    yield "deep list", deep(100_000)
    yield "deep list in zip", repacked(good, lambda name, data: deep(100_000) if name.endswith("data.pkl") else data)
    yield "no pickle in zip", repacked(good, lambda name, data: b"" if name.endswith("data.pkl") else data)
    yield "storages cut", repacked(good, lambda name, data: data[:4] if "/data/" in name else data)
    yield "compressed", repacked(good, lambda _, data: data, zipfile.ZIP_DEFLATED)
    bomb = repacked(good, lambda name, data: bytes(200_000_000) if "/data/0" in name else data, zipfile.ZIP_DEFLATED)
    yield "zip bomb", bomb
    yield "zip of another kind", repacked(good, lambda _, data: data).replace(b"data.pkl", b"date.pkl")
    yield "huge string", b"\x80\x02X" + struct.pack("<I", 0xFFFFFFF0) + b"a."
    yield "huge bytes", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"a."
    yield "huge memo", b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFF0) + b"."


def _states(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, bytes]]:
    nan = float("nan")
    yield "nan as a key", torch_zip({**state, nan: torch.ones(1)})
    yield "number as a key", torch_zip({**state, 1: torch.ones(1)})
    yield "none as a key", torch_zip({None: torch.ones(1)})
    yield "a list", torch_zip([torch.ones(1)])
    yield "a tensor", torch_zip(torch.ones(1))
    yield "text for a tensor", torch_zip({**state, "0.bias": "text"})
    yield "other shapes", torch_zip({**state, "0.bias": torch.ones(65)})
    yield "complex", torch_zip({**state, "0.bias": torch.ones(64, dtype=torch.complex64)})
    yield "other names", torch_zip({f"other.{key}": tensor for key, tensor in state.items()})
    yield "empty mapping", torch_zip({})
    yield "nested", torch_zip({"model": state, "epoch": 3})
    yield "sparse", torch_zip({**state, "0.bias": torch.ones(64).to_sparse()})
    yield "on another shape of scalar", torch_zip({**state, "0.bias": torch.tensor(1.0)})
    yield "expanded a million times", torch_zip({**state, "0.bias": torch.ones(1).expand(1 << 40)})


def memory(name: str) -> int:
    """Return a value of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def main() -> None:
    """Write all files, try to load each, and print the result."""
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    marker, paths, wrong = folder / "marker", [], {}
    for name, content in files(marker):
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    del content
    load_module(network(), _good(folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    for path in paths:
        for hook in (load_module, transfer_module):
            module = network()
            kept = [parameter.detach().clone() for parameter in module.parameters()]
            try:
                hook(module, path)
                wrong[path.name] = "was loaded"
            except LoadError:
                pass
            except BaseException as error:  # noqa: BLE001 -- reported
                wrong[path.name] = f"{type(error).__name__}: {error}"[:200]
            if not all(map(torch.equal, kept, module.parameters())):
                wrong[path.name] = "a parameter was touched"
    if marker.exists():
        wrong["marker"] = "a command was run"
    print(json.dumps({"tried": len(paths), "wrong": wrong, "grew": memory("VmHWM") - before}))


def _good(folder: Path) -> Path:
    path = folder / "good"
    torch.save(network().state_dict(), path)
    return path


if __name__ == "__main__":
    main()
