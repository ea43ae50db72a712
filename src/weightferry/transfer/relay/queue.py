"""The frames to relay to the right neighbour, in the order in which their bytes arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from threading import Condition
from typing import NamedTuple

from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.pieces import FRAME, Frame, Piece


class RelayFrame(NamedTuple):
    """A frame to send; `last` tells whether it is the last one of its piece."""

    frame: Frame
    last: bool


class RelayQueue:
    """Hands out frames as soon as their bytes are present. Safe to use from several threads.

    Parameters
    ----------
    pieces
        Of the plan.
    numbers
        The pieces to relay.
    piece_store
        Tells which bytes are present.
    """

    def __init__(self, pieces: tuple[Piece, ...], numbers: Collection[int], piece_store: PieceStore) -> None:
        self._pieces, self._piece_store = pieces, piece_store
        self._next = {number: pieces[number].start for number in sorted(numbers)}
        self._of_file: dict[int, list[int]] = {}
        for number in self._next:
            for index in pieces[number].files:
                self._of_file.setdefault(index, []).append(number)
        self._ready: deque[RelayFrame] = deque()
        self._changed = Condition()

    def __repr__(self) -> str:
        return f"RelayQueue({len(self._ready)} frames ready, {len(self._next)} pieces to go)"

    def update(self, index: int | None = None) -> None:
        """Queue the frames whose bytes are present now: of one file, or of all files."""
        with self._changed:
            numbers = list(self._next) if index is None else self._of_file.get(index, ())
            for number in numbers:
                self._advance(number)
            if self._ready:
                self._changed.notify_all()

    def _advance(self, number: int) -> None:
        piece = self._pieces[number]
        while number in self._next:
            start, end = self._next[number], self._piece_store.end_of(piece)
            stop = start + FRAME if end is None else end if piece.bundle else min(start + FRAME, end)
            if not self._piece_store.has(piece, start, stop):
                return
            last = stop == end
            self._ready.append(RelayFrame(Frame(number, start, stop), last))
            self._next[number] = stop
            if last:
                del self._next[number]

    def take(self, timeout: float) -> RelayFrame | None:
        """Return the next frame, or None if there was none within `timeout` seconds."""
        with self._changed:
            if not self._ready and self._next:
                self._changed.wait(timeout)
            return self._ready.popleft() if self._ready else None

    @property
    def finished(self) -> bool:
        """Whether all frames were handed out."""
        with self._changed:
            return not self._ready and not self._next
