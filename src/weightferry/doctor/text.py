"""Writes the findings for people: a table of nodes, a table of folders, and the conclusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightferry.doctor.findings import Conclusion, Findings, Node, SharedFolder, StageResult
from weightferry.report.report_text import format_size

_NONE = "-"


def findings_text(findings: Findings) -> str:
    """Write all measurements."""
    parts = [_table(_node_rows(findings)), _table(_folder_rows(findings)), "\n".join(_rate_lines(findings))]
    return "\n\n".join(part for part in parts if part)


def conclusion_text(conclusion: Conclusion) -> str:
    """Write the conclusion."""
    lines = [f"note: {note}" for note in conclusion["notes"]]
    lines += [f"wrong: {problem}" for problem in conclusion["wrong"]]
    lines.append("verdict: fit" if conclusion["fit"] else "verdict: not fit")
    lines.append(f"recommended cache_dir: {conclusion['cache_dir'] or 'none of the checked folders'}")
    return "\n".join(lines)


def node_count(nodes: int) -> str:
    """Write a number of nodes."""
    return f"{nodes} node{'s' * (nodes != 1)}"


def _node_rows(findings: Findings) -> Iterator[Sequence[str]]:
    yield (
        *("node", "kernel", "interface", "cache on", "free", "fallocate", "flock", "write", "read"),
        *("from peer", "staged from origin", "sha256"),
    )
    peers = {peer["receiver"]: peer["mb_s"] for peer in findings["peers"]}
    for node in findings["nodes"]:
        yield (*_node_cells(node), _rate(peers.get(node["rank"])), *_stage_cells(findings["stage"], node["rank"]))


def _node_cells(node: Node) -> tuple[str, ...]:
    cache = node["cache"]
    return (
        f"{node['rank']} ({node['host']})",
        node["boot_id"],
        node["interface"] or _NONE,
        cache["filesystem"],
        _NONE if cache["free_bytes"] is None else format_size(cache["free_bytes"]),
        cache["fallocate"] or _NONE,
        cache["flock"] or _NONE,
        _rate(cache["write_mb_s"]),
        _rate(cache["read_mb_s"]),
    )


def _stage_cells(stage: StageResult | None, rank: int) -> tuple[str, str]:
    if stage is None or not stage["nodes_sha256"]:
        return _NONE, _NONE
    matches = stage["nodes_sha256"][rank] == stage["sha256"]
    return format_size(stage["nodes_origin_bytes"][rank]), "right" if matches else "WRONG"


def _rate(mb_s: float | None) -> str:
    return _NONE if mb_s is None else f"{mb_s:.0f} MB/s"


def _folder_rows(findings: Findings) -> Iterator[Sequence[str]]:
    yield "folder", "used as", "file system", "shared by", "visible after", "locks"
    for folder in findings["folders"]:
        seconds = folder["visible_s"]
        yield (
            folder["folder"],
            ", ".join(folder["roles"]),
            ", ".join(sorted(set(folder["filesystems"].values()))),
            _sharing(folder, findings["nodes"]),
            _NONE if seconds is None else f"{seconds:.2f} s",
            folder["locks"] or _NONE,
        )


def _sharing(folder: SharedFolder, nodes: Sequence[Node]) -> str:
    if len(nodes) == 1:
        return _NONE
    if folder["shared"]:
        return "all nodes"
    groups = [group for group in folder["groups"] if len(group) > 1]
    return " | ".join("+".join(nodes[rank]["host"] for rank in group) for group in groups) or "no nodes"


def _rate_lines(findings: Findings) -> Iterator[str]:
    origin, stage = findings["origin"], findings["stage"]
    if origin is not None and origin["mb_s"] is not None:
        amount = format_size(origin["bytes"])
        yield f"origin: {_rate(origin['mb_s'])} on one connection ({amount} of {origin['source']})"
    if stage is not None and stage["seconds"] is not None:
        amount, total = format_size(stage["bytes"]), format_size(sum(stage["nodes_origin_bytes"]))
        nodes = node_count(len(findings["nodes"]))
        yield f"stage: {amount} onto {nodes} in {stage['seconds']:.1f} s, {total} read from the origin"


def _table(rows: Iterator[Sequence[str]]) -> str:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
