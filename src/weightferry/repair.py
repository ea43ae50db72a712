"""Bring damaged content anew: good bytes come from a node that has them, else from the origin."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.verify import DamagedFile, VerifyResult, doubt
from weightferry.cluster.coordinator import Coordinator
from weightferry.hashing import Checksum
from weightferry.manifest import File, Manifest, Pinned
from weightferry.origins.lockfile import Lockfile
from weightferry.phases.agree import RankRequest
from weightferry.settings import Settings
from weightferry.sources import SourceRequest, parse_source
from weightferry.staging import collect

Sizes = dict[tuple[str, str], int]
"""Bytes of content, by repository and name."""


def repair(
    coordinator: Coordinator, layout: CacheLayout, settings: Settings, found: Mapping[int, VerifyResult]
) -> tuple[str, ...]:
    """Stage again what is damaged, on all nodes at once; every rank calls it.

    Where every damaged file is right on some node, no origin is asked.

    Parameters
    ----------
    found
        By leader, what was found; the same on every rank.

    Returns
    -------
    tuple of str
        Sources that are not of the Hub: the cache does not know where they came from. Their damaged content is removed.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    damaged = [one for said in found.values() for one in said.damaged]
    known = {one: _request(one) for one in damaged if one.repo_id and one.commits and one.paths}

    def look() -> Sizes:
        mine = found.get(coordinator.rank, VerifyResult()).damaged
        for one in mine:
            doubt(layout, one)
        return _right_here(layout, list(known), {one.blob.name for one in mine})

    sizes = coordinator.round("repair", look, _together, list(found))
    if known:
        requests = {
            f"{number}/{path}": request for number, one in enumerate(known.values()) for path, request in one.items()
        }
        with _pinned(coordinator, list(known), sizes) as lockfile:
            collect(lambda: RankRequest(requests), coordinator, settings, lockfile=lockfile)
    return tuple(dict.fromkeys(one.source for one in damaged if one not in known))


def _together(said: Mapping[int, Sizes]) -> Sizes:
    return {key: size for one in said.values() for key, size in one.items()}


def _root(damage: DamagedFile) -> str:
    return f"hf://{damage.repo_id}@{damage.commits[-1]}"


def _request(damage: DamagedFile) -> dict[str, SourceRequest]:
    return {path: SourceRequest.of(_root(damage), path) for path in damage.paths}


def _right_here(layout: CacheLayout, damaged: list[DamagedFile], wrong: set[str]) -> Sizes:
    sizes = {}
    for one in damaged:
        blob = layout.blobs(layout.hub / one.blob.parents[1].name) / one.blob.name
        with contextlib.suppress(OSError):
            if blob.name not in wrong:
                sizes[one.repo_id, blob.name] = blob.stat().st_size
    return sizes


@contextlib.contextmanager
def _pinned(coordinator: Coordinator, damaged: list[DamagedFile], sizes: Sizes) -> Iterator[Path | None]:
    """Write a lock file on rank 0 of what is to be brought; None where the origin has to be asked for sizes."""
    if any((one.repo_id, one.blob.name) not in sizes for one in damaged):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repair.lock"
        if coordinator.rank == 0:
            path.write_text(Lockfile.text(_manifest(damaged, sizes)))
        yield path


def _manifest(damaged: list[DamagedFile], sizes: Sizes) -> Manifest:
    """Pin what is to be brought: one entry for each source, with all its files."""
    sources: dict[str, Pinned] = {}
    for one in damaged:
        root, size = _root(one), sizes[one.repo_id, one.blob.name]
        pinned = sources.get(root) or Pinned(parse_source(SourceRequest.of(root), lambda _: False), one.commits[-1], ())
        files = tuple(File(path, size, Checksum.read(one.blob.name)) for path in one.paths)
        sources[root] = replace(pinned, files=pinned.files + files)
    return Manifest(tuple(sources.values()))
