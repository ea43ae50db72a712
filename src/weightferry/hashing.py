"""Checksums that origins publish, and hashes that are computed while a file is written."""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Algorithm = Literal["sha256", "git-sha1"]

_DIGITS: dict[Algorithm, int] = {"sha256": 64, "git-sha1": 40}


@dataclass(frozen=True)
class Checksum:
    r"""A checksum that an origin publishes.

    Attributes
    ----------
    algorithm
        ``sha256``: the SHA-256 of the bytes (LFS and Xet files of the Hub). ``git-sha1``: the id of a git blob, that
        is the SHA-1 of ``b"blob <size>\0"`` and the bytes (small files of the Hub).
    hexdigest
        Lower-case hexadecimal digits.
    """

    algorithm: Algorithm
    hexdigest: str

    @classmethod
    def parse(cls, text: str) -> Checksum | None:
        """Return the checksum with these hexadecimal digits, or None if `text` is not a checksum.

        The number of digits tells the algorithm.
        """
        for algorithm, digits in _DIGITS.items():
            if len(text) == digits:
                with contextlib.suppress(ValueError):
                    return cls(algorithm, text)
        return None

    def __post_init__(self) -> None:
        # The digest becomes a file name in the cache.
        if not re.fullmatch(f"[0-9a-f]{{{_DIGITS[self.algorithm]}}}", self.hexdigest):
            raise ValueError(f"not a {self.algorithm} checksum: {self.hexdigest!r}")

    def __str__(self) -> str:
        return f"{self.algorithm} {self.hexdigest}"


class Hashes:
    """Computes the hashes of a file in one pass over its bytes.

    These are the SHA-256, and the id of the git blob if the origin publishes one.

    Parameters
    ----------
    checksum
        The expected checksum; None if the origin publishes none.
    size
        Bytes of the whole file. A git blob id starts with the hash of this number.
    """

    def __init__(self, checksum: Checksum | None = None, size: int | None = None) -> None:
        self._expected = checksum
        self._sha256 = hashlib.sha256()
        self._git_sha1 = None
        if checksum and checksum.algorithm == "git-sha1":
            self._git_sha1 = hashlib.sha1(b"blob %d\0" % (size or 0), usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        """Hash the next bytes of the file, in order."""
        self._sha256.update(data)
        if self._git_sha1 is not None:
            self._git_sha1.update(data)

    def update_from(self, path: Path) -> Hashes:
        """Hash all bytes of a file; return self."""
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                self.update(chunk)
        return self

    @property
    def sha256(self) -> str:
        """The SHA-256 of all bytes so far, in hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def hexdigest(self) -> str:
        """The digest of all bytes so far, by the algorithm of the expected checksum; SHA-256 if there is none."""
        return self._git_sha1.hexdigest() if self._git_sha1 is not None else self.sha256

    @property
    def matches(self) -> bool:
        """Whether the bytes match the expected checksum; True if there is none."""
        return self._expected is None or self.hexdigest == self._expected.hexdigest
