"""The run report as text."""

from __future__ import annotations

from pathlib import Path

from weightferry.report.run_report import RunReport

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def format_size(count: float) -> str:
    """Return bytes as text with a decimal unit (powers of 1000) and three digits, such as ``1.25 GB``."""
    for unit in _UNITS:
        if count < 999.5 or unit == _UNITS[-1]:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def summary(report: RunReport, path: Path) -> str:
    """Return a summary: the staged files, the bytes by where they came from, and `path`, the path on this rank."""
    total = report.total
    ranks = f"{report.ranks} rank{'s' * (report.ranks != 1)} on {report.nodes} node{'s' * (report.nodes != 1)}"
    files = f"{total['files']:.0f} file{'s' * (total['files'] != 1)}"
    return (
        f"staged {files}, {format_size(total['bytes'])}, for {ranks} in {total['seconds']:.1f} s: "
        f"{format_size(total['origin_bytes'])} from the origin, {format_size(total['peer_bytes'])} from peers, "
        f"{format_size(total['cached_bytes'])} already on disk"
        + (f", {format_size(total['copied_bytes'])} from your Hugging Face cache" if total.get("copied_bytes") else "")
        + f"\n{path}"
    )


def table(report: RunReport) -> str:
    """Return a table with one line for each storage domain: leader, ranks, bytes by where they came from, seconds."""
    phases = list(dict.fromkeys(phase for domain in report.domains for phase in domain.seconds))
    rows = [["node", "leader", "ranks", "from origin", "from peers", "already on disk", *phases]]
    for number, domain in enumerate(report.domains):
        rows.append(
            [
                f"{number} ({domain.host})",
                f"rank {domain.leader_rank}",
                ",".join(map(str, domain.ranks)),
                format_size(domain.origin_bytes),
                format_size(domain.peer_bytes_in),
                format_size(domain.cached_bytes),
                *(f"{domain.seconds.get(phase, 0.0):.2f} s" for phase in phases),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
