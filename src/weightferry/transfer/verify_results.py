"""Whether every domain got the promised bytes, and if not, who has which wrong: rank 0's part of a transfer."""

from __future__ import annotations

from collections.abc import Mapping

from weightferry.cache.survey import DomainSurvey
from weightferry.errors import IntegrityError
from weightferry.manifest import Manifest
from weightferry.transfer.incoming_file import COMPARED, ChecksumMismatch
from weightferry.transfer.task import TransferResult


def verify_results(
    manifest: Manifest,
    surveys: Mapping[int, DomainSurvey],
    results: Mapping[int, TransferResult],
    who: Mapping[int, str],
    *,
    final: bool,
) -> tuple[int, ...]:
    """Compare what the domains have with what was promised, or with each other where nothing was.

    Parameters
    ----------
    who
        By leader, how errors name it.

    Returns
    -------
    tuple of int
        The files that are wrong somewhere, by place: they are to be brought once more.

    Raises
    ------
    IntegrityError
        A file is wrong, and the transfer was `final`: the text says what was expected, what came, and where.
    """
    doubted = []
    for index, (pinned, file) in enumerate(manifest.staged()):
        wrong = {leader: done.wrong[index] for leader, done in results.items() if index in done.wrong}
        text = ""
        if wrong:
            text = _wrong_text(str(file.checksum), wrong, who)
        elif not file.checksum:
            text = _differ_text(_digests(index, surveys, results), who)
        if text and final:
            raise IntegrityError(text, subject=f"{pinned.name}/{file.path}")
        if text:
            doubted.append(index)
    return tuple(doubted)


def _digests(index: int, surveys: Mapping[int, DomainSurvey], results: Mapping[int, TransferResult]) -> dict[str, int]:
    """By digest of a file, the first leader that has it."""
    seen: dict[str, int] = {}
    for leader, done in results.items():
        digest = done.sha256.get(index) or surveys[leader].complete.get(index)
        if digest:
            seen.setdefault(digest, leader)
    return seen


def _differ_text(seen: Mapping[str, int], who: Mapping[int, str]) -> str:
    if len(seen) < 2:
        return ""
    told = ", ".join(f"{who[leader]} sha256 {digest}" for digest, leader in seen.items())
    return f"the nodes got different bytes, twice: {told}"


def _wrong_text(expected: str, wrong: Mapping[int, ChecksumMismatch], who: Mapping[int, str]) -> str:
    first = next(iter(wrong.values()))
    if len(wrong) == len(who) and all(other.parts == first.parts for other in wrong.values()):
        return f"the origin sends other bytes than it promises, twice: expected {expected}, got {first.got}"
    told = [f"{who[leader]} has {got.got}{_where(got, wrong)}" for leader, got in wrong.items()]
    return f"wrong bytes, twice: expected {expected}; {'; '.join(told)}"


def _where(one: ChecksumMismatch, wrong: Mapping[int, ChecksumMismatch]) -> str:
    """Say in which parts one domain differs from the others that are wrong."""
    differing = {
        number
        for other in wrong.values()
        for number, (mine, theirs) in enumerate(zip(one.parts, other.parts, strict=False))
        if mine != theirs
    }
    if not differing:
        return ""
    return ", different from others in bytes " + ", ".join(
        f"{number * COMPARED}-{(number + 1) * COMPARED}" for number in sorted(differing)[:5]
    )
