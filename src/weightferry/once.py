"""Call a function once per job, or once per storage domain, and return its value on every rank.

This replaces accelerate's `main_process_first`, with errors: if the function raises an error, every rank raises it; if
the rank that runs it dies, the other ranks raise an error that names this rank. Ranks do not wait in a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from weightferry.cluster.connect import process_group_coordinator
from weightferry.phases.agree import agree
from weightferry.phases.job_request import RankRequest
from weightferry.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def run_on_leader(
    fn: Callable[..., T],
    *args: Any,
    folder: str | Path | None = None,
    group: ProcessGroup | None = None,
    **kwargs: Any,
) -> T:
    """Call ``fn(*args, **kwargs)`` once for each storage domain, on its leader; collective.

    Parameters
    ----------
    fn
        The function. Its value must be picklable.
    folder
        Ranks that see this folder are one storage domain; None: the cache folder of the settings.
    group
        The ranks that take part; None: all ranks of the default process group.

    Returns
    -------
    object
        On every rank, the value from the leader of its own domain.

    Raises
    ------
    CollectError
        The same on every rank, if `fn` raises an error on any leader or a leader dies.
    """
    settings = Settings.from_environ(cache_dir=folder)
    with process_group_coordinator(settings, "run_on_leader", group=group) as coordinator:
        _, job = agree(coordinator, lambda: RankRequest({}), settings)
        values: Mapping[int, T] = coordinator.run_phase(
            "run", lambda: fn(*args, **kwargs), dict, job.leaders, job.role(coordinator.rank)
        )
        return values[job.domain_of(coordinator.rank).leader]


def run_on_main(fn: Callable[..., T], *args: Any, group: ProcessGroup | None = None, **kwargs: Any) -> T:
    """Call ``fn(*args, **kwargs)`` once, on rank 0 of `group`, and return its value on every rank; collective.

    Parameters and errors are the same as those of `run_on_leader`.
    """
    with process_group_coordinator(Settings.from_environ(), "run_on_main", group=group) as coordinator:
        return coordinator.run_on_rank0("run", lambda: fn(*args, **kwargs))
