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
    lacks = {
        leader: frozenset(n for n, piece in enumerate(pieces) if not _holds(survey, piece))
        for leader, survey in surveys.items()
    }
    held_by_none = [number for number in range(len(pieces)) if all(number in missing for missing in lacks.values())]
    _check_readable(manifest, surveys, [index for number in held_by_none for index in pieces[number].files])
    reads: dict[int, list[int]] = {leader: [] for leader in surveys}
    load = dict.fromkeys(surveys, 0)
    for number in held_by_none:
        piece = pieces[number]
        reader = _choose_reader(piece, manifest.source_of(piece.files[0]), surveys, load)
        reads[reader].append(number)
        load[reader] += piece.size - _bytes_held(surveys[reader], piece)
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


def _choose_reader(piece: Piece, source: int, surveys: Mapping[int, DomainSurvey], load: Mapping[int, int]) -> int:
    """Choose among the leaders that may read the piece.

    A leader with the files in the user's Hugging Face cache wins; then the one that holds most of the piece; then the
    one with the fewest bytes to read.
    """
    local = [leader for leader, survey in surveys.items() if survey.in_user_cache.issuperset(piece.files)]
    able = local or [leader for leader, survey in surveys.items() if _may_read(survey, source, piece.files)]
    return min(able, key=lambda leader: (-_bytes_held(surveys[leader], piece), load[leader]))


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
