"""stage(): the seven phases of one call, in their order; every rank runs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weightferry.cache.layout import CacheLayout
from weightferry.cluster.connect import process_group_coordinator
from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import BadRequest
from weightferry.manifest import Manifest
from weightferry.origins.access import DEFAULT_ACCESS, OriginAccess
from weightferry.phases.agree import agree, prepare_request
from weightferry.phases.domain_state import open_domain
from weightferry.phases.job_request import RankRequest
from weightferry.phases.link import link
from weightferry.phases.plan import plan
from weightferry.phases.publish import publish
from weightferry.phases.resolve import resolve
from weightferry.phases.survey import survey
from weightferry.phases.transfer import ATTEMPTS, all_complete, transfer
from weightferry.report.build_report import build_report
from weightferry.report.run_report import RunReport
from weightferry.settings import Settings
from weightferry.sources import SourceLike, SourceRequest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Collected:
    """The result of an operation on one rank.

    Attributes
    ----------
    paths : mapping of str to Path
        By name, the local path of the file or folder.
    report : RunReport
        The same on every rank.
    manifest : Manifest
        All files of all sources, pinned; the same on every rank.
    """

    paths: Mapping[str, Path]
    report: RunReport
    manifest: Manifest


def stage(
    source: SourceLike,
    *,
    revision: str | None = None,
    allow_patterns: str | Iterable[str] | None = None,
    ignore_patterns: str | Iterable[str] | None = None,
    cache_dir: str | Path | None = None,
    to: str | Path | None = None,
    group: ProcessGroup | None = None,
    lockfile: str | Path | None = None,
    coordinate: bool = True,
) -> Path:
    """Stage a whole source on every node; collective: every rank calls it.

    Parameters
    ----------
    source
        ``org/name``, ``hf://org/name@revision/path``, ``http(s)://...``, ``s3://...`` or any other URL that fsspec
        supports, ``file://...``, or a path. An existing local folder wins over a Hub repository of the same name.
    revision
        Branch, tag or commit, for the Hub.
    allow_patterns, ignore_patterns
        Shell patterns on paths below the source, as in `huggingface_hub.snapshot_download`.
    cache_dir
        The cache folder of this rank. None: from `Settings`.
    to
        A folder for links to the files, under their own paths.
    group
        The ranks that take part. None: all ranks of the default process group.
    lockfile
        A file that ``weightferry prefetch`` wrote. The call uses its commits and checksums and asks no origin for
        metadata. It fails at once if a file is in no cache and no rank can read it.
    coordinate
        False: this process alone stages the source, for code that runs on some ranks only (``if rank == 0:``,
        Lightning's ``prepare_data``). Processes that share a cache folder still download a file once.

    Returns
    -------
    Path
        The folder with the files on this rank: `to`, or the snapshot in the cache, or a local source itself. For a
        source that is one file, that file.

    Raises
    ------
    CollectError
        The same on every rank, for any failure on any rank.
    """
    settings = Settings.from_environ(cache_dir=cache_dir)
    make_request = partial(_whole_source, source, to, revision=revision, allow=allow_patterns, ignore=ignore_patterns)
    with process_group_coordinator(settings, "stage", group=group, alone=not coordinate) as coordinator:
        return collect(make_request, coordinator, settings, lockfile=absolute_path(lockfile)).paths[""]


def collect(
    make_request: Callable[[], RankRequest],
    coordinator: Coordinator,
    settings: Settings,
    *,
    lockfile: Path | None = None,
    access: OriginAccess = DEFAULT_ACCESS,
) -> Collected:
    """Run the seven phases of one operation; collective.

    Parameters
    ----------
    make_request
        Returns what this rank wants. An error that it raises fails the operation on every rank.
    coordinator
        Connects the ranks.
    settings
        Limits, and the cache folder of this rank.
    lockfile
        Read the manifest from this file, on rank 0, and ask no origin.
    access
        How this rank uses origins.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    began, layout = time.monotonic(), CacheLayout(settings.cache_dir)
    rank_request, job = agree(coordinator, partial(prepare_request, make_request, layout, settings), settings)
    resolution = resolve(coordinator, job, settings, lockfile, access)
    manifest = resolution.manifest
    reachable = resolution.origin_answered
    with open_domain(coordinator, job, manifest, settings, origin_reachable=reachable, access=access) as state:
        suspects: Collection[int] = ()
        for attempt in range(1, ATTEMPTS + 1):
            surveys = survey(coordinator, state, suspects)
            if all_complete(coordinator, state, surveys):
                break
            suspects = transfer(coordinator, state, surveys, partial(plan, manifest, surveys), attempt)
            if not suspects:
                break
    publish_files = partial(publish, layout, manifest, resolution.listings, state.tier_paths)
    make_report = partial(build_report, coordinator.operation, job.ranks, job.nodes, manifest, began)
    paths, report = link(coordinator, rank_request, resolution, state, publish_files, make_report)
    return Collected(paths, report, manifest)


def _whole_source(
    source: SourceLike,
    to: str | Path | None,
    *,
    revision: str | None,
    allow: str | Iterable[str] | None,
    ignore: str | Iterable[str] | None,
) -> RankRequest:
    request = SourceRequest.of(source, revision=revision, allow=allow, ignore=ignore)
    return RankRequest({"": request}, link_folder=absolute_path(to))


def absolute_path(path: str | Path | None) -> Path | None:
    """Return an absolute path, ``~`` expanded; None for None.

    Raises
    ------
    BadRequest
        The path is an empty text, as an unset variable of a shell gives it.
    """
    if path == "":
        raise BadRequest("the folder for links has an empty name")
    return None if path is None else Path(path).expanduser().absolute()
