"""Weights in several files: an index with its shards, through symbolic links, or in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from weightferry.errors import LoadError
from weightferry.loading.hooks import load_module
from weightferry.loading.readers import read_state

STATE = {
    f"{n}.{part}": torch.rand(4, 4) if part == "weight" else torch.rand(4)
    for n in range(3)
    for part in ("weight", "bias")
}
Save = Callable[[dict[str, torch.Tensor], Path], Any]


def save_legacy(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write(folder: Path, save: Save = safetensors.torch.save_file, stem: str = "model.safetensors") -> Path:
    """Write `STATE` as three shards and their index; return the path of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, str] = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.{stem.rpartition('.')[2]}"
        part = {key: value for key, value in STATE.items() if key.startswith(str(number))}
        save(part, folder / shard)
        named |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 240}, "weight_map": named}))
    return index


def network() -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


def check(path: Path) -> None:
    module = network()
    load_module(module, path)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, STATE[key])


@pytest.mark.parametrize(
    ("save", "stem"),
    [
        (safetensors.torch.save_file, "model.safetensors"),
        (torch.save, "pytorch_model.bin"),
        (save_legacy, "pytorch_model.bin"),
    ],
)
def test_an_index_and_its_shards(save: Save, stem: str, tmp_path: Path) -> None:
    index = write(tmp_path, save, stem)
    check(index)
    check(tmp_path)


def test_through_the_links_of_a_cache(tmp_path: Path) -> None:
    """The layout after staging: the link of a loadable, the snapshot, and blobs with checksums as names."""
    index = write(tmp_path / "snapshots/1")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(index.parent.iterdir())):
        path.rename(tmp_path / f"blobs/{number}")
        path.symlink_to(f"../../blobs/{number}")
    (tmp_path / "links").mkdir()
    link = tmp_path / "links/model.ckpt"
    link.symlink_to(index)
    check(link)
    link.unlink()
    link.symlink_to(index.parent)
    check(link)


def test_shards_are_mapped_not_read(tmp_path: Path) -> None:
    write(tmp_path)
    state = read_state(tmp_path)
    assert list(state) == list(STATE)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len({line.split()[-1] for line in mapped}) == 3


def test_a_tensor_missing_from_the_shard_that_the_index_names(tmp_path: Path) -> None:
    index = write(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["0.weight"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(LoadError, match=r"lacks 1 of the 3 tensors.*0\.weight"):
        read_state(index)


def test_a_missing_shard(tmp_path: Path) -> None:
    index = write(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(LoadError, match="model-00002-of-00003"):
        read_state(index)


@pytest.mark.parametrize("shard", ["model.safetensors.index.json", "other.index.json", "folder"])
def test_a_shard_that_is_no_file_of_tensors(shard: str, tmp_path: Path) -> None:
    index = write(tmp_path)
    (tmp_path / "other.index.json").write_bytes(index.read_bytes())
    write(tmp_path / "folder")
    index.write_text(json.dumps({"weight_map": {"0.weight": shard}}))
    with pytest.raises(LoadError, match=f"names the shard {shard}, which is a folder or an index"):
        read_state(index)


def test_an_index_after_long_metadata(tmp_path: Path) -> None:
    index = write(tmp_path)
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"metadata": {"notes": "x" * 9000}, "weight_map": content["weight_map"]}))
    check(index)


def test_the_file_in_a_folder(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "model.safetensors")
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    check(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"), [(("a.bin", "b.bin"), r"a\.bin, b\.bin"), (("config.json",), "it contains config")]
)
def test_a_folder_without_one_weights_file(names: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    for name in names:
        torch.save(STATE, tmp_path / name)
    with pytest.raises(LoadError, match=expected):
        read_state(tmp_path)
