"""The findings for people: one table of nodes, one of folders, and the conclusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slurm._qualify.values import Conclusion, Findings, Folder, Node, Staged
from weightferry.report.text import size

_NONE = "-"


def shown(findings: Findings) -> str:
    """Write all that was measured."""
    parts = [_aligned(_nodes(findings)), _aligned(_folders(findings)), "\n".join(_lines(findings))]
    return "\n\n".join(part for part in parts if part)


def concluded(verdict: Conclusion) -> str:
    """Write the conclusion."""
    lines = [f"note: {note}" for note in verdict["notes"]]
    lines += [f"wrong: {wrong}" for wrong in verdict["wrong"]]
    lines.append("verdict: fit" if verdict["fit"] else "verdict: not fit")
    lines.append(f"recommended cache_dir: {verdict['cache_dir'] or 'none of the folders that were looked at'}")
    return "\n".join(lines)


def counted(nodes: int) -> str:
    """Write a number of nodes."""
    return f"{nodes} node{'s' * (nodes != 1)}"


def _nodes(findings: Findings) -> Iterator[Sequence[str]]:
    yield (
        *("node", "kernel", "interface", "cache on", "free", "fallocate", "flock", "write", "read"),
        *("from peer", "staged from origin", "sha256"),
    )
    peers = {peer["receiver"]: peer["mb_s"] for peer in findings["peers"]}
    for node in findings["nodes"]:
        yield (*_alone(node), _rate(peers.get(node["rank"])), *_staged(findings["stage"], node["rank"]))


def _alone(node: Node) -> tuple[str, ...]:
    cache = node["cache"]
    return (
        f"{node['rank']} ({node['host']})",
        node["boot_id"],
        node["interface"] or _NONE,
        cache["filesystem"],
        _NONE if cache["free_bytes"] is None else size(cache["free_bytes"]),
        cache["fallocate"] or _NONE,
        cache["flock"] or _NONE,
        _rate(cache["write_mb_s"]),
        _rate(cache["read_mb_s"]),
    )


def _staged(stage: Staged | None, rank: int) -> tuple[str, str]:
    if stage is None or not stage["nodes_sha256"]:
        return _NONE, _NONE
    right = stage["nodes_sha256"][rank] == stage["sha256"]
    return size(stage["nodes_origin_bytes"][rank]), "right" if right else "WRONG"


def _rate(mb_s: float | None) -> str:
    return _NONE if mb_s is None else f"{mb_s:.0f} MB/s"


def _folders(findings: Findings) -> Iterator[Sequence[str]]:
    yield "folder", "as", "on", "shared by", "seen after", "locks"
    for folder in findings["folders"]:
        seen = folder["visible_s"]
        yield (
            folder["folder"],
            ", ".join(folder["roles"]),
            ", ".join(sorted(set(folder["filesystems"].values()))),
            _sharing(folder, findings["nodes"]),
            _NONE if seen is None else f"{seen:.2f} s",
            folder["locks"] or _NONE,
        )


def _sharing(folder: Folder, nodes: Sequence[Node]) -> str:
    if len(nodes) == 1:
        return _NONE
    if folder["shared"]:
        return "all nodes"
    together = [group for group in folder["groups"] if len(group) > 1]
    return " | ".join("+".join(nodes[rank]["host"] for rank in group) for group in together) or "nobody"


def _lines(findings: Findings) -> Iterator[str]:
    origin, stage = findings["origin"], findings["stage"]
    if origin is not None and origin["mb_s"] is not None:
        yield f"origin: {_rate(origin['mb_s'])} on one connection ({size(origin['bytes'])} of {origin['source']})"
    if stage is not None and stage["seconds"] is not None:
        total = size(sum(stage["nodes_origin_bytes"]))
        yield (
            f"stage: {size(stage['bytes'])} onto {counted(len(findings['nodes']))} in {stage['seconds']:.1f} s, "
            f"{total} read from the origin"
        )


def _aligned(rows: Iterator[Sequence[str]]) -> str:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
