"""A set of byte ranges of a file: half-open, sorted, and joined where they touch."""

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

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def __repr__(self) -> str:
        return f"Extents({list(self)})"

    @property
    def total(self) -> int:
        """Number of bytes in all ranges."""
        return sum(stop - start for start, stop in self)

    def add(self, start: int, stop: int) -> None:
        """Add the bytes from `start` to `stop`."""
        if start >= stop:
            return
        # Join every range that overlaps or touches the new one.
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    def cover(self, start: int, stop: int) -> bool:
        """Whether the set contains all bytes from `start` to `stop`."""
        return start >= stop or self.end_from(start) >= stop

    def end_from(self, start: int) -> int:
        """Return the end of the range that contains `start`; `start` itself when no range contains it."""
        index = bisect_right(self._starts, start) - 1
        return self._stops[index] if index >= 0 and self._stops[index] > start else start

    def missing(self, start: int, stop: int) -> list[Range]:
        """Return the gaps between `start` and `stop`."""
        gaps = []
        while start < stop:
            start = self.end_from(start)
            index = bisect_right(self._starts, start)
            end = min(stop, self._starts[index] if index < len(self._starts) else stop)
            if start < end:
                gaps.append((start, end))
            start = max(start, end)
        return gaps

    def within(self, start: int, stop: int) -> int:
        """Return how many bytes between `start` and `stop` the set contains."""
        return max(0, stop - start) - sum(end - begin for begin, end in self.missing(start, stop))
