"""Which bytes of a file are there: half-open ranges, kept in order and joined."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]


class Extents:
    """A set of byte ranges ``[start, stop)``.

    Parameters
    ----------
    ranges
        In any order; they may overlap.
    """

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Range]:
        return zip(self._starts, self._stops, strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Extents({list(self)})"

    @property
    def total(self) -> int:
        """Bytes in all ranges."""
        return sum(stop - start for start, stop in self)

    def add(self, start: int, stop: int) -> None:
        """Add the bytes from `start` to `stop`."""
        if start >= stop:
            return
        # What touches the new range on either side becomes one with it.
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    def cover(self, start: int, stop: int) -> bool:
        """Whether all bytes from `start` to `stop` are in."""
        return start >= stop or self.end_from(start) >= stop

    def end_from(self, start: int) -> int:
        """Where the bytes that are in without a gap from `start` on end; `start` itself when it is not in."""
        place = bisect_right(self._starts, start) - 1
        return self._stops[place] if place >= 0 and self._stops[place] > start else start

    def missing(self, start: int, stop: int) -> list[Range]:
        """The gaps between `start` and `stop`."""
        gaps = []
        while start < stop:
            start = self.end_from(start)
            place = bisect_right(self._starts, start)
            end = min(stop, self._starts[place] if place < len(self._starts) else stop)
            if start < end:
                gaps.append((start, end))
            start = max(start, end)
        return gaps

    def within(self, start: int, stop: int) -> int:
        """Bytes between `start` and `stop` that are in."""
        return max(0, stop - start) - sum(end - begin for begin, end in self.missing(start, stop))
