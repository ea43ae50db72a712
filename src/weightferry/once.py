"""Run something once and let every rank have the outcome: what people use `main_process_first` for, with errors.

Nobody waits in a collective. What the function raises is raised on every rank, and a rank that dies while the others
wait for it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from weightferry.cluster.connect import operation
from weightferry.phases.agree import RankRequest, agree
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
        What it returns must pickle.
    folder
        Ranks that see this folder are one domain; None: the cache folder of the settings.
    group
        The ranks that take part; None: all of the default process group.

    Returns
    -------
    object
        On every rank, what the leader of its own domain returned.

    Raises
    ------
    CollectError
        The same on every rank, when `fn` raised on any leader or a leader died.
    """
    settings = Settings.from_environ(cache_dir=folder)
    with operation(settings, "run_on_leader", group=group) as coordinator:
        _, job = agree(coordinator, lambda: RankRequest({}), settings)
        values: Mapping[int, T] = coordinator.round(
            "run", lambda: fn(*args, **kwargs), dict, job.leaders, job.role(coordinator.rank)
        )
        return values[job.domain_of(coordinator.rank).leader]


def run_on_main(fn: Callable[..., T], *args: Any, group: ProcessGroup | None = None, **kwargs: Any) -> T:
    """Call ``fn(*args, **kwargs)`` once, on rank 0 (of `group`), and return its value on every rank; collective.

    Parameters and errors are those of `run_on_leader`.
    """
    with operation(Settings.from_environ(), "run_on_main", group=group) as coordinator:
        return coordinator.once("run", lambda: fn(*args, **kwargs))
