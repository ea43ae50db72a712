"""Load all files on every rank: every rank checks all of its files before any rank writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightferry.cluster.coordinator import Coordinator
from weightferry.cluster.launchers import read_hints
from weightferry.errors import PlanMismatch
from weightferry.loading.digest import Digests, combine_digests, difference_error, find_differing, tensor_digests
from weightferry.loading.hook_registry import Hook
from weightferry.loading.load_object import check_loadable, prepare_object
from weightferry.loading.options import DEFAULT_OPTIONS, LoadOptions
from weightferry.loading.read_ahead import read_ahead
from weightferry.loading.weight_files import list_weight_files


@dataclass(frozen=True)
class LoadRequest:
    """One file, and the object to load it into."""

    obj: Any
    path: Path
    custom_hook: Hook | None = None
    options: LoadOptions = DEFAULT_OPTIONS


def load_all(coordinator: Coordinator, make_requests: Callable[[], Mapping[str, LoadRequest]], *, verify: bool) -> None:
    """Check all files, write all objects, and with `verify` compare the objects between ranks; collective.

    Parameters
    ----------
    make_requests
        Returns what this rank loads, by the name of the loadable. An exception that it raises fails the operation on
        every rank.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    requests: dict[str, LoadRequest] = {}
    commits: list[Callable[[], None]] = []

    def check() -> dict[str, tuple[str, ...]]:
        requests.update(make_requests())
        for name, request in requests.items():
            check_loadable(name, request.obj, request.custom_hook)  # cheap: before the first file is opened
        topology = read_hints()
        files = [file for request in requests.values() for file in list_weight_files(request.path)]
        read_ahead(files, topology.local_rank, topology.local_world_size or 1, coordinator.check)
        for name, request in requests.items():
            coordinator.check()
            commits.append(prepare_object(name, request.obj, request.path, request.custom_hook, request.options))
        return {name: request.options.allow_globals for name, request in requests.items()}

    def write() -> None:
        for commit in commits:
            coordinator.check()
            commit()

    coordinator.run_phase("load", check, lambda by_rank: _check_allow_globals(by_rank, coordinator))
    coordinator.run_phase("load", write, lambda _: None)
    if verify:
        _compare_digests(coordinator, requests)


def _check_allow_globals(by_rank: Mapping[int, Mapping[str, tuple[str, ...]]], coordinator: Coordinator) -> None:
    """Raise an error if `allow_globals` of one loadable differs between ranks."""
    first_rank: dict[str, int] = {}
    for rank, by_name in by_rank.items():
        for name, allow_globals in by_name.items():
            other = first_rank.setdefault(name, rank)
            if set(by_rank[other][name]) != set(allow_globals):
                raise PlanMismatch(
                    f"allow_globals of {name!r} is {sorted(by_rank[other][name])} on rank "
                    f"{coordinator.job_ranks[other]} and {sorted(allow_globals)} on rank "
                    f"{coordinator.job_ranks[rank]}; set the same names on every rank",
                    subject=name,
                )


def _compare_digests(coordinator: Coordinator, requests: Mapping[str, LoadRequest]) -> None:
    digests: dict[str, Digests] = {}

    def compute() -> dict[str, int]:
        digests.update(
            (name, tensor_digests(request.obj))
            for name, request in requests.items()
            if not request.options.rank_specific
        )
        return {name: combine_digests(by_tensor) for name, by_tensor in digests.items()}

    def explain(by_rank: Mapping[int, Mapping[str, Digests]]) -> None:
        name = next(name for by_name in by_rank.values() for name in by_name)
        digests_by_rank = {rank: by_name[name] for rank, by_name in by_rank.items() if name in by_name}
        raise difference_error(name, digests_by_rank, coordinator.job_ranks)

    names = coordinator.run_phase("verify", compute, find_differing)
    if names:
        # Ranks send the digest of each tensor only now, and only for one loadable: 512 ranks send megabytes each time.
        coordinator.run_phase("verify", lambda: {name: digests[name] for name in names[:1] if name in digests}, explain)
