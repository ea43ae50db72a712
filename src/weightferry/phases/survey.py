"""Phase 3, survey: every leader locks what its cache lacks, reports what it holds, and takes the space for the rest."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

from weightferry.cache.space import make_room
from weightferry.cache.survey import DomainSurvey
from weightferry.cache.usage import hold_sources
from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import CollectError
from weightferry.phases.domain_state import DomainState
from weightferry.transfer.origin_reader import find_unreachable_sources


def survey(coordinator: Coordinator, state: DomainState, suspects: Collection[int] = ()) -> Mapping[int, DomainSurvey]:
    """Survey the caches of all domains at once; when another job holds locks, one after the other; collective.

    All jobs use the same order of caches. So two jobs never wait for each other: a job that waits holds only locks of
    caches that come earlier.

    Parameters
    ----------
    suspects
        Files with wrong bytes in some domain: the survey does not count them as complete.

    Returns
    -------
    mapping of int to DomainSurvey
        By leader, the same on every rank.

    Raises
    ------
    CollectError
        The same on every rank; `NoSpace` when the missing files do not fit.
    """
    leaders = state.job.leaders
    surveys: Mapping[int, DomainSurvey] = coordinator.run_phase(
        "survey", partial(_survey_cache, coordinator, state, suspects), _share_equal, leaders, state.role
    )
    if any(survey.locked_elsewhere for survey in surveys.values()):
        state.surveyor.release()
        for leader in sorted(surveys, key=lambda leader: surveys[leader].cache_id):
            wait = partial(_wait_for_locks, coordinator, state)
            surveys = {**surveys, **coordinator.run_phase("survey", wait, dict, (leader,), state.role)}
    if state.peers_first and _lacked_by_all(state, surveys):
        probe = partial(_probe_origins, state)
        unreachable = coordinator.run_phase("survey", probe, dict, leaders, state.role)
        surveys = {leader: replace(survey, unreachable=unreachable[leader]) for leader, survey in surveys.items()}
    state.already_there = state.already_there or state.complete
    surveyor = state.surveyor
    state.tier_paths = {
        surveyor.layout.blob(*surveyor.files[index]): path for index, path in surveyor.tier_paths.items()
    }
    coordinator.seconds.setdefault("transfer", 0.0)
    return surveys


def _wait_for_locks(coordinator: Coordinator, state: DomainState) -> DomainSurvey:
    with coordinator.waiting("waits for another job that downloads the same files"):
        return _survey_cache(coordinator, state, (), wait=True)


def _survey_cache(
    coordinator: Coordinator, state: DomainState, suspects: Collection[int], *, wait: bool = False
) -> DomainSurvey:
    surveyor, settings = state.surveyor, state.settings
    # First of all: from here on no other process evicts the sources.
    hold_sources(surveyor.layout, surveyor.tiers, state.manifest, coordinator.check, settings.stall_timeout)
    found = surveyor.survey(wait=wait, suspects=suspects)
    state.complete, state.in_user_cache = found.complete, found.in_user_cache
    if not found.locked_elsewhere:  # otherwise another job takes the space and downloads the files
        lacking = [surveyor.files[index] for index in state.missing()]
        make_room(surveyor, lacking, settings, coordinator.check)
    unreachable = {} if state.peers_first else _probe_origins(state)
    # The other domains need a SHA-256 only where the manifest has no checksum.
    complete = {index: "" if surveyor.files[index][1].checksum else sha256 for index, sha256 in found.complete.items()}
    return replace(found, complete=complete, unreachable=unreachable)


def _probe_origins(state: DomainState) -> dict[int, CollectError]:
    """Return the sources that this leader lacks files of and cannot read from, and why."""
    if not state.probe_origins:
        return {}
    local = {*state.complete, *state.in_user_cache}
    missing = [index for index in range(len(state.surveyor.files)) if index not in local]
    return find_unreachable_sources(state.manifest, missing, state.settings, state.access.create_origin)


def _lacked_by_all(state: DomainState, surveys: Mapping[int, DomainSurvey]) -> bool:
    """Return whether an origin must be read: some file is in no domain; the same on every rank."""
    held = {index for survey in surveys.values() for index in (*survey.complete, *survey.in_user_cache)}
    return not held.issuperset(state.manifest.contents())


def _share_equal(surveys: Mapping[int, DomainSurvey]) -> dict[int, DomainSurvey]:
    """Make equal surveys one object: thousands of ranks read the pickle of all of them."""
    distinct: dict[bytes, DomainSurvey] = {}
    return {leader: distinct.setdefault(pickle.dumps(survey), survey) for leader, survey in surveys.items()}
