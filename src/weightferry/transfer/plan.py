"""Who reads what from where: a pure function of the manifest and the surveys."""

from __future__ import annotations

from collections.abc import Mapping

from weightferry.cache.survey import Survey


def plan(count: int, surveys: Mapping[int, Survey]) -> dict[int, tuple[int, ...]]:
    """Decide which files each leader reads from the origin.

    Parameters
    ----------
    count
        Number of files to stage; a file is named by its place in `Manifest.staged()`.
    surveys
        By leader, what its domain holds.

    Returns
    -------
    dict of int to tuple of int
        By leader, the files that its domain lacks.
    """
    return {leader: tuple(i for i in range(count) if i not in held.whole) for leader, held in surveys.items()}
