"""Repair damaged content of a cache: copy good content from a node that has it, or download it from the origin."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.verify import DamagedFile, VerifyResult, mark_unverified
from weightferry.cluster.coordinator import Coordinator
from weightferry.hashing import Checksum
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.origins.lockfile import Lockfile
from weightferry.phases.job_request import RankRequest
from weightferry.settings import Settings
from weightferry.sources import SourceRequest, parse_source
from weightferry.staging import collect

Sizes = dict[tuple[str, str], int]
"""Bytes of content, by repository id and content name."""


def repair(
    coordinator: Coordinator, layout: CacheLayout, settings: Settings, found: Mapping[int, VerifyResult]
) -> tuple[str, ...]:
    """Stage the damaged files of all nodes again; collective: every rank calls it.

    When for every damaged file at least one node has a good copy, no request goes to an origin.

    Parameters
    ----------
    found
        By leader, the result of `verify`; the same on every rank.

    Returns
    -------
    tuple of str
        Sources that could not be repaired: they are not from the Hub, and the cache does not record their origin. Their
        damaged content is removed.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    damaged = [file for result in found.values() for file in result.damaged]
    repairable = {file: _requests(file) for file in damaged if file.repo_id and file.commits and file.paths}

    def prepare() -> Sizes:
        own_damaged = found.get(coordinator.rank, VerifyResult()).damaged
        for file in own_damaged:
            mark_unverified(layout, file)
        return _good_copies(layout, list(repairable), {file.blob.name for file in own_damaged})

    sizes = coordinator.run_phase("repair", prepare, _merge, list(found))
    if repairable:
        requests = {
            f"{number}/{path}": request
            for number, by_path in enumerate(repairable.values())
            for path, request in by_path.items()
        }
        with _repair_lockfile(coordinator, list(repairable), sizes) as lockfile:
            collect(lambda: RankRequest(requests), coordinator, settings, lockfile=lockfile)
    return tuple(dict.fromkeys(file.source for file in damaged if file not in repairable))


def _merge(sizes_by_leader: Mapping[int, Sizes]) -> Sizes:
    return {key: size for sizes in sizes_by_leader.values() for key, size in sizes.items()}


def _source_url(damaged: DamagedFile) -> str:
    return f"hf://{damaged.repo_id}@{damaged.commits[-1]}"


def _requests(damaged: DamagedFile) -> dict[str, SourceRequest]:
    """Return a request for each file name of the damaged content, by that name."""
    return {path: SourceRequest.of(_source_url(damaged), path) for path in damaged.paths}


def _good_copies(layout: CacheLayout, damaged: Sequence[DamagedFile], own_damaged: Collection[str]) -> Sizes:
    """Return the sizes of those damaged files of which this cache has a good copy.

    Parameters
    ----------
    own_damaged
        Names of the content that is damaged in this cache.
    """
    sizes = {}
    for file in damaged:
        blob = layout.blobs(layout.hub / file.blob.parents[1].name) / file.blob.name
        with contextlib.suppress(OSError):
            if blob.name not in own_damaged:
                sizes[file.repo_id, blob.name] = blob.stat().st_size
    return sizes


@contextlib.contextmanager
def _repair_lockfile(coordinator: Coordinator, damaged: Sequence[DamagedFile], sizes: Sizes) -> Iterator[Path | None]:
    """Write a lockfile of the damaged files on rank 0, and yield its path on every rank.

    Yields None when a size is unknown, because no node has a good copy: then the origin must be asked.
    """
    if any((file.repo_id, file.blob.name) not in sizes for file in damaged):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repair.lock"
        if coordinator.rank == 0:
            path.write_text(Lockfile.text(_manifest(damaged, sizes)))
        yield path


def _manifest(damaged: Sequence[DamagedFile], sizes: Sizes) -> Manifest:
    """Return a manifest with one entry for each source and all its damaged files."""
    sources: dict[str, PinnedSource] = {}
    for file in damaged:
        url, size = _source_url(file), sizes[file.repo_id, file.blob.name]
        pinned = sources.get(url) or PinnedSource(
            parse_source(SourceRequest.of(url), lambda _: False), file.commits[-1], ()
        )
        files = tuple(File(path, size, Checksum.parse(file.blob.name)) for path in file.paths)
        sources[url] = replace(pinned, files=pinned.files + files)
    return Manifest(tuple(sources.values()))
