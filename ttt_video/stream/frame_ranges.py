"""A set of frame indices whose size in memory depends on its gaps, not on the indices."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class FrameRanges:
    """Frame indices as ranges: one for a video in order, many if indices are milliseconds."""

    def __init__(self) -> None:
        self._starts = array("q")
        self._stops = array("q")  # exclusive
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._starts, index)
        return place > 0 and index < self._stops[place - 1]

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.ranges():
            yield from range(start, stop)

    def add(self, index: int) -> None:
        """Adds an index, unless it is there."""
        if index in self:
            return
        self._count += 1
        place = bisect_left(self._starts, index)
        follows = place > 0 and self._stops[place - 1] == index
        precedes = place < len(self._starts) and self._starts[place] == index + 1
        if follows and precedes:
            self._stops[place - 1] = self._stops.pop(place)
            self._starts.pop(place)
        elif follows:
            self._stops[place - 1] = index + 1
        elif precedes:
            self._starts[place] = index
        else:
            self._starts.insert(place, index)
            self._stops.insert(place, index + 1)

    def ranges(self) -> list[tuple[int, int]]:
        """Returns (start, stop) of every range in order; ``stop`` is not in it."""
        return list(zip(self._starts, self._stops, strict=True))

    def covers(self, ranges: Iterable[Iterable[int]]) -> bool:
        """Returns whether all indices of other such ranges are here."""
        for start, stop in ranges:
            place = bisect_right(self._starts, start)
            if place == 0 or stop > self._stops[place - 1]:
                return False
        return True
