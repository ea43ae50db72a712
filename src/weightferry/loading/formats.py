"""What kind of file this is, told by its content and never by its name."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from weightferry.errors import LoadError, redact

if TYPE_CHECKING:
    from pathlib import Path

# A tar's magic at byte 257 is the furthest that is looked at; the rest is for the words of a page or an index.
_HEAD_BYTES = 4096
# An index of shards may begin with metadata.
_INDEX_BYTES = 1 << 20
# torch.serialization.MAGIC_NUMBER as pickle writes it (LONG1 of 10 bytes); before it only the opcodes PROTO and FRAME.
_TORCH_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_OTHER_BINARIES = {
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
    """The formats that can hold a state."""

    TORCH_ZIP = enum.auto()
    TORCH_LEGACY = enum.auto()
    TORCH_TAR = enum.auto()
    PICKLE = enum.auto()
    SAFETENSORS = enum.auto()
    INDEX = enum.auto()


def tell_format(path: Path) -> Format:
    """Tell the format of a file from its first bytes.

    Raises
    ------
    LoadError
        The file is none of them; the text says what it looks like instead.
    OSError
        The file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        if head.lstrip().startswith(b"{"):
            head += file.read(_INDEX_BYTES)
    kind = _kind(head)
    if kind is None:
        raise LoadError(f"{path} holds no weights: it is {describe(head)}", subject=str(path))
    return kind


def _kind(head: bytes) -> Format | None:
    if head.startswith(b"PK\x03\x04"):
        return Format.TORCH_ZIP
    # A header's length never reads as ASCII, so a JSON file with a brace as ninth byte is not taken for safetensors.
    if head[8:9] == b"{" and not (head[:8].isascii() and _is_text(head[:8])):
        return Format.SAFETENSORS
    if head[257:262] == b"ustar":
        return Format.TORCH_TAR
    if head.lstrip().startswith(b"{") and b'"weight_map"' in head:
        return Format.INDEX
    if head.startswith(b"\x80"):
        return Format.TORCH_LEGACY if _TORCH_MAGIC in head[:32] else Format.PICKLE
    return None


def describe(head: bytes) -> str:
    """Say what a file that starts with `head` looks like, for people who expected weights in it."""
    if not head:
        return "empty (0 bytes)"
    if not head.strip(b"\x00"):
        return "nothing but zeros at its start: space was reserved, but the content never arrived"
    for magic, meaning in _OTHER_BINARIES.items():
        if head.startswith(magic):
            return meaning
    return _describe_text(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def _describe_text(start: bytes) -> str:
    if start.startswith(_LFS_POINTER):
        return "a git-lfs pointer, not the file that it points to; run `git lfs pull` where it was cloned"
    if start[:20].lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page: a login, a proxy or an error page was saved in place of the file"
    if not _is_text(start):
        return f"of an unknown kind, its first bytes are {start[:16].hex(' ')}"
    if start.startswith(b"<"):
        return "an XML document, as object stores answer with when they refuse; it starts with " + _quote(start)
    if start.startswith((b"{", b"[")):
        return "JSON, perhaps a configuration or a server's error; it starts with " + _quote(start)
    return "text; it starts with " + _quote(start)


def _is_text(head: bytes) -> bool:
    return all((byte >= 0x20 and byte != 0x7F) or byte in b"\t\n\r\f" for byte in head)


def _quote(start: bytes) -> str:
    # A server's answer may hold the request, and with it a token.
    return repr(redact(start[:200].decode(errors="replace"))[:60])
