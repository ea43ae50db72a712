"""Rank 0's check of a transfer: whether every domain has the right bytes, and if not, which domain has which wrong."""

from __future__ import annotations

from collections.abc import Mapping

from weightferry.cache.survey import DomainSurvey
from weightferry.errors import IntegrityError
from weightferry.manifest import Manifest
from weightferry.transfer.incoming_file import BLOCK, ChecksumMismatch
from weightferry.transfer.run_transfer import TransferResult


def verify_results(
    manifest: Manifest,
    surveys: Mapping[int, DomainSurvey],
    results: Mapping[int, TransferResult],
    who: Mapping[int, str],
    *,
    final: bool,
) -> tuple[int, ...]:
    """Compare the files of all domains with their published checksums, or with each other where there is none.

    Parameters
    ----------
    who
        By leader, how errors name it.

    Returns
    -------
    tuple of int
        The files that are wrong in some domain, by index: they must be transferred again.

    Raises
    ------
    IntegrityError
        A file is wrong, and the transfer was `final`. The text says what was expected, what arrived, and where.
    """
    suspects = []
    for index, (pinned, file) in enumerate(manifest.staged()):
        mismatches = {leader: done.mismatches[index] for leader, done in results.items() if index in done.mismatches}
        text = ""
        if mismatches:
            text = _mismatch_text(str(file.checksum), mismatches, who)
        elif not file.checksum:
            text = _difference_text(_digests(index, surveys, results), who)
        if text and final:
            raise IntegrityError(text, subject=f"{pinned.name}/{file.path}")
        if text:
            suspects.append(index)
    return tuple(suspects)


def _digests(index: int, surveys: Mapping[int, DomainSurvey], results: Mapping[int, TransferResult]) -> dict[str, int]:
    """Return by digest of a file the first leader that has it."""
    leaders: dict[str, int] = {}
    for leader, done in results.items():
        digest = done.sha256.get(index) or surveys[leader].complete.get(index)
        if digest:
            leaders.setdefault(digest, leader)
    return leaders


def _difference_text(leaders: Mapping[str, int], who: Mapping[int, str]) -> str:
    if len(leaders) < 2:
        return ""
    found = ", ".join(f"{who[leader]} sha256 {digest}" for digest, leader in leaders.items())
    return (
        f"the nodes got different bytes, also after a second download: {found}. The origin publishes no checksum and "
        "sends different content; wait until the file no longer changes, or stage it from another place."
    )


def _mismatch_text(expected: str, mismatches: Mapping[int, ChecksumMismatch], who: Mapping[int, str]) -> str:
    first = next(iter(mismatches.values()))
    if len(mismatches) == len(who) and all(one.block_crcs == first.block_crcs for one in mismatches.values()):
        return (
            f"checksum mismatch after a second download: expected {expected}, got {first.actual}. The file at the "
            "origin is damaged or was replaced; check it there, or pin another revision."
        )
    found = [f"{who[leader]} has {one.actual}{_where(one, mismatches)}" for leader, one in mismatches.items()]
    return f"checksum mismatch after a second download: expected {expected}; {'; '.join(found)}"


def _where(one: ChecksumMismatch, mismatches: Mapping[int, ChecksumMismatch]) -> str:
    """Return in which blocks one domain differs from the other domains with a mismatch."""
    differing = {
        number
        for other in mismatches.values()
        for number, (mine, theirs) in enumerate(zip(one.block_crcs, other.block_crcs, strict=False))
        if mine != theirs
    }
    if not differing:
        return ""
    return ", different from others in bytes " + ", ".join(
        f"{number * BLOCK}-{(number + 1) * BLOCK}" for number in sorted(differing)[:5]
    )
