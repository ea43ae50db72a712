"""Load everything on every rank: all is checked everywhere before anything is written anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightferry.cluster.coordinator import Coordinator
from weightferry.cluster.topology import read_topology
from weightferry.errors import PlanMismatch
from weightferry.loading.digest import Digests, different, explain_difference, tensor_digests, total
from weightferry.loading.objects import check_loadable, prepare_object
from weightferry.loading.options import DEFAULT, LoadOptions
from weightferry.loading.read_ahead import read_ahead
from weightferry.loading.registry import Hook
from weightferry.loading.weight_files import files_behind


@dataclass(frozen=True)
class LoadRequest:
    """One file and the object that it is loaded into."""

    obj: Any
    path: Path
    custom_hook: Hook | None = None
    options: LoadOptions = DEFAULT


def load_all(coordinator: Coordinator, wanted: Callable[[], Mapping[str, LoadRequest]], *, verify: bool) -> None:
    """Check, write, and compare what ranks then hold; every rank calls it.

    Parameters
    ----------
    wanted
        Makes what this rank loads, by name; what it raises fails the operation on every rank.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    loads: dict[str, LoadRequest] = {}
    commits: list[Callable[[], None]] = []

    def check() -> dict[str, tuple[str, ...]]:
        loads.update(wanted())
        for name, load in loads.items():
            check_loadable(name, load.obj, load.custom_hook)  # costs nothing: before the first file is opened
        place = read_topology()
        files = [file for load in loads.values() for file in files_behind(load.path)]
        read_ahead(files, place.local_rank, place.local_world_size or 1, coordinator.check)
        for name, load in loads.items():
            coordinator.check()
            commits.append(prepare_object(name, load.obj, load.path, load.custom_hook, load.options))
        return {name: load.options.allow_globals for name, load in loads.items()}

    def write() -> None:
        for commit in commits:
            coordinator.check()
            commit()

    coordinator.round("load", check, lambda said: _all_allow_the_same(said, coordinator))
    coordinator.round("load", write, lambda _: None)
    if verify:
        _compare(coordinator, loads)


def _all_allow_the_same(said: Mapping[int, Mapping[str, tuple[str, ...]]], coordinator: Coordinator) -> None:
    """Raise where ranks allow the pickle of one loadable different things."""
    first: dict[str, int] = {}
    for rank, names in said.items():
        for name, allowed in names.items():
            other = first.setdefault(name, rank)
            if set(said[other][name]) != set(allowed):
                raise PlanMismatch(
                    f"allow_globals of {name!r} is {sorted(said[other][name])} on rank {coordinator.names[other]} and "
                    f"{sorted(allowed)} on rank {coordinator.names[rank]}",
                    subject=name,
                )


def _compare(coordinator: Coordinator, loads: Mapping[str, LoadRequest]) -> None:
    digests: dict[str, Digests] = {}

    def digest() -> dict[str, int]:
        digests.update(
            (name, tensor_digests(load.obj)) for name, load in loads.items() if not load.options.rank_specific
        )
        return {name: total(said) for name, said in digests.items()}

    def explain(said: Mapping[int, Mapping[str, Digests]]) -> None:
        name = next(name for digests in said.values() for name in digests)
        raise explain_difference(
            name, {rank: told[name] for rank, told in said.items() if name in told}, coordinator.names
        )

    names = coordinator.round("verify", digest, different)
    if names:
        # Names of tensors, of one loadable: only now, since 512 ranks would send megabytes each time.
        coordinator.round("verify", lambda: {name: digests[name] for name in names[:1] if name in digests}, explain)
