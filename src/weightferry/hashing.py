"""Checksums that origins publish, and hashes that grow with a file."""

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
        ``sha256`` of the bytes (LFS and Xet files of the Hub), or ``git-sha1``: the id git gives a blob, which is the
        SHA-1 of ``b"blob <size>\0"`` and the bytes (small files of the Hub).
    hexdigest
        In lower case.
    """

    algorithm: Algorithm
    hexdigest: str

    @classmethod
    def parse(cls, text: str) -> Checksum | None:
        """Tell the algorithm by the number of digits; None where the text is no checksum."""
        for algorithm, digits in _DIGITS.items():
            if len(text) == digits:
                with contextlib.suppress(ValueError):
                    return cls(algorithm, text)
        return None

    def __post_init__(self) -> None:
        # It names a file of the cache.
        if not re.fullmatch(f"[0-9a-f]{{{_DIGITS[self.algorithm]}}}", self.hexdigest):
            raise ValueError(f"not a {self.algorithm}: {self.hexdigest!r}")

    def __str__(self) -> str:
        return f"{self.algorithm} {self.hexdigest}"


class Hashes:
    """The SHA-256 of a file, and its git id where that is what the origin publishes, in one pass over the bytes.

    Parameters
    ----------
    checksum
        What will be compared; None where the origin publishes nothing.
    size
        Bytes of the file; git hashes them first.
    """

    def __init__(self, checksum: Checksum | None = None, size: int | None = None) -> None:
        self._expected = checksum
        self._sha256 = hashlib.sha256()
        self._git = None
        if checksum and checksum.algorithm == "git-sha1":
            self._git = hashlib.sha1(b"blob %d\0" % (size or 0), usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes in order."""
        self._sha256.update(data)
        if self._git is not None:
            self._git.update(data)

    def update_from(self, path: Path) -> Hashes:
        """Take the bytes of a whole file."""
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                self.update(chunk)
        return self

    @property
    def sha256(self) -> str:
        """The SHA-256 of what came so far, in hexadecimal."""
        return self._sha256.hexdigest()

    @property
    def hexdigest(self) -> str:
        """What came so far, by the algorithm that the origin uses."""
        return self._git.hexdigest() if self._git is not None else self.sha256

    @property
    def matches(self) -> bool:
        """Whether the bytes are the promised ones; True where nothing was promised."""
        return self._expected is None or self.hexdigest == self._expected.hexdigest
