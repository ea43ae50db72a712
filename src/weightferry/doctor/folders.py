"""Finds which nodes share a folder, and whether a lock of one node holds on the other nodes."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from weightferry.cluster.coordinator import Coordinator
from weightferry.doctor.disk import LOCAL_TYPES, errno_name, error_text, filesystem_of
from weightferry.doctor.findings import SharedFolder
from weightferry.doctor.request import CheckRequest, ScratchPaths

# Seconds to wait for the files of other nodes. An NFS client may show an old listing for 30 s (acdirmin in nfs(5)).
# On a disk of the node itself, a file of another node is visible at once or never.
_VISIBILITY_TIMEOUT = 35.0
_VISIBILITY_TIMEOUT_LOCAL = 2.0
_POLL_INTERVAL = 0.05

# By rank and folder: the type of the file system, and the problem ("" for none).
_Written = Mapping[int, Mapping[str, tuple[str, str]]]
# By rank, folder and other rank: seconds until the marker of the other rank was visible.
_Visible = Mapping[int, Mapping[str, Mapping[int, float]]]


@contextlib.contextmanager
def cleaned_up(request: CheckRequest) -> Iterator[None]:
    """At the end, remove all files of this run, and the cache folder if this run created it."""
    missing = [path for path in (request.cache_dir, *request.cache_dir.parents) if not path.exists()]
    # scancel sends SIGTERM some seconds before SIGKILL; submitit ignores it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        yield
    finally:
        remove_scratch(request)
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def remove_scratch(request: CheckRequest) -> None:
    """Remove all files of this run; nodes that share a folder may do so at the same time."""
    for folder in request.folders:
        shutil.rmtree(ScratchPaths(Path(folder), request.run).root, ignore_errors=True)


def compare_folders(coordinator: Coordinator, request: CheckRequest, hosts: Mapping[int, str]) -> list[SharedFolder]:
    """Write a marker file into every folder on every node, and find which nodes see each other's markers."""
    written: _Written = coordinator.run_phase("folders", lambda: _write_markers(request, coordinator.rank), dict)
    visible: _Visible = coordinator.run_phase("folders", lambda: _wait_for_markers(request, coordinator, written), dict)
    groups = {
        folder: group_by_visibility({rank: visible[rank].get(folder, {}) for rank in visible})
        for folder in request.folders
    }
    locks = compare_locks(coordinator, request, groups)
    return [
        {
            "folder": folder,
            "roles": roles,
            "filesystems": {hosts[rank]: report[folder][0] for rank, report in written.items()},
            "problems": {hosts[rank]: report[folder][1] for rank, report in written.items() if report[folder][1]},
            "groups": groups[folder],
            "shared": coordinator.world_size > 1 and groups[folder] == [list(range(coordinator.world_size))],
            "visible_s": _slowest({rank: seconds.get(folder, {}) for rank, seconds in visible.items()}),
            "locks": locks[folder],
        }
        for folder, roles in request.folders.items()
    ]


def _write_markers(request: CheckRequest, rank: int) -> dict[str, tuple[str, str]]:
    """Write a marker into every folder; return the type of file system and the problem, by folder."""
    return {
        folder: (filesystem_of(Path(folder)), _write_marker(ScratchPaths(Path(folder), request.run), rank))
        for folder in request.folders
    }


def _write_marker(paths: ScratchPaths, rank: int) -> str:
    try:
        # Only a missing cache folder is created, and that has happened already.
        paths.folder.stat()
        paths.markers.mkdir(parents=True, exist_ok=True)
        (paths.markers / str(rank)).write_text(paths.run)
    except OSError as error:
        return error_text(error)
    return ""


def _wait_for_markers(
    request: CheckRequest, coordinator: Coordinator, written: _Written
) -> dict[str, dict[int, float]]:
    """List the folders until all markers are visible, or until the timeout; return seconds by folder and rank."""
    began = time.monotonic()
    visible: dict[str, dict[int, float]] = {
        folder: {} for folder, (_, problem) in written[coordinator.rank].items() if not problem
    }
    expected = {folder: {rank for rank in written if not written[rank][folder][1]} for folder in visible}
    while True:
        now = time.monotonic() - began
        for folder, seconds in visible.items():
            for rank in _list_markers(ScratchPaths(Path(folder), request.run)):
                seconds.setdefault(rank, round(now, 3))
        incomplete = {folder for folder in visible if expected[folder] - set(visible[folder])}
        if now > max((_timeout(written, folder) for folder in incomplete), default=0.0):
            return visible
        coordinator.check()
        time.sleep(_POLL_INTERVAL)


def _timeout(written: _Written, folder: str) -> float:
    local = all(report[folder][0] in LOCAL_TYPES for report in written.values())
    return _VISIBILITY_TIMEOUT_LOCAL if local else _VISIBILITY_TIMEOUT


def _list_markers(paths: ScratchPaths) -> list[int]:
    try:
        return [int(file.name) for file in paths.markers.iterdir() if file.name.isdigit()]
    except OSError:
        return []


def group_by_visibility(visible: Mapping[int, Collection[int]]) -> list[list[int]]:
    """Group the ranks that see each other's files; a rank that does not see its own file is in no group."""
    groups: list[list[int]] = []
    for rank in sorted(visible):
        if rank not in visible[rank]:
            continue
        for group in groups:
            if all(rank in visible[member] and member in visible[rank] for member in group):
                group.append(rank)
                break
        else:
            groups.append([rank])
    return groups


def _slowest(visible: Mapping[int, Mapping[int, float]]) -> float | None:
    return max(
        (seconds for rank, row in visible.items() for other, seconds in row.items() if other != rank), default=None
    )


def compare_locks(
    coordinator: Coordinator, request: CheckRequest, groups: Mapping[str, list[list[int]]]
) -> dict[str, str | None]:
    """Hold a lock on one rank of each group while the other ranks try it; return the worst result by folder."""
    with contextlib.ExitStack() as locks:
        coordinator.run_phase("locks", lambda: _hold_locks(coordinator.rank, request, groups, locks), lambda _: None)
        tried: Mapping[int, Mapping[str, str]] = coordinator.run_phase(
            "locks", lambda: _try_locks(coordinator.rank, request, groups), dict
        )
    return {folder: _worst([results[folder] for results in tried.values() if folder in results]) for folder in groups}


def _hold_locks(
    rank: int, request: CheckRequest, groups: Mapping[str, list[list[int]]], locks: contextlib.ExitStack
) -> None:
    for folder, folder_groups in groups.items():
        if any(len(group) > 1 and group[0] == rank for group in folder_groups):
            # An error here shows as an error, or as a lock that does not exclude, on the other ranks.
            with contextlib.suppress(OSError):
                file = locks.enter_context(ScratchPaths(Path(folder), request.run).lock(rank).open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _try_locks(rank: int, request: CheckRequest, groups: Mapping[str, list[list[int]]]) -> dict[str, str]:
    return {
        folder: _try_lock(ScratchPaths(Path(folder), request.run).lock(group[0]))
        for folder, folder_groups in groups.items()
        for group in folder_groups
        if rank in group[1:]
    }


def _try_lock(path: Path) -> str:
    try:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "exclude"
    except OSError as error:
        return errno_name(error)
    return "do not exclude"


def _worst(results: Collection[str]) -> str | None:
    return next((result for result in results if result != "exclude"), "exclude" if results else None)
