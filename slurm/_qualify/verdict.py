"""From what was measured to a conclusion: a pure function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

from slurm._qualify.disk import IN_MEMORY, LOCAL_TYPES
from slurm._qualify.values import Conclusion, Findings, Folder

_SLOW = 3.0  # a node this many times slower than the median holds up the others


def conclude(findings: Findings) -> Conclusion:
    """Conclude whether weightferry can work there, what is wrong, and where the cache should be."""
    wrong = [*_wrong_caches(findings), *_wrong_network(findings), *_wrong_stage(findings)]
    notes = [
        *_with_hosts(_cache_notes(findings)),
        *_folder_notes(findings),
        *_shared_cache(findings),
        *_slow_nodes(findings),
    ]
    return {"fit": not wrong, "wrong": wrong, "notes": notes, "cache_dir": _recommended(findings)}


def failed(text: str) -> Conclusion:
    """Conclude from a job that ended without findings."""
    return {"fit": False, "wrong": [text], "notes": [], "cache_dir": None}


def _wrong_caches(findings: Findings) -> Iterator[str]:
    caches = [(node["host"], node["cache"]) for node in findings["nodes"]]
    return _with_hosts((host, f"the cache folder {c['folder']}: {c['problem']}") for host, c in caches if c["problem"])


def _with_hosts(told: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Say once what several hosts have in common."""
    hosts: dict[str, list[str]] = {}
    for host, text in told:
        hosts.setdefault(text, []).append(host)
    for text, names in hosts.items():
        yield f"{', '.join(names)}: {text}"


def _wrong_network(findings: Findings) -> Iterator[str]:
    origin = findings["origin"]
    if origin is not None and origin["error"]:
        yield f"{findings['nodes'][0]['host']}: the origin {origin['source']}: {origin['error']}"


def _wrong_stage(findings: Findings) -> Iterator[str]:
    stage = findings["stage"]
    if stage is None:
        return
    if stage["error"]:
        yield f"the stage failed: {stage['error']}"
    for node, digest in zip(findings["nodes"], stage["nodes_sha256"], strict=False):
        if digest != stage["sha256"]:
            yield f"{node['host']}: other bytes than staged: SHA-256 {digest}, expected {stage['sha256']}"


def _cache_notes(findings: Findings) -> Iterator[tuple[str, str]]:
    for node in findings["nodes"]:
        host, cache = node["host"], node["cache"]
        if cache["filesystem"] in IN_MEMORY:
            yield host, f"the cache folder is in memory ({cache['filesystem']}); files there count against the job's"
        if cache["fallocate"] not in ("ok", None):
            yield host, f"posix_fallocate does not work in the cache folder ({cache['fallocate']}), a stage needs it"
        if cache["flock"] not in ("ok", None):
            yield host, f"no locks in the cache folder ({cache['flock']}): jobs may read the same file twice"


def _folder_notes(findings: Findings) -> Iterator[str]:
    several = len(findings["nodes"]) > 1
    for folder in findings["folders"]:
        for host, problem in folder["problems"].items():
            if folder["folder"] != findings["cache_dir"]:
                yield f"{host}: nothing can be written to {folder['folder']} ({', '.join(folder['roles'])}): {problem}"
        if several and "shared" in folder["roles"] and not folder["shared"]:
            yield f"{folder['folder']} is not shared between all nodes"
        if _partly_shared(folder):
            yield f"{folder['folder']} is shared between some of the nodes only"
        if folder["locks"] not in ("exclude", None):
            yield f"{folder['folder']}: locks of one node do not hold for another ({folder['locks']})"


def _shared_cache(findings: Findings) -> Iterator[str]:
    given = _given(findings)
    everywhere = _on_every_node(findings)
    if given["shared"] and set(given["filesystems"].values()) - LOCAL_TYPES and everywhere:
        yield f"the cache folder is read over the network; every node also has a disk at {', '.join(everywhere)}"


def _given(findings: Findings) -> Folder:
    return next(folder for folder in findings["folders"] if folder["folder"] == findings["cache_dir"])


def _partly_shared(folder: Folder) -> bool:
    return len(folder["groups"]) > 1 and any(len(group) > 1 for group in folder["groups"])


def _slow_nodes(findings: Findings) -> Iterator[str]:
    for what, rates in _rates(findings).items():
        usual = median(rates.values()) if rates else 0.0
        for rank, rate in rates.items():
            if rate * _SLOW < usual:
                yield f"{findings['nodes'][rank]['host']}: {what} {rate:.0f} MB/s, the median is {usual:.0f} MB/s"


def _rates(findings: Findings) -> dict[str, dict[int, float]]:
    caches = {node["rank"]: node["cache"] for node in findings["nodes"]}
    return {
        "writes": {rank: cache["write_mb_s"] for rank, cache in caches.items() if cache["write_mb_s"] is not None},
        "reads": {rank: cache["read_mb_s"] for rank, cache in caches.items() if cache["read_mb_s"] is not None},
        "receives from its neighbour": {peer["receiver"]: peer["mb_s"] for peer in findings["peers"]},
    }


def _recommended(findings: Findings) -> str | None:
    """Take the given folder if it will do, else a disk that every node has to itself."""
    usable = not any(node["cache"]["problem"] for node in findings["nodes"])
    if usable and _given(findings)["locks"] in ("exclude", None):
        return findings["cache_dir"]
    everywhere = _on_every_node(findings)
    if everywhere:
        return str(Path(max(everywhere, key=lambda folder: everywhere[folder])) / "weightferry")
    return findings["cache_dir"] if usable else None


def _on_every_node(findings: Findings) -> dict[str, int]:
    """By usual place that all nodes have, the least free space."""
    free: dict[str, list[int]] = {}
    for node in findings["nodes"]:
        for candidate in node["candidates"]:
            free.setdefault(candidate["folder"], []).append(candidate["free_bytes"])
    return {folder: min(bytes_) for folder, bytes_ in free.items() if len(bytes_) == len(findings["nodes"])}
