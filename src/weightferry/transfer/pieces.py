"""How the files of a manifest are cut into pieces, and pieces into frames."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from weightferry.manifest import File

MIB = 1 << 20
FRAME = 4 * MIB
"""Bytes that travel from one leader to the next at a time, and leave again as soon as they are there."""

# A piece is what one leader reads from the origin in one request. Below 4 MiB a request costs more than its bytes at
# 500 Mbit/s and 50 ms; above 64 MiB a broken connection, or a slow leader, holds up too much.
_SMALLEST, _LARGEST = 4 * MIB, 64 * MIB
# Pieces for each leader that reads: enough for all to end at about the same time.
_PIECES_A_LEADER = 8
# More of them in one file would cost more messages than bytes.
_MOST_SEAMS = 512
# A file below this size is read whole, and travels in a bundle with others.
SMALL = MIB
# Files in a bundle: they are read one after the other, each for the price of a round trip.
_FILES_A_BUNDLE = 16


class Frame(NamedTuple):
    """Bytes `start` to `stop` of a piece."""

    piece: int
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """What one leader reads and the others are passed: a range of one file, or several small files whole.

    Attributes
    ----------
    files : tuple of int
        Places in `Manifest.staged()`; several in a bundle.
    start, stop : int or None
        The range of the file; of a bundle, 0 and the bytes of all its files. `stop` is None for a file whose size
        nobody knows yet.
    bundle : bool
        Whether these are small files.
    """

    files: tuple[int, ...]
    start: int
    stop: int | None
    bundle: bool = False

    @property
    def size(self) -> int:
        """Bytes; 0 while nobody knows."""
        return (self.stop or self.start) - self.start

    def frames(self, number: int) -> Iterator[Frame]:
        """Cut the piece with this number into frames; a bundle is one."""
        if self.bundle:
            yield Frame(number, self.start, self.start + self.size)
            return
        for start in range(self.start, self.start + self.size, FRAME):
            yield Frame(number, start, min(start + FRAME, self.start + self.size))


def is_small(file: File) -> bool:
    """Whether a file travels in a bundle."""
    return file.size is not None and file.size < SMALL


def cut(
    files: Sequence[File],
    wanted: Sequence[int],
    readers: int,
    held_by: Callable[[int], Hashable] = lambda _: None,
    seams: Callable[[int], Collection[int]] = lambda _: (),
) -> tuple[Piece, ...]:
    """Cut files into pieces; every leader gets the same from the same.

    Parameters
    ----------
    files
        Of the manifest.
    wanted
        Which of them, by place.
    readers
        How many leaders read.
    held_by
        Small files with different values never share a bundle: so a domain holds all files of a bundle or none.
    seams
        Where in a file something begins or ends that some domain holds: no piece lies across, so that one holds all of
        it or nothing. A file that is torn into too many parts is cut without regard to them.
    """
    together: dict[Hashable, list[int]] = {}
    for index in wanted:
        if is_small(files[index]):
            together.setdefault(held_by(index), []).append(index)
    pieces = [bundle for small in together.values() for bundle in _bundles(files, small)]
    big = [index for index in wanted if not is_small(files[index])]
    step = piece_size(sum(files[index].size or 0 for index in big), readers)
    for index in big:
        size = files[index].size
        if size is None or not files[index].ranges:
            pieces.append(Piece((index,), 0, size))
        else:
            torn = seams(index)
            edges = sorted({*range(0, size, step), size, *(torn if len(torn) <= _MOST_SEAMS else ())})
            pieces += [Piece((index,), start, stop) for start, stop in pairwise(edges)]
    return tuple(pieces)


def piece_size(total: int, readers: int) -> int:
    """Choose a power of two, from 4 to 64 MiB, so that each reader has several pieces of `total` bytes."""
    wished = total // (max(1, readers) * _PIECES_A_LEADER)
    return min(_LARGEST, max(_SMALLEST, 1 << max(0, wished.bit_length() - 1)))


def _bundles(files: Sequence[File], small: list[int]) -> Iterator[Piece]:
    bundle: list[int] = []
    size = 0
    for index in small:
        length = files[index].size or 0
        if bundle and (len(bundle) == _FILES_A_BUNDLE or size + length > FRAME):
            yield Piece(tuple(bundle), 0, size, bundle=True)
            bundle, size = [], 0
        bundle.append(index)
        size += length
    if bundle:
        yield Piece(tuple(bundle), 0, size, bundle=True)
