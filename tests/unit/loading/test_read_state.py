from __future__ import annotations

import io
import json
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from weightferry.errors import LoadError
from weightferry.loading.readers import read_state

Save = Callable[[Any, Path], None]


def save_zip(state: Any, path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_safetensors(state: Any, path: Path) -> None:
    safetensors.torch.save_file(state, path)


SAVES = pytest.mark.parametrize("save", [save_zip, save_legacy, save_safetensors])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.ckpt"


def refused(path: Path) -> str:
    with pytest.raises(LoadError) as caught:
        read_state(path)
    assert str(path) in str(caught.value)
    assert caught.value.subject == str(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@SAVES
def test_every_truncation_is_refused(save: Save, path: Path) -> None:
    save({"a": torch.arange(300.0), "b": torch.ones(3)}, path)
    content = path.read_bytes()
    ends = sorted({*range(0, len(content), 41), *range(16), *range(len(content) - 70, len(content))})
    for end in ends:
        path.write_bytes(content[:end])
        refused(path)


@SAVES
def test_noise_never_escapes_as_another_error(save: Save, path: Path) -> None:
    """A flipped byte may stay undetected here (checksums detect it); a detected one must raise LoadError."""
    save({"a": torch.arange(30.0)}, path)
    content = path.read_bytes()
    for position in range(0, min(len(content), 900), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            read_state(path)
        except LoadError:
            continue


@pytest.mark.parametrize("save", [save_zip, save_safetensors])
def test_is_mapped_and_private(save: Save, path: Path) -> None:
    save({"a": torch.zeros(4096)}, path)
    read_state(path)["a"].fill_(1)
    first = read_state(path)["a"]
    assert first.sum() == 0
    position = path.read_bytes().rfind(bytes(4096 * 4))
    with path.open("r+b") as file:
        file.seek(position)
        file.write(struct.pack("<f", 5.0))
    assert first[0] == 5.0, "a mapped tensor has the values of the file at the time of use"


@SAVES
def test_owned_memory_does_not_follow_the_file(save: Save, path: Path) -> None:
    save({"a": torch.ones(4096)}, path)
    tensor = read_state(path, mapped=False)["a"]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert tensor.sum() == 4096


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_environment_cannot_switch_the_check_off(path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    save_zip(nn.Linear(1, 1), path)
    assert "torch.nn.modules.linear.Linear" in refused(path)


def test_versions_of_a_state_dict_are_kept(path: Path) -> None:
    save_zip(nn.BatchNorm1d(2).state_dict(), path)
    state = read_state(path)
    assert isinstance(state, OrderedDict)
    assert state._metadata[""]["version"] == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_a_state_saved_on_a_gpu_is_loaded_on_the_cpu(save: Save, path: Path) -> None:
    save({"a": torch.arange(3.0)}, path)
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x07\x00\x00\x00cuda:99"
    if save is save_zip:
        repack(path, lambda _, data: data.replace(cpu, cuda))
    else:
        path.write_bytes(path.read_bytes().replace(cpu, cuda))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    assert torch.equal(read_state(path)["a"], torch.arange(3.0))


def test_unreadable(path: Path) -> None:
    path.symlink_to(path)
    assert "symbolic links" in refused(path)


def test_missing(path: Path) -> None:
    assert "No such file" in refused(path)


def test_torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
        archive.writestr("net/code/__torch__.py", "")
    assert "TorchScript" in refused(path)


def repack(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, change(name, data))


def test_compressed_zip(path: Path) -> None:
    save_zip({"a": torch.zeros(1000)}, path)
    repack(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert "compression" in refused(path)


def test_zip_bomb_is_refused_unread(path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(30_000_000))
    path.write_bytes(bomb.getvalue())
    assert "compression" in refused(path)


def test_zip_entries_that_share_bytes(path: Path) -> None:
    save_zip({"a": torch.zeros(1000)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(9):
            entry = zipfile.ZipInfo(f"x/{number}")
            entry.file_size = entry.compress_size = 4000
            entry.header_offset = entry.CRC = 0
            archive.filelist.append(entry)
        archive._didModify = True  # type: ignore[attr-defined]
    assert len(path.read_bytes()) < len(content) + 2000
    assert "promises" in refused(path)


def test_storage_larger_than_the_file(path: Path) -> None:
    save_zip({"a": torch.zeros(1000)}, path)
    count = b"M" + struct.pack("<H", 1000)
    repack(path, lambda name, data: data.replace(count, b"J" + struct.pack("<i", 2**30)) if "pkl" in name else data)
    refused(path)


def test_legacy_storage_larger_than_the_file(path: Path) -> None:
    save_legacy({"a": torch.zeros(1000)}, path)
    count = b"M" + struct.pack("<H", 1000)
    path.write_bytes(path.read_bytes().replace(count, b"J" + struct.pack("<i", 2**28)))
    refused(path)


def test_deep_nesting(path: Path) -> None:
    save_zip({}, path)
    depth = 50_000
    repack(path, lambda name, data: b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"." if "pkl" in name else data)
    assert isinstance(read_state(path), list)


def header(path: Path, content: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)


def entry(start: Any, stop: Any, count: int = 1) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [count], "data_offsets": [start, stop]}


HEADERS = {
    "overlap": ({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}, "overlaps"),
    "beyond the end": ({"a": entry(0, 400, 100)}, "truncated"),
    "backwards": ({"a": entry(8, 4)}, "damaged"),
    "negative": ({"a": entry(-4, 4)}, "damaged"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, "damaged"),
    "shape and span differ": ({"a": entry(0, 8)}, "damaged"),
    "overflow": ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 12]}}, "damaged"),
    "dtype": ({"a": {"dtype": "X9", "shape": [3], "data_offsets": [0, 12]}}, "damaged"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [3]}}, "damaged"),
    "words for offsets": ({"a": entry("x", "y")}, "damaged"),
    "entry is no object": ({"a": 3}, "damaged"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_lying_header(name: str, path: Path) -> None:
    content, expected = HEADERS[name]
    header(path, json.dumps(content).encode(), bytes(12))
    assert expected in refused(path)


@pytest.mark.parametrize("length", [10**11, 10**9, 2**63 - 1, 300])
def test_length_of_header_beyond_the_file(length: int, path: Path) -> None:
    header(path, b"{}", length=length)
    assert "claims" in refused(path) or "truncated" in refused(path)


@pytest.mark.parametrize("content", [b"{", b"{]}", b'{"a": ' * 30_000, b'{"a": NaN}', b"{\xff\xfe}"])
def test_header_that_is_not_a_json_object(content: bytes, path: Path) -> None:
    header(path, content)
    assert "damaged" in refused(path)


def test_empty_safetensors(path: Path) -> None:
    save_safetensors({}, path)
    assert read_state(path) == {}


def test_metadata_in_the_header(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"format": "pt"})
    assert list(read_state(path)) == ["a"]
