"""Build the run report from the results of all storage domains."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightferry.manifest import Manifest
from weightferry.report.run_report import DomainReport, RunReport


@dataclass(frozen=True)
class DomainResult:
    """The results of one storage domain, as its leader counts them.

    Attributes
    ----------
    report : DomainReport
        The part of the run report about the domain.
    sizes : tuple of int
        Bytes on disk of every file of the manifest, local files too.
    sha256 : mapping of int to str
        SHA-256 by index in `Manifest.staged()`; missing or empty if it is unknown.
    """

    report: DomainReport
    sizes: tuple[int, ...]
    sha256: Mapping[int, str]


def build_report(
    operation: str, ranks: int, nodes: int, manifest: Manifest, began: float, results: Sequence[DomainResult]
) -> RunReport:
    """Return the report of an operation.

    Parameters
    ----------
    ranks, nodes
        Number of ranks and of nodes.
    began
        When the call began on rank 0, by `time.monotonic`.
    results
        Results of all storage domains, at least one.
    """
    domains, sizes = [result.report for result in results], results[0].sizes
    total = {
        "bytes": sum(sizes),
        "files": len(sizes),
        "origin_bytes": sum(domain.origin_bytes for domain in domains),
        "copied_bytes": sum(domain.copied_bytes for domain in domains),
        "peer_bytes": sum(domain.peer_bytes_in for domain in domains),
        "cached_bytes": sum(domain.cached_bytes for domain in domains),
        "seconds": round(time.monotonic() - began, 4),
    }
    return RunReport(operation, ranks, nodes, total, domains, _manifest(manifest, sizes, results))


def _manifest(manifest: Manifest, sizes: tuple[int, ...], results: Sequence[DomainResult]) -> dict[str, Any]:
    known = {index: digest for result in results for index, digest in result.sha256.items() if digest}
    index = 0
    files: list[dict[str, Any]] = []
    for pinned in manifest.sources:
        for file in pinned.files:
            digest = None if pinned.in_place else known.get(index)
            index += not pinned.in_place
            files.append(
                {
                    "path": file.path,
                    "size": sizes[len(files)],
                    "sha256": digest,
                    "source": pinned.name,
                    "commit": pinned.commit or None,
                }
            )
    only = manifest.sources[0] if len(manifest.sources) == 1 else None
    return {
        "source": only and str(only.source),
        "commit": (only and only.commit) or None,
        "files": files,
    }
