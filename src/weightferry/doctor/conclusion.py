"""Draws the conclusion from the findings: pure functions, no input or output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

from weightferry.doctor.disk import IN_MEMORY, LOCAL_TYPES
from weightferry.doctor.findings import Conclusion, Findings, SharedFolder

_SLOW_FACTOR = 3.0  # a node that is this many times slower than the median delays all nodes


def conclude(findings: Findings) -> Conclusion:
    """Decide whether weightferry can work there, list the problems, and recommend a cache folder."""
    problems = [*_cache_problems(findings), *_origin_problems(findings), *_stage_problems(findings)]
    notes = [
        *_group_by_text(_cache_notes(findings)),
        *_folder_notes(findings),
        *_shared_cache_notes(findings),
        *_slow_node_notes(findings),
    ]
    return {"fit": not problems, "wrong": problems, "notes": notes, "cache_dir": _recommended_cache_dir(findings)}


def conclude_failure(text: str) -> Conclusion:
    """Return the conclusion for a job that ended without findings."""
    return {"fit": False, "wrong": [text], "notes": [], "cache_dir": None}


def _cache_problems(findings: Findings) -> Iterator[str]:
    caches = [(node["host"], node["cache"]) for node in findings["nodes"]]
    return _group_by_text(
        (host, f"the cache folder {c['folder']}: {c['problem']}") for host, c in caches if c["problem"]
    )


def _group_by_text(texts_by_host: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Write a text once, with all hosts that it is about."""
    hosts: dict[str, list[str]] = {}
    for host, text in texts_by_host:
        hosts.setdefault(text, []).append(host)
    for text, names in hosts.items():
        yield f"{', '.join(names)}: {text}"


def _origin_problems(findings: Findings) -> Iterator[str]:
    origin = findings["origin"]
    if origin is not None and origin["error"]:
        yield f"{findings['nodes'][0]['host']}: cannot read the origin {origin['source']}: {origin['error']}"


def _stage_problems(findings: Findings) -> Iterator[str]:
    stage = findings["stage"]
    if stage is None:
        return
    if stage["error"]:
        yield f"the stage failed: {stage['error']}"
    for node, digest in zip(findings["nodes"], stage["nodes_sha256"], strict=False):
        if digest != stage["sha256"]:
            yield f"{node['host']}: the staged file is damaged: expected sha256 {stage['sha256']}, got {digest}"


def _cache_notes(findings: Findings) -> Iterator[tuple[str, str]]:
    for node in findings["nodes"]:
        host, cache = node["host"], node["cache"]
        if cache["filesystem"] in IN_MEMORY:
            yield (
                host,
                f"the cache folder is in memory ({cache['filesystem']}), so its files count against the job's memory",
            )
        if cache["fallocate"] not in ("ok", None):
            yield host, f"posix_fallocate fails in the cache folder ({cache['fallocate']}); a stage needs it"
        if cache["flock"] not in ("ok", None):
            yield host, f"flock fails in the cache folder ({cache['flock']}); two jobs may download the same file"


def _folder_notes(findings: Findings) -> Iterator[str]:
    several = len(findings["nodes"]) > 1
    for folder in findings["folders"]:
        for host, problem in folder["problems"].items():
            if folder["folder"] != findings["cache_dir"]:
                yield f"{host}: cannot write to {folder['folder']} ({', '.join(folder['roles'])}): {problem}"
        if several and "shared" in folder["roles"] and not folder["shared"]:
            yield f"{folder['folder']} is not shared between all nodes"
        if _is_partly_shared(folder):
            yield f"{folder['folder']} is shared between some of the nodes only"
        if folder["locks"] not in ("exclude", None):
            yield f"{folder['folder']}: a lock of one node does not hold on another node ({folder['locks']})"


def _shared_cache_notes(findings: Findings) -> Iterator[str]:
    cache = _cache_folder(findings)
    disks = _disks_on_every_node(findings)
    if cache["shared"] and set(cache["filesystems"].values()) - LOCAL_TYPES and disks:
        yield f"the cache folder is on the network; every node also has a local disk at {', '.join(disks)}"


def _cache_folder(findings: Findings) -> SharedFolder:
    return next(folder for folder in findings["folders"] if folder["folder"] == findings["cache_dir"])


def _is_partly_shared(folder: SharedFolder) -> bool:
    return len(folder["groups"]) > 1 and any(len(group) > 1 for group in folder["groups"])


def _slow_node_notes(findings: Findings) -> Iterator[str]:
    for action, rates in _rates(findings).items():
        usual = median(rates.values()) if rates else 0.0
        for rank, rate in rates.items():
            if rate * _SLOW_FACTOR < usual:
                yield f"{findings['nodes'][rank]['host']}: {action} {rate:.0f} MB/s, the median is {usual:.0f} MB/s"


def _rates(findings: Findings) -> dict[str, dict[int, float]]:
    caches = {node["rank"]: node["cache"] for node in findings["nodes"]}
    return {
        "writes": {rank: cache["write_mb_s"] for rank, cache in caches.items() if cache["write_mb_s"] is not None},
        "reads": {rank: cache["read_mb_s"] for rank, cache in caches.items() if cache["read_mb_s"] is not None},
        "receives from its neighbour": {peer["receiver"]: peer["mb_s"] for peer in findings["peers"]},
    }


def _recommended_cache_dir(findings: Findings) -> str | None:
    """Return the checked cache folder if it works, else a folder on a local disk that every node has."""
    usable = not any(node["cache"]["problem"] for node in findings["nodes"])
    if usable and _cache_folder(findings)["locks"] in ("exclude", None):
        return findings["cache_dir"]
    disks = _disks_on_every_node(findings)
    if disks:
        return str(Path(max(disks, key=lambda folder: disks[folder])) / "weightferry")
    return findings["cache_dir"] if usable else None


def _disks_on_every_node(findings: Findings) -> dict[str, int]:
    """Return the least free space, in bytes, by node-local folder that all nodes have."""
    free: dict[str, list[int]] = {}
    for node in findings["nodes"]:
        for disk in node["candidates"]:
            free.setdefault(disk["folder"], []).append(disk["free_bytes"])
    return {folder: min(sizes) for folder, sizes in free.items() if len(sizes) == len(findings["nodes"])}
