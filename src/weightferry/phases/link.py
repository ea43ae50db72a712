"""Phase 7, link: one rank per folder makes the links, then every rank opens what it was given."""

from __future__ import annotations

import filecmp
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from weightferry.cache.atomic import replace_symlink, replace_with_copy
from weightferry.cache.layout import CacheLayout
from weightferry.cache.usage import hold_sources
from weightferry.cache.verified_notes import is_on_local_disk
from weightferry.cluster.coordinator import Coordinator
from weightferry.cluster.visibility import wait_until_visible
from weightferry.errors import BadRequest, CollectError, IntegrityError, SourceNotFound, error_context
from weightferry.manifest import File, Manifest
from weightferry.origins.pin_sources import RequestedFiles, Resolution, manifest_entries
from weightferry.phases.domain_state import DomainState
from weightferry.phases.job_request import JobRequest, RankRequest
from weightferry.report.build_report import DomainResult
from weightferry.report.run_report import DomainReport, RunReport

_FIRST_BLOCK = 1 << 16
"""Bytes at the start of a file that every rank reads: they show whether it sees what the leader published."""


@dataclass(frozen=True)
class LinkPlan:
    """Where one rank finds what it requested.

    Attributes
    ----------
    paths : mapping of str to Path
        By name, the path that the caller gets.
    targets : mapping of str to Path
        By name, the file or folder itself: in the cache, or where a local source is.
    links : mapping of Path to Path
        From link to target.
    files : mapping of str to RequestedFiles
        By name, the files of the manifest.
    replaces_files : bool
        Whether a link may replace another file. True for ``NAME.ckpt`` in `collect_in`; False for the files of a
        folder that the user named.
    copy : bool
        Whether real files take the place of the links.
    """

    paths: Mapping[str, Path]
    targets: Mapping[str, Path]
    links: Mapping[Path, Path]
    files: Mapping[str, RequestedFiles]
    replaces_files: bool
    copy: bool = False

    @classmethod
    def of(cls, rank_request: RankRequest, resolution: Resolution, layout: CacheLayout) -> LinkPlan:
        """Return the paths and links of one rank's request."""
        paths, targets, links, files = {}, {}, {}, {}
        link_folder, suffix = rank_request.link_folder, rank_request.link_suffix
        for name, request in rank_request.requests.items():
            files[name] = requested = resolution.found[request]
            folder = layout.snapshot(resolution.manifest.sources[requested.source])
            paths[name] = targets[name] = folder / requested.path
            if link_folder is not None and suffix is not None:
                paths[name] = link = Path(os.path.normpath(link_folder / f"{name}{suffix}"))
                links[link] = targets[name]
            elif link_folder is not None:
                # A single file is linked by its name, the files of a folder by their paths in it.
                single = requested.files == (requested.path,)
                above = requested.path.rpartition("/")[0] if single else requested.path
                paths[name] = link_folder / requested.path.rpartition("/")[2] if single else link_folder
                links |= {link_folder / os.path.relpath(file, above or "."): folder / file for file in requested.files}
        return cls(paths, targets, links, files, replaces_files=suffix is not None, copy=rank_request.copy)


@dataclass(frozen=True)
class VisibilityCheck:
    """What a rank must see of the files it was given.

    Attributes
    ----------
    first_blocks : tuple of int
        By index in `Manifest.staged()`, the CRC-32 of the first block of each file, as the leaders read it.
    timeout : float
        Seconds to wait for files that another machine made.
    check : callable
        Called while waiting; an error that it raises ends the wait.
    """

    first_blocks: tuple[int, ...] = ()
    timeout: float = 0.0
    check: Callable[[], None] = lambda: None


def link(
    coordinator: Coordinator,
    rank_request: RankRequest,
    resolution: Resolution,
    state: DomainState,
    publish: Callable[[], None],
    make_report: Callable[[Sequence[DomainResult]], RunReport],
) -> tuple[Mapping[str, Path], RunReport]:
    """Make the links, then open every file on every rank; collective.

    Parameters
    ----------
    publish
        The phase publish. The leaders call it before the links are made; both end at one barrier.
    make_report
        Returns the report from the results of all domains. Called on rank 0, when every rank has opened its files.

    Returns
    -------
    mapping of str to Path, RunReport
        By name, the paths of this rank; and the report, the same on every rank.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    began, job, layout = time.monotonic(), state.job, state.surveyor.layout
    plan = LinkPlan.of(rank_request, resolution, layout)
    timeout = state.settings.visibility_timeout if job.may_show_late else 0.0
    if job.copies:
        # A link needs only the path of its target; a copy needs the target, which another rank may publish.
        coordinator.run_phase("publish", publish, len, job.leaders, state.role)
    make = partial(_publish_and_link, coordinator, rank_request, resolution, state, publish, timeout)
    blocks = coordinator.run_phase(
        "link", make, partial(_common_blocks, coordinator, state), {*job.leaders, *job.links}, state.role
    )
    check = VisibilityCheck(blocks, timeout, coordinator.check)
    read_back = partial(_read_back, coordinator, plan, resolution, state, check, began)
    report = coordinator.run_phase("link", read_back, partial(_report_domains, job, make_report))
    return plan.paths, report


def _report_domains(
    job: JobRequest,
    make_report: Callable[[Sequence[DomainResult]], RunReport],
    results: Mapping[int, DomainResult | None],
) -> RunReport:
    of_leaders = (results[domain.leader] for domain in job.domains)
    return make_report([result for result in of_leaders if result is not None])


def _publish_and_link(
    coordinator: Coordinator,
    rank_request: RankRequest,
    resolution: Resolution,
    state: DomainState,
    publish: Callable[[], None],
    timeout: float,
) -> tuple[int, ...] | None:
    job, layout = state.job, state.surveyor.layout
    is_leader = coordinator.rank in job.leaders
    if is_leader and not job.copies:
        publish()
    if coordinator.rank in job.links:
        everything = replace(rank_request, requests=job.links[coordinator.rank])
        with coordinator.waiting("compares files in the folder for links, and copies those that differ"):
            make_links(LinkPlan.of(everything, resolution, layout), coordinator.check, timeout)
    return read_first_blocks(layout, resolution.manifest) if is_leader else None


def _common_blocks(
    coordinator: Coordinator, state: DomainState, blocks: Mapping[int, tuple[int, ...] | None]
) -> tuple[int, ...]:
    by_job_rank = {coordinator.job_ranks[rank]: read for rank, read in blocks.items()}
    return compare_first_blocks(state.manifest, by_job_rank)


def _read_back(
    coordinator: Coordinator,
    plan: LinkPlan,
    resolution: Resolution,
    state: DomainState,
    check: VisibilityCheck,
    began: float,
) -> DomainResult | None:
    is_leader, layout = coordinator.rank in state.job.leaders, state.surveyor.layout
    # A leader has held the sources since the survey. On file systems that other machines see, the leader's lock is
    # enough: a lock for each of thousands of ranks would be too many.
    if not is_leader and is_on_local_disk(layout):
        tiers = [tier for tier in map(CacheLayout, state.settings.cache_tiers) if is_on_local_disk(tier)]
        hold_sources(layout, tiers, state.manifest, coordinator.check, state.settings.stall_timeout)
    check_readable(plan, resolution, check)
    if not is_leader:
        return None
    return _domain_result(coordinator, state, {**coordinator.seconds, "link": time.monotonic() - began})


def _domain_result(coordinator: Coordinator, state: DomainState, seconds: Mapping[str, float]) -> DomainResult:
    """Count what the domain got and had, once every file of it was opened."""
    layout, manifest, transferred = state.surveyor.layout, state.manifest, state.transferred
    sizes = tuple(
        (layout.snapshot(pinned) / file.path).stat().st_size for pinned in manifest.sources for file in pinned.files
    )
    staged = [
        number for number, pinned in enumerate(p for p in manifest.sources for _ in p.files) if not pinned.in_place
    ]
    received = {staged[index] for index in transferred.sha256}
    known = {**state.already_there, **transferred.sha256}
    domain = state.job.domain_of(coordinator.rank)
    report = DomainReport(
        host=domain.host,
        leader_rank=domain.job_ranks[0],
        ranks=list(domain.job_ranks),
        origin_bytes=transferred.origin_bytes,
        copied_bytes=transferred.copied_bytes,
        peer_bytes_in=transferred.peer_bytes_in,
        peer_bytes_out=transferred.peer_bytes_out,
        cached_bytes=sum(size for number, size in enumerate(sizes) if number not in received),
        locks=str(state.surveyor.lock_support),
        seconds={phase: round(value, 4) for phase, value in seconds.items()},
    )
    sha256 = {index: known[first] for index, first in enumerate(manifest.first_with_content) if first in known}
    return DomainResult(report, sizes, sha256)


def make_links(plan: LinkPlan, check: Callable[[], None] = lambda: None, timeout: float = 0.0) -> None:
    """Make the links or copies of one folder, each atomically and only where it differs.

    Parameters
    ----------
    check
        Called between two pieces of a copy; an error that it raises ends the copy.
    timeout
        Seconds to wait for the file to copy, if another machine made it.

    Raises
    ------
    BadRequest
        A file of the user has the name of a link, or a folder was to be copied.
    """
    for link_path, target in plan.links.items():
        with error_context(subject=str(link_path)):
            if _is_equivalent(link_path, target):
                continue
            if plan.copy:
                wait_until_visible(partial(_copy, link_path, target, check), target, timeout, check)
                continue
            if not plan.replaces_files and link_path.exists() and not link_path.is_symlink():
                raise BadRequest(
                    "another file has the name of the link, and is not replaced; move it, or choose another folder",
                    subject=str(link_path),
                )
            replace_symlink(link_path, target)


def _copy(path: Path, target: Path, check: Callable[[], None]) -> None:
    if target.is_dir():
        raise BadRequest(
            f"{target} is a folder, and local_strategy COPY copies single files only; use SYMLINK or NO_LINK",
            subject=str(path),
        )
    replace_with_copy(path, target, check)


def _is_equivalent(link_path: Path, target: Path) -> bool:
    """Return whether no link is needed: the path is the target itself, or a real file with equal content."""
    folders = link_path.parent, target.parent
    if link_path.name == target.name and all(map(Path.is_dir, folders)) and Path.samefile(*folders):
        # A local source in the folder for links itself, perhaps a link already: it would point to itself.
        return True
    if link_path.is_symlink() or not link_path.is_file() or not target.is_file():
        return False
    return link_path.samefile(target) or filecmp.cmp(link_path, target, shallow=False)


def read_first_blocks(layout: CacheLayout, manifest: Manifest) -> tuple[int, ...]:
    """Return the CRC-32 of the first block of every staged file, read on a leader for the other ranks to compare."""
    blocks = []
    for pinned, file in manifest.staged():
        path = layout.pointer(pinned, file)
        with error_context(subject=str(path)), path.open("rb") as opened:
            blocks.append(zlib.crc32(opened.read(_FIRST_BLOCK)))
    return tuple(blocks)


def compare_first_blocks(manifest: Manifest, blocks: Mapping[int, tuple[int, ...] | None]) -> tuple[int, ...]:
    """Return the blocks that all leaders read; runs on rank 0.

    Parameters
    ----------
    blocks
        By rank in the job; None for a rank that is no leader.

    Raises
    ------
    IntegrityError
        Two leaders read different bytes.
    """
    (first, expected), *others = ((rank, read) for rank, read in blocks.items() if read is not None)
    for rank, read in others:
        for (pinned, file), mine, theirs in zip(manifest.staged(), expected, read, strict=True):
            if mine != theirs:
                subject = f"{pinned.name}/{file.path}"
                raise IntegrityError(f"ranks {first} and {rank} read different bytes of this file", subject=subject)
    return expected


def check_readable(plan: LinkPlan, resolution: Resolution, check: VisibilityCheck) -> None:
    """Open every file that this rank was given, through the links, and compare sizes and first blocks.

    Raises
    ------
    CollectError
        A file does not exist for this rank, cannot be opened, or has another size or other first bytes than expected.
    """
    link_of = {target: link_path for link_path, target in plan.links.items()}
    names = ((pinned.name, file.path) for pinned, file in resolution.manifest.staged())
    blocks = dict(zip(names, check.first_blocks, strict=True))
    for name, requested in plan.files.items():
        pinned = resolution.manifest.sources[requested.source]
        for file in manifest_entries(requested, resolution.manifest):
            below = os.path.relpath(file.path, requested.path) if requested.path != file.path else ""
            target = Path(os.path.normpath(plan.targets[name] / below))  # the shards of an index lie beside it
            # One link for the whole request, or one for each file, or none.
            is_link = plan.paths[name] in plan.links and not below.startswith("..")
            path = plan.paths[name] / below if is_link else link_of.get(target, target)
            with error_context(subject=str(path)):
                _check_file(path, file, blocks.get((pinned.name, file.path)), check, in_place=pinned.in_place)


def _check_file(path: Path, file: File, block: int | None, check: VisibilityCheck, *, in_place: bool) -> None:
    def look() -> tuple[int, int]:
        with path.open("rb") as opened:
            return os.fstat(opened.fileno()).st_size, zlib.crc32(opened.read(0 if block is None else _FIRST_BLOCK))

    try:
        size, crc = wait_until_visible(look, path, check.timeout, check.check)
    except FileNotFoundError as error:
        reason = "a local source must exist on every node" if in_place else "it was removed from the cache"
        raise SourceNotFound(f"this file does not exist for this rank: {reason}", subject=str(path)) from error
    if file.size is not None and size != file.size:
        raise CollectError(f"has {size} bytes for this rank, {file.size} were expected", subject=str(path))
    if block is not None and crc != block:
        raise IntegrityError(
            "this rank reads other first bytes of this file than the leader that published it", subject=str(path)
        )
