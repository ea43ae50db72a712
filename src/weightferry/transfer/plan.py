"""Who reads what from where: a pure function of the manifest and the surveys, the same on every rank.

The leaders form a ring in the order of their ranks. A piece that a domain lacks is read by its leader from the origin,
or comes from its left neighbour; whoever has a piece that its right neighbour lacks, and does not read itself, passes
it on as it comes. So a piece that some domain holds never leaves the origin again, and every other one leaves it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightferry.cache.extents import Extents
from weightferry.cache.survey import DomainSurvey
from weightferry.manifest import Manifest
from weightferry.transfer.pieces import Piece, cut


@dataclass(frozen=True)
class Plan:
    """What every leader does.

    Attributes
    ----------
    pieces : tuple of Piece
        All that some domain lacks.
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
        """The leaders in their order."""
        return tuple(self.lacks)

    def left(self, leader: int) -> int:
        """The neighbour that passes pieces to `leader`."""
        return self.ring[self.ring.index(leader) - 1]

    def right(self, leader: int) -> int:
        """The neighbour that `leader` passes pieces to."""
        return self.ring[(self.ring.index(leader) + 1) % len(self.ring)]

    def passed_to(self, leader: int) -> frozenset[int]:
        """The pieces that come to `leader` from its left neighbour."""
        return self.lacks[leader] - frozenset(self.reads[leader])

    def passed_by(self, leader: int) -> frozenset[int]:
        """The pieces that `leader` passes to its right neighbour."""
        return self.passed_to(self.right(leader)) if len(self.ring) > 1 else frozenset()

    def bytes_for(self, leader: int) -> int:
        """Bytes of the pieces that the domain of `leader` lacks, as far as it is known."""
        return sum(self.pieces[number].size for number in self.lacks[leader])

    def edges_of(self, leader: int) -> list[tuple[int, int]]:
        """The connections of `leader`, each as its left and right end, in the order in which to make them.

        Neighbours make them at the same time: all of one colour before those of the next, and no leader has two of
        one colour. A ring of even length has two colours, the last connection of an odd one is the third.
        """
        size = len(self.ring)

        def colour(place: int) -> int:
            return 2 if size % 2 and place == 0 else place % 2

        ends = {self.ring.index(right): right for right in (leader, self.right(leader)) if size > 1}
        used = {place: right for place, right in ends.items() if self.passed_to(right)}
        return [(self.left(used[place]), used[place]) for place in sorted(used, key=lambda p: (colour(p), p))]


@dataclass(frozen=True)
class TransferTask:
    """What one leader needs to know of a transfer.

    Attributes
    ----------
    plan : Plan
        The same for all leaders.
    lacking : tuple of int
        The files that are not whole in this domain.
    hosts : mapping of int to str
        By leader, its host.
    attempt : int
        Transfers of one operation have different numbers.
    """

    plan: Plan
    lacking: tuple[int, ...]
    hosts: Mapping[int, str]
    attempt: int = 1


def plan(manifest: Manifest, surveys: Mapping[int, DomainSurvey]) -> Plan:
    """Decide.

    Parameters
    ----------
    manifest
        What is wanted.
    surveys
        By leader, what its domain holds, and whether it reaches the origins.

    Raises
    ------
    CollectError
        Nobody holds a piece, and no leader can read it: the first leader's own reason.
    """
    files = [file for _, file in manifest.staged()]
    wanted = [i for i in manifest.contents() if any(i not in held.whole for held in surveys.values())]
    able = sum(1 for held in surveys.values() if held.nearby or not held.unreachable)
    pieces = cut(
        files,
        wanted,
        able,
        lambda index: (
            manifest.source_of(index),  # one reader, from one origin
            *((index in held.whole, index in held.nearby) for held in surveys.values()),
        ),
        lambda index: {edge for held in surveys.values() for span in held.parts.get(index, ()) for edge in span},
    )
    lacks = {
        leader: frozenset(n for n, piece in enumerate(pieces) if not _holds(held, piece))
        for leader, held in surveys.items()
    }
    of_nobody = [number for number in range(len(pieces)) if all(number in missing for missing in lacks.values())]
    _check_readable(manifest, surveys, [index for number in of_nobody for index in pieces[number].files])
    reads: dict[int, list[int]] = {leader: [] for leader in surveys}
    load = dict.fromkeys(surveys, 0)
    for number in of_nobody:
        piece = pieces[number]
        reader = _reader(piece, manifest.source_of(piece.files[0]), surveys, load)
        reads[reader].append(number)
        load[reader] += piece.size - _held(surveys[reader], piece)
    return Plan(pieces, lacks, {leader: tuple(numbers) for leader, numbers in reads.items()})


def _check_readable(manifest: Manifest, surveys: Mapping[int, DomainSurvey], indices: Sequence[int]) -> None:
    """Raise when nobody can read files that nobody has: why the first leader cannot, and which files these are."""
    files = list(manifest.staged())
    lost = [
        index
        for index in dict.fromkeys(indices)
        if not any(_may_read(held, manifest.source_of(index), (index,)) for held in surveys.values())
    ]
    if lost:
        why = next(iter(surveys.values())).unreachable[manifest.source_of(lost[0])]
        names = [f"{files[index][0].name}/{files[index][1].path}" for index in lost]
        raise type(why)(f"{why}; no node has {len(names)} files: {', '.join(names)}", subject=why.subject)


def _reader(piece: Piece, source: int, surveys: Mapping[int, DomainSurvey], load: Mapping[int, int]) -> int:
    """Choose among those that may read it, best near by: who has most of it already, then who has least to read."""
    near = [leader for leader, held in surveys.items() if held.nearby.issuperset(piece.files)]
    able = near or [leader for leader, held in surveys.items() if _may_read(held, source, piece.files)]
    return min(able, key=lambda leader: (-_held(surveys[leader], piece), load[leader]))


def _may_read(held: DomainSurvey, source: int, files: Sequence[int]) -> bool:
    return source not in held.unreachable or held.nearby.issuperset(files)


def _holds(held: DomainSurvey, piece: Piece) -> bool:
    if all(file in held.whole for file in piece.files):
        return True
    return not piece.bundle and piece.size > 0 and _held(held, piece) == piece.size


def _held(held: DomainSurvey, piece: Piece) -> int:
    """Bytes of a piece that are there in part of a file."""
    if piece.bundle or piece.stop is None:
        return 0
    return held.parts.get(piece.files[0], Extents()).within(piece.start, piece.stop)
