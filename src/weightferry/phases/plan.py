"""Phase 4, plan: a pure function from the manifest and the surveys to who reads which piece from where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightferry.cache.survey import DomainSurvey
from weightferry.manifest import Manifest
from weightferry.transfer.pieces import Piece, cut_pieces
from weightferry.transfer.plan import Plan


def plan(manifest: Manifest, surveys: Mapping[int, DomainSurvey]) -> Plan:
    """Decide which leader reads which pieces; the same on every rank.

    Parameters
    ----------
    manifest
        The files that every domain needs.
    surveys
        By leader, what its domain holds, and which origins it cannot reach.

    Raises
    ------
    CollectError
        No domain holds a piece, and no leader can read it: the reason of the first leader.
    """
    files = [file for _, file in manifest.staged()]
    wanted = [i for i in manifest.contents() if any(i not in survey.complete for survey in surveys.values())]
    readers = sum(1 for survey in surveys.values() if survey.in_user_cache or not survey.unreachable)
    pieces = cut_pieces(
        files,
        wanted,
        readers,
        lambda index: (
            manifest.source_of(index),  # one reader, from one origin
            *((index in survey.complete, index in survey.in_user_cache) for survey in surveys.values()),
        ),
        lambda index: {
            edge for survey in surveys.values() for span in survey.partial_ranges.get(index, ()) for edge in span
        },
    )
    lacks = _lacks(pieces, surveys)
    held_by_none = sorted(frozenset(range(len(pieces))).intersection(*set(lacks.values())))
    _check_readable(manifest, surveys, [index for number in held_by_none for index in pieces[number].files])
    reads: dict[int, list[int]] = {leader: [] for leader in surveys}
    readers_by_load = _Readers(surveys)
    for number in held_by_none:
        piece = pieces[number]
        reads[readers_by_load.choose(piece, manifest.source_of(piece.files[0]))].append(number)
    return Plan(pieces, lacks, {leader: tuple(numbers) for leader, numbers in reads.items()})


def _check_readable(manifest: Manifest, surveys: Mapping[int, DomainSurvey], indices: Sequence[int]) -> None:
    """Raise when no leader can read files that no domain has: the reason of the first leader, and all these files."""
    files = list(manifest.staged())
    lost = [
        index
        for index in dict.fromkeys(indices)
        if not any(_may_read(survey, manifest.source_of(index), (index,)) for survey in surveys.values())
    ]
    if lost:
        reason = next(iter(surveys.values())).unreachable[manifest.source_of(lost[0])]
        names = [f"{files[index][0].name}/{files[index][1].path}" for index in lost]
        raise type(reason)(f"{reason}; no node has {len(names)} files: {', '.join(names)}", subject=reason.subject)


def _lacks(pieces: Sequence[Piece], surveys: Mapping[int, DomainSurvey]) -> dict[int, frozenset[int]]:
    """Return by leader the pieces that its domain lacks. Most domains have the same files, and no parts of others."""
    by_files: dict[frozenset[int], frozenset[int]] = {}
    lacks = {}
    for leader, survey in surveys.items():
        files = frozenset(survey.complete)
        missing = None if survey.partial_ranges else by_files.get(files)
        if missing is None:
            missing = frozenset(number for number, piece in enumerate(pieces) if not _holds(survey, piece))
            if not survey.partial_ranges:
                by_files[files] = missing
        lacks[leader] = missing
    return lacks


class _Readers:
    """Chooses the leader that reads a piece, and counts the bytes that each leader has to read.

    A leader with the files in the user's Hugging Face cache wins; then the one that holds most of the piece; then the
    one with the fewest bytes to read. Only leaders that may hold part of a piece are asked for it: a job of thousands
    of nodes has as many leaders.
    """

    def __init__(self, surveys: Mapping[int, DomainSurvey]) -> None:
        self._surveys = surveys
        self._with_user_cache = [leader for leader, survey in surveys.items() if survey.in_user_cache]
        self._with_parts = {leader for leader, survey in surveys.items() if survey.partial_ranges}
        self._reaching: dict[int, list[int]] = {}
        self._load = dict.fromkeys(surveys, 0)

    def choose(self, piece: Piece, source: int) -> int:
        """Return the leader that reads the piece from this source."""
        able = self._able(piece, source)
        held = {leader: _bytes_held(self._surveys[leader], piece) for leader in self._with_parts.intersection(able)}
        most = max(held.values(), default=0)
        if most:
            able = [leader for leader in able if held.get(leader) == most]
        reader = min(able, key=self._load.__getitem__)
        self._load[reader] += piece.size - held.get(reader, 0)
        return reader

    def _able(self, piece: Piece, source: int) -> list[int]:
        local = [one for one in self._with_user_cache if self._surveys[one].in_user_cache.issuperset(piece.files)]
        if not local and source not in self._reaching:
            self._reaching[source] = [one for one, survey in self._surveys.items() if source not in survey.unreachable]
        return local or self._reaching[source]


def _may_read(survey: DomainSurvey, source: int, files: Sequence[int]) -> bool:
    return source not in survey.unreachable or survey.in_user_cache.issuperset(files)


def _holds(survey: DomainSurvey, piece: Piece) -> bool:
    if all(file in survey.complete for file in piece.files):
        return True
    return not piece.bundle and piece.size > 0 and _bytes_held(survey, piece) == piece.size


def _bytes_held(survey: DomainSurvey, piece: Piece) -> int:
    """Return how many bytes of a piece the domain holds as a part of an incomplete file."""
    if piece.bundle or piece.stop is None:
        return 0
    ranges = survey.partial_ranges.get(piece.files[0])
    return 0 if ranges is None else ranges.within(piece.start, piece.stop)
