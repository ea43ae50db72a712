"""Files and commits, with the same ids as git and LFS give.

It does not use `weightferry.hashing`: a fake that shares code with the tested code shares its bugs.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath

# The suffixes in the .gitattributes file of every new repository on the Hub.
# fmt: off
LFS_SUFFIXES = frozenset({
    ".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gz", ".h5", ".joblib", ".mlmodel", ".model", ".msgpack", ".npy",
    ".npz", ".onnx", ".ot", ".parquet", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".rar", ".safetensors", ".tar",
    ".tflite", ".tgz", ".wasm", ".xz", ".zip", ".zst",
})
# fmt: on


# Bytes to read, hash or send at a time.
BLOCK_SIZE = 1 << 20
_ZEROS = bytes(BLOCK_SIZE)


class ContentGoneError(Exception):
    """A file of a served folder changed after the commit that lists it, so the old content is lost."""


@dataclass(frozen=True)
class Blob:
    """The content of one file: in memory, or on disk with modification time `mtime_ns` (nanoseconds)."""

    source: bytes | Path
    size: int
    mtime_ns: int = 0

    @classmethod
    def of(cls, source: bytes | Path) -> Blob:
        """Make a blob from bytes, or from a file with its current size and modification time."""
        if isinstance(source, bytes):
            return cls(source, len(source))
        stat = source.stat()
        return cls(source, stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """Raise `ContentGoneError` if the file changed since it was hashed."""
        try:
            unchanged = isinstance(self.source, bytes) or Blob.of(self.source) == self
        except OSError:
            unchanged = False
        if not unchanged:
            raise ContentGoneError(f"{self.source!s} changed on disk after the commit that lists it")

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to `stop`."""
        if isinstance(self.source, bytes):
            return self.source[start:stop]
        with self.source.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), stop - start, start)

    def chunks(self) -> Iterator[bytes]:
        """Yield the content in blocks."""
        if isinstance(self.source, bytes):
            yield self.source
            return
        with self.source.open("rb", buffering=0) as file:
            for start in range(0, self.size, BLOCK_SIZE):
                count = min(BLOCK_SIZE, self.size - start)
                yield read_hole(file.fileno(), start, count) or os.pread(file.fileno(), count, start)


def read_hole(descriptor: int, start: int, count: int) -> bytes:
    """Return `count` zero bytes (at most `BLOCK_SIZE`) if a sparse file has a hole from `start` on, else no bytes.

    Reading a hole of 10 GB through the page cache took 45 s on a small machine.
    """
    try:
        data = os.lseek(descriptor, start, os.SEEK_DATA)
    except OSError:  # the hole reaches the end of the file
        return _ZEROS[:count]
    return _ZEROS[:count] if data >= start + count else b""


@dataclass(frozen=True)
class Entry:
    """One file of a commit.

    Attributes
    ----------
    oid
        The git blob id of the content, or of the LFS pointer that git stores instead.
    sha256
        Of the content; None for a file that is not in LFS.
    pointer_size
        Bytes of the LFS pointer.
    """

    path: str
    blob: Blob
    oid: str
    sha256: str | None = None
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        """The content's name on the Hub, without quotes."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A fixed set of files.

    `sha` depends only on paths and contents: the same files have the same commit on every server, and a branch that
    returns to old content returns to the old commit.

    Attributes
    ----------
    files
        By path, sorted by path.
    folders
        The git tree id of every folder, by path.
    date
        The time when this server made the commit, in the Hub's format.
    """

    sha: str
    files: Mapping[str, Entry]
    folders: Mapping[str, str]
    date: str


class CommitBuilder:
    """Makes commits. It hashes a file on disk once per path, modification time and size.

    Parameters
    ----------
    lfs_threshold
        Files of this many bytes or more are in LFS, with any name.
    """

    def __init__(self, lfs_threshold: int) -> None:
        self._threshold = lfs_threshold
        self._digests: dict[tuple[Blob, bool], str] = {}

    def commit(self, blobs: Mapping[str, Blob]) -> Commit:
        """Return the commit of the files (content by path); hash only new content."""
        files = {path: self._entry(path, blob) for path, blob in sorted(blobs.items())}
        folders = _tree_ids(files)
        sha = _git_id("commit", f"tree {folders.pop('')}\n".encode())
        return Commit(sha, files, folders, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    def set_sha256(self, path: Path, sha256: str) -> None:
        """Use a given SHA-256 for a large file, as long as the file does not change."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"not a SHA-256: {sha256!r}")
        self._digests[Blob.of(path), True] = sha256

    def _entry(self, path: str, blob: Blob) -> Entry:
        lfs = blob.size >= self._threshold or PurePosixPath(path).suffix.lower() in LFS_SUFFIXES
        digest = self._digest(blob, lfs)
        if not lfs:
            return Entry(path, blob, digest)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {blob.size}\n".encode()
        return Entry(path, blob, _git_id("blob", pointer), digest, len(pointer))

    def _digest(self, blob: Blob, lfs: bool) -> str:
        if isinstance(blob.source, bytes):
            return _digest(blob, lfs)
        if (blob, lfs) not in self._digests:
            self._digests[blob, lfs] = _digest(blob, lfs)
        return self._digests[blob, lfs]


def _digest(blob: Blob, lfs: bool) -> str:
    hasher = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % blob.size, usedforsecurity=False)
    for chunk in blob.chunks():
        hasher.update(chunk)
    return hasher.hexdigest()


def _git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _tree_ids(files: Mapping[str, Entry]) -> dict[str, str]:
    """Return the git tree id of every folder by its path; the root's path is empty."""
    children: dict[str, dict[str, tuple[bytes, str]]] = {"": {}}
    for path, entry in files.items():
        folder, _, name = path.rpartition("/")
        children.setdefault(folder, {})[name] = (b"100644", entry.oid)
        while folder:
            folder = folder.rpartition("/")[0]
            children.setdefault(folder, {})
    ids: dict[str, str] = {}
    for folder in sorted(filter(None, children), key=lambda path: path.count("/"), reverse=True):
        ids[folder] = _tree_id(children[folder])
        parent, _, name = folder.rpartition("/")
        children[parent][name] = (b"40000", ids[folder])
    return {"": _tree_id(children[""]), **ids}


def _tree_id(children: Mapping[str, tuple[bytes, str]]) -> str:
    rows = [(name.encode(errors="surrogateescape"), mode, bytes.fromhex(oid)) for name, (mode, oid) in children.items()]
    # Git sorts a folder as if its name ended in a slash.
    rows.sort(key=lambda row: row[0] + (b"/" if row[1] == b"40000" else b""))
    return _git_id("tree", b"".join(b"%s %s\0%s" % (mode, name, oid) for name, mode, oid in rows))
