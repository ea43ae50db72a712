"""Phase 5, transfer: leaders read their pieces, relay them round the ring, and publish each file when it is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from weightferry.cache.survey import DomainSurvey
from weightferry.cluster.coordinator import Coordinator
from weightferry.phases.domain_state import DomainState
from weightferry.transfer.plan import Plan, TransferTask
from weightferry.transfer.run_transfer import TransferResult, run_transfer
from weightferry.transfer.verify_results import verify_results

ATTEMPTS = 2
"""How often a file with wrong bytes is transferred before it is an error."""


def transfer(
    coordinator: Coordinator,
    state: DomainState,
    surveys: Mapping[int, DomainSurvey],
    make_plan: Callable[[], Plan],
    attempt: int,
) -> tuple[int, ...]:
    """Transfer what the domains lack; collective.

    Parameters
    ----------
    surveys
        By leader, the same on every rank.
    make_plan
        Returns the plan. Called on the leaders; an error that it raises fails the operation on every rank.
    attempt
        Counts from 1 to `ATTEMPTS`.

    Returns
    -------
    tuple of int
        The files with wrong bytes, to be transferred again; empty when every domain has the right files.

    Raises
    ------
    CollectError
        The same on every rank; `IntegrityError` when the bytes are wrong in the last attempt.
    """
    verify = partial(verify_results, state.manifest, surveys, who=_names(coordinator, state), final=attempt == ATTEMPTS)
    work = partial(_transfer_missing, coordinator, state, make_plan, attempt)
    return coordinator.run_phase("transfer", work, verify, state.job.leaders, state.role)


def _transfer_missing(
    coordinator: Coordinator, state: DomainState, make_plan: Callable[[], Plan], attempt: int
) -> TransferResult:
    task = TransferTask(make_plan(), state.missing(), state.hosts, attempt)
    origins, user_cache = state.access.create_origin, state.access.user_cache
    result = run_transfer(task, state.surveyor, state.settings, coordinator, origins, user_cache)
    state.transferred += result
    return result


def all_complete(coordinator: Coordinator, state: DomainState, surveys: Mapping[int, DomainSurvey]) -> bool:
    """Return whether every domain has every file, with the same bytes; every rank computes the same."""
    complete = all(len(survey.complete) == len(state.surveyor.files) for survey in surveys.values())
    nothing = dict.fromkeys(surveys, TransferResult())
    who = _names(coordinator, state)
    return complete and not verify_results(state.manifest, surveys, nothing, who=who, final=False)


def _names(coordinator: Coordinator, state: DomainState) -> dict[int, str]:
    """Return by leader how errors name it."""
    return {leader: f"rank {coordinator.job_ranks[leader]} ({host})" for leader, host in state.hosts.items()}
