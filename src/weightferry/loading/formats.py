"""Detect the format of a file from its content, never from its name."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from weightferry.errors import LoadError, redact

if TYPE_CHECKING:
    from pathlib import Path

# The magic of a tar archive at byte 257 is the last fixed position; the rest is for the text of a page or an index.
_HEAD_BYTES = 4096
# An index of shards may begin with metadata.
_INDEX_BYTES = 1 << 20
# torch.serialization.MAGIC_NUMBER as pickle writes it (LONG1 of 10 bytes). Only the opcodes PROTO and FRAME precede it.
_TORCH_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ\x00": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"\x89HDF\r\n": "an HDF5 file, as Keras writes it",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF file, as llama.cpp reads it",
    b"%PDF": "a PDF document",
    b"PK\x05\x06": "an empty zip archive",
}
_LFS_POINTER = b"version https://git-lfs"


class Format(enum.Enum):
    """The file formats that `detect_format` recognizes."""

    TORCH_ZIP = enum.auto()
    TORCH_LEGACY = enum.auto()
    TORCH_TAR = enum.auto()
    PICKLE = enum.auto()
    SAFETENSORS = enum.auto()
    INDEX = enum.auto()


def detect_format(path: Path) -> Format:
    """Return the format of a file, detected from its first bytes.

    Raises
    ------
    LoadError
        The file has none of these formats. The text says what the file looks like instead.
    OSError
        The file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if head.lstrip().startswith(b"{"):
            head += file.read(_INDEX_BYTES)
    file_format = _format_of(head)
    if file_format is None:
        raise LoadError(f"{path} holds no weights: it is {describe_content(head)}", subject=str(path))
    return file_format


def _format_of(head: bytes) -> Format | None:
    if head.startswith(b"PK\x03\x04"):
        return Format.TORCH_ZIP
    # The length of a safetensors header is never ASCII text. So a JSON file with a brace as its ninth byte is not one.
    if head[8:9] == b"{" and not (head[:8].isascii() and _is_text(head[:8])):
        return Format.SAFETENSORS
    if head[257:262] == b"ustar":
        return Format.TORCH_TAR
    if head.lstrip().startswith(b"{") and b'"weight_map"' in head:
        return Format.INDEX
    if head.startswith(b"\x80"):
        return Format.TORCH_LEGACY if _TORCH_MAGIC in head[:32] else Format.PICKLE
    return None


def describe_content(head: bytes) -> str:
    """Describe a file that starts with `head`, for error texts: its likely format, and how to repair it if known."""
    if not head:
        return "empty (0 bytes); download it again"
    if not head.strip(b"\x00"):
        return "nothing but zeros at its start; space was reserved, but the content never arrived: download it again"
    for magic, meaning in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return meaning
    return _describe_text(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def _describe_text(start: bytes) -> str:
    if start.startswith(_LFS_POINTER):
        return "a git-lfs pointer, not the file that it points to; run `git lfs pull` where it was cloned"
    if start[:20].lower().startswith((b"<!doctype html", b"<html")):
        return (
            "an HTML page; a login page, a proxy's page or an error page was saved in place of the file: "
            "check the URL and the access to it"
        )
    if not _is_text(start):
        return f"of an unknown format; its first bytes are {start[:16].hex(' ')}"
    if start.startswith(b"<"):
        return (
            "an XML document, as object stores send it when they refuse a request: check the access; "
            f"it starts with {_quote(start)}"
        )
    if start.startswith((b"{", b"[")):
        return f"JSON, perhaps a configuration file or the error of a server; it starts with {_quote(start)}"
    return f"text; it starts with {_quote(start)}"


def _is_text(head: bytes) -> bool:
    return all((byte >= 0x20 and byte != 0x7F) or byte in b"\t\n\r\f" for byte in head)


def _quote(start: bytes) -> str:
    # The answer of a server may repeat the request, and with it a token.
    return repr(redact(start[:200].decode(errors="replace"))[:60])
