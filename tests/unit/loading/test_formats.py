from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.unit.loading.malformed import tar
from weightferry.errors import LoadError
from weightferry.loading.formats import Format, detect_format
from weightferry.loading.readers import read_state

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 134\n"


def write(form: str, path: Path) -> None:
    if form == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        protocol = int(form[-1]) if form[-1].isdigit() else 2
        torch.save(STATE, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not form.startswith("legacy"))


FORMATS = {
    "zip": Format.TORCH_ZIP,
    "legacy": Format.TORCH_LEGACY,
    "legacy protocol 4": Format.TORCH_LEGACY,
    "safetensors": Format.SAFETENSORS,
}


@pytest.mark.parametrize("form", FORMATS)
def test_format_is_detected(form: str, tmp_path: Path) -> None:
    write(form, tmp_path / "file")
    assert detect_format(tmp_path / "file") is FORMATS[form]


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pt", "a.safetensors", "a.html", "a"])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("mapped", [True, False])
def test_name_does_not_matter(form: str, name: str, mapped: bool, tmp_path: Path) -> None:
    write(form, tmp_path / name)
    state = read_state(tmp_path / name, mapped=mapped)
    torch.testing.assert_close(dict(state), STATE, rtol=0, atol=0)


def zipped() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("weights.npy", "x")
    return archive.getvalue()


OTHERS = {
    "nothing": (b"", "empty (0 bytes)"),
    "zeros": (bytes(9000), "zeros"),
    "one zero": (b"\0", "zeros"),
    "html": (b"\n <!DOCTYPE html>\n<html>", "HTML page"),
    "html, bom, upper case": (b"\xef\xbb\xbf<HTML><BODY>", "HTML page"),
    "html in latin-1": ("<html><body>Café, café".encode("latin-1"), "HTML page"),
    "long html": (b"<!doctype html>" + "ä".encode() * 5000, "HTML page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "AccessDenied"),
    "lfs": (LFS_POINTER.encode(), "git-lfs pointer"),
    "json": (b'{"error": "Repository not found"}', "JSON"),
    "json, brace as ninth byte": (b'{"a1234{": 1}'.replace(b"4{", b"45{"), "JSON"),
    "json list": (b"[1, 2]", "JSON"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}', "does not exist beside it"),
    "index of nothing": (b'{"weight_map": {}}', "names no tensors"),
    "index of another kind": (b'{"weight_map": [1, 2]}', "is not an index of shards"),
    "index that climbs": (b'{"weight_map": {"a": "../../etc/passwd"}}', "must be a relative path"),
    "text": (b"404: Not Found", "'404: Not Found'"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "zip of another": (zipped(), "weights.npy"),
    "numpy": (b"\x93NUMPY\x01\x00", "NumPy"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "noise": (b"\xde\xad\xbe\xef\x01", "de ad be ef 01"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_error_describes_a_file_without_weights(name: str, tmp_path: Path) -> None:
    content, expected = OTHERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoadError) as caught:
        read_state(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_tar_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(tar())
    assert detect_format(path) is Format.TORCH_TAR


def test_a_token_in_an_error_page_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"sent": "Bearer hf_abcdefghijklmnop"}')
    with pytest.raises(LoadError) as caught:
        detect_format(path)
    assert "abcdefgh" not in str(caught.value)
