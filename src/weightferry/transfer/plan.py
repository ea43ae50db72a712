"""The plan of a transfer: which leader reads which pieces, and which neighbours relay them.

The leaders form a ring in the order of their ranks. A piece that a domain lacks is read by its leader from the origin,
or comes from its left neighbour. A leader that has a piece which its right neighbour lacks and does not read itself
relays it as it arrives. So a piece that some domain holds never leaves the origin again, and any other piece leaves it
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightferry.transfer.pieces import Piece


@dataclass(frozen=True)
class Plan:
    """What every leader does.

    Attributes
    ----------
    pieces : tuple of Piece
        All pieces that some domain lacks.
    lacks : mapping of int to frozenset of int
        By leader, the pieces that its domain lacks.
    reads : mapping of int to tuple of int
        By leader, the pieces that it reads from the origin.
    """

    pieces: tuple[Piece, ...]
    lacks: Mapping[int, frozenset[int]]
    reads: Mapping[int, tuple[int, ...]]

    @property
    def ring(self) -> tuple[int, ...]:
        """The leaders in the order of the ring."""
        return tuple(self.lacks)

    def left(self, leader: int) -> int:
        """Return the neighbour that relays pieces to `leader`."""
        return self.ring[self.ring.index(leader) - 1]

    def right(self, leader: int) -> int:
        """Return the neighbour to which `leader` relays pieces."""
        return self.ring[(self.ring.index(leader) + 1) % len(self.ring)]

    def relayed_to(self, leader: int) -> frozenset[int]:
        """Return the pieces that `leader` receives from its left neighbour."""
        return self.lacks[leader] - frozenset(self.reads[leader])

    def relayed_by(self, leader: int) -> frozenset[int]:
        """Return the pieces that `leader` relays to its right neighbour."""
        return self.relayed_to(self.right(leader)) if len(self.ring) > 1 else frozenset()

    def bytes_for(self, leader: int) -> int:
        """Return the bytes of the pieces that the domain of `leader` lacks, as far as their sizes are known."""
        return sum(self.pieces[number].size for number in self.lacks[leader])

    def edges_of(self, leader: int) -> list[tuple[int, int]]:
        """Return the connections of `leader`, each as its left and right end, in the order in which to make them.

        Two neighbours make their connection at the same time. So the connections are coloured, all of one colour come
        before those of the next, and no leader has two of one colour. A ring of even length has two colours; the last
        connection of a ring of odd length is the third.
        """
        size = len(self.ring)

        def colour(place: int) -> int:
            return 2 if size % 2 and place == 0 else place % 2

        ends = {self.ring.index(right): right for right in (leader, self.right(leader)) if size > 1}
        used = {place: right for place, right in ends.items() if self.relayed_to(right)}
        return [(self.left(used[place]), used[place]) for place in sorted(used, key=lambda p: (colour(p), p))]


@dataclass(frozen=True)
class TransferTask:
    """What one leader needs to know of a transfer.

    Attributes
    ----------
    plan : Plan
        The same for all leaders.
    missing : tuple of int
        The files that are not complete in this domain, by index.
    hosts : mapping of int to str
        By leader, its host name.
    attempt : int
        Number of the transfer in its operation, from 1.
    """

    plan: Plan
    missing: tuple[int, ...]
    hosts: Mapping[int, str]
    attempt: int = 1
