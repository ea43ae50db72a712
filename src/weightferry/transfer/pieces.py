"""Cut the files of a manifest into pieces, and pieces into frames."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from weightferry.manifest import File

MIB = 1 << 20
FRAME = 4 * MIB
"""Bytes that a leader relays at a time: a frame is sent on as soon as it has arrived."""

# A leader reads a piece from the origin in one request. Below 4 MiB a request costs more than its bytes at 500 Mbit/s
# and 50 ms. Above 64 MiB a broken connection or a slow leader delays too much.
_SMALLEST, _LARGEST = 4 * MIB, 64 * MIB
# Pieces for each leader that reads: enough that all leaders end at about the same time.
_PIECES_A_LEADER = 8
# A file with more boundaries than this would cost more messages than bytes.
_MOST_BOUNDARIES = 512
# A file below this size is read whole, and is relayed in a bundle with other small files.
SMALL = MIB
# Files in a bundle. They are read one after the other, and each costs a round trip.
_FILES_A_BUNDLE = 16


class Frame(NamedTuple):
    """Bytes `start` to `stop` of the piece with number `piece`."""

    piece: int
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """What one leader reads and the others receive from a neighbour: a range of one file, or several small files.

    Attributes
    ----------
    files : tuple of int
        Indices in `Manifest.staged()`; several in a bundle.
    start, stop : int or None
        The range of the file; for a bundle, 0 and the bytes of all its files. `stop` is None for a file of unknown
        size.
    bundle : bool
        Whether the piece consists of small files.
    """

    files: tuple[int, ...]
    start: int
    stop: int | None
    bundle: bool = False

    @property
    def size(self) -> int:
        """Bytes; 0 while the size is unknown."""
        return (self.stop or self.start) - self.start

    def frames(self, number: int) -> Iterator[Frame]:
        """Yield the frames of the piece with this number; a bundle is one frame."""
        if self.bundle:
            yield Frame(number, self.start, self.start + self.size)
            return
        for start in range(self.start, self.start + self.size, FRAME):
            yield Frame(number, start, min(start + FRAME, self.start + self.size))


def is_small(file: File) -> bool:
    """Return whether a file is relayed in a bundle."""
    return file.size is not None and file.size < SMALL


def cut_pieces(
    files: Sequence[File],
    wanted: Sequence[int],
    readers: int,
    held_by: Callable[[int], Hashable] = lambda _: None,
    boundaries: Callable[[int], Collection[int]] = lambda _: (),
) -> tuple[Piece, ...]:
    """Cut files into pieces; every leader computes the same.

    Parameters
    ----------
    files
        Of the manifest.
    wanted
        Which of them, by index.
    readers
        How many leaders read.
    held_by
        Small files with different values never share a bundle, so a domain holds all files of a bundle or none.
    boundaries
        The offsets in a file where a range begins or ends that some domain holds. No piece crosses one, so a domain
        holds all of a piece or nothing. They are ignored for a file with more than 512 of them.
    """
    bundled: dict[Hashable, list[int]] = {}
    for index in wanted:
        if is_small(files[index]):
            bundled.setdefault(held_by(index), []).append(index)
    pieces = [bundle for small in bundled.values() for bundle in _bundles(files, small)]
    big = [index for index in wanted if not is_small(files[index])]
    step = piece_size(sum(files[index].size or 0 for index in big), readers)
    for index in big:
        size = files[index].size
        if size is None or not files[index].ranges:
            pieces.append(Piece((index,), 0, size))
        else:
            at = boundaries(index)
            edges = sorted({*range(0, size, step), size, *(at if len(at) <= _MOST_BOUNDARIES else ())})
            pieces += [Piece((index,), start, stop) for start, stop in pairwise(edges)]
    return tuple(pieces)


def piece_size(total: int, readers: int) -> int:
    """Return a power of two from 4 to 64 MiB, so that each reader gets several pieces of `total` bytes."""
    ideal = total // (max(1, readers) * _PIECES_A_LEADER)
    return min(_LARGEST, max(_SMALLEST, 1 << max(0, ideal.bit_length() - 1)))


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
