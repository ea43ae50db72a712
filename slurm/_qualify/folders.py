"""Which nodes share a folder, and whether a lock of one of them is a lock for the others."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from slurm._qualify.disk import LOCAL_TYPES, filesystem_of, name_of, told
from slurm._qualify.values import Folder, Question, Work
from weightferry.cluster.coordinator import Coordinator

# An NFS client may show an old listing for 30 s (acdirmin in nfs(5)). On a disk of the node itself a file of another
# node is seen at once or never.
_PATIENCE = 35.0
_PATIENCE_LOCAL = 2.0
_LOOK_EVERY = 0.05

_Written = Mapping[int, Mapping[str, tuple[str, str]]]
_Seen = Mapping[int, Mapping[str, Mapping[int, float]]]


@contextlib.contextmanager
def removed_at_the_end(question: Question) -> Iterator[None]:
    """Remove what this run wrote into all folders, and a cache folder that was not there before."""
    missing = [path for path in (question.cache_dir, *question.cache_dir.parents) if not path.exists()]
    # scancel sends it some seconds before it kills; submitit ignores it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        yield
    finally:
        remove(question)
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def remove(question: Question) -> None:
    """Remove what this run wrote; nodes that share a folder may do it at the same time."""
    for folder in question.folders:
        shutil.rmtree(Work(Path(folder), question.run).root, ignore_errors=True)


def compare_folders(coordinator: Coordinator, question: Question, hosts: Mapping[int, str]) -> list[Folder]:
    """Write a file in every folder from every node, and look who sees whose."""
    written: _Written = coordinator.round("folders", lambda: _write(question, coordinator.rank), dict)
    seen: _Seen = coordinator.round("folders", lambda: _watch(question, coordinator, written), dict)
    groups = {folder: seen_together({rank: seen[rank].get(folder, {}) for rank in seen}) for folder in question.folders}
    locks = compare_locks(coordinator, question, groups)
    return [
        {
            "folder": folder,
            "roles": roles,
            "filesystems": {hosts[rank]: report[folder][0] for rank, report in written.items()},
            "problems": {hosts[rank]: report[folder][1] for rank, report in written.items() if report[folder][1]},
            "groups": groups[folder],
            "shared": coordinator.world_size > 1 and groups[folder] == [list(range(coordinator.world_size))],
            "visible_s": _longest({rank: sights.get(folder, {}) for rank, sights in seen.items()}),
            "locks": locks[folder],
        }
        for folder, roles in question.folders.items()
    ]


def _write(question: Question, rank: int) -> dict[str, tuple[str, str]]:
    """Leave a nonce in every folder; by folder its file system, and what went wrong."""
    return {
        folder: (filesystem_of(Path(folder)), _leave_nonce(Work(Path(folder), question.run), rank))
        for folder in question.folders
    }


def _leave_nonce(work: Work, rank: int) -> str:
    try:
        work.folder.stat()  # only the cache folder is made when it is not there, and that has happened
        work.nonces.mkdir(parents=True, exist_ok=True)
        (work.nonces / str(rank)).write_text(work.run)
    except OSError as error:
        return told(error)
    return ""


def _watch(question: Question, coordinator: Coordinator, written: _Written) -> dict[str, dict[int, float]]:
    """List the folders until every rank's nonce was seen, or patience ends; by folder and rank, the seconds."""
    began = time.monotonic()
    sights: dict[str, dict[int, float]] = {
        folder: {} for folder, (_, problem) in written[coordinator.rank].items() if not problem
    }
    expected = {folder: {rank for rank in written if not written[rank][folder][1]} for folder in sights}
    while True:
        now = time.monotonic() - began
        for folder, seen in sights.items():
            for rank in _listed(Work(Path(folder), question.run)):
                seen.setdefault(rank, round(now, 3))
        waiting = {folder for folder in sights if expected[folder] - set(sights[folder])}
        if now > max((_patience(written, folder) for folder in waiting), default=0.0):
            return sights
        coordinator.check()
        time.sleep(_LOOK_EVERY)


def _patience(written: _Written, folder: str) -> float:
    local = all(report[folder][0] in LOCAL_TYPES for report in written.values())
    return _PATIENCE_LOCAL if local else _PATIENCE


def _listed(work: Work) -> list[int]:
    try:
        return [int(file.name) for file in work.nonces.iterdir() if file.name.isdigit()]
    except OSError:
        return []


def seen_together(sights: Mapping[int, Collection[int]]) -> list[list[int]]:
    """Group ranks that see each other's files; those that do not even see their own are in no group."""
    groups: list[list[int]] = []
    for rank in sorted(sights):
        if rank not in sights[rank]:
            continue
        for group in groups:
            if all(rank in sights[other] and other in sights[rank] for other in group):
                group.append(rank)
                break
        else:
            groups.append([rank])
    return groups


def _longest(sights: Mapping[int, Mapping[int, float]]) -> float | None:
    return max(
        (seconds for rank, seen in sights.items() for other, seconds in seen.items() if other != rank), default=None
    )


def compare_locks(
    coordinator: Coordinator, question: Question, groups: Mapping[str, list[list[int]]]
) -> dict[str, str | None]:
    """Let one rank of each group hold a lock while the others try for it; by folder, the worst that was seen."""
    with contextlib.ExitStack() as held:
        coordinator.round("locks", lambda: _hold(coordinator.rank, question, groups, held), lambda _: None)
        tried: Mapping[int, Mapping[str, str]] = coordinator.round(
            "locks", lambda: _try(coordinator.rank, question, groups), dict
        )
    return {folder: _worst([report[folder] for report in tried.values() if folder in report]) for folder in groups}


def _hold(rank: int, question: Question, groups: Mapping[str, list[list[int]]], held: contextlib.ExitStack) -> None:
    for folder, together in groups.items():
        if any(len(group) > 1 and group[0] == rank for group in together):
            # Where it cannot be had, the others will tell.
            with contextlib.suppress(OSError):
                file = held.enter_context(Work(Path(folder), question.run).lock(rank).open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _try(rank: int, question: Question, groups: Mapping[str, list[list[int]]]) -> dict[str, str]:
    return {
        folder: _try_one(Work(Path(folder), question.run).lock(group[0]))
        for folder, together in groups.items()
        for group in together
        if rank in group[1:]
    }


def _try_one(path: Path) -> str:
    try:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "exclude"
    except OSError as error:
        return name_of(error)
    return "do not exclude"


def _worst(tried: Collection[str]) -> str | None:
    return next((result for result in tried if result != "exclude"), "exclude" if tried else None)
