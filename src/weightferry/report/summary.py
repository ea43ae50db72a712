"""From what each leader did to the run report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightferry.cache.layout import CacheLayout
from weightferry.manifest import Manifest
from weightferry.phases.agree import JobRequest
from weightferry.phases.delivery import DomainState
from weightferry.report.run import DomainReport, RunReport


@dataclass(frozen=True)
class DomainResult:
    """What one leader tells for the report.

    Attributes
    ----------
    sizes : tuple of int
        Bytes on disk of every file of the manifest, local ones too.
    """

    origin_bytes: int
    copied_bytes: int
    peer_bytes_in: int
    peer_bytes_out: int
    cached_bytes: int
    seconds: Mapping[str, float]
    sizes: tuple[int, ...]
    locks: str
    sha256: Mapping[int, str]

    @classmethod
    def of(
        cls, layout: CacheLayout, manifest: Manifest, delivered: DomainState, seconds: Mapping[str, float]
    ) -> DomainResult:
        """Count on the leader, after the link phase has shown that everything is there."""
        sizes = tuple(
            (layout.snapshot(pinned) / file.path).stat().st_size for pinned in manifest.sources for file in pinned.files
        )
        results = delivered.results
        staged = [not pinned.in_place for pinned in manifest.sources for _ in pinned.files]
        read = _numbered(staged, set(results.sha256))
        there = sum(size for number, size in enumerate(sizes) if number not in read)
        known = {**delivered.held, **results.sha256}
        sha256 = {index: known[first] for index, first in enumerate(manifest.first_with_content) if first in known}
        return cls(
            results.origin_bytes,
            results.copied_bytes,
            results.peer_bytes_in,
            results.peer_bytes_out,
            there,
            dict(seconds),
            sizes,
            delivered.locks,
            sha256,
        )


def _numbered(staged: list[bool], indices: set[int]) -> set[int]:
    """From places among the staged files to places among all files."""
    places = [number for number, is_staged in enumerate(staged) if is_staged]
    return {places[index] for index in indices}


def summarize(
    operation: str, job: JobRequest, manifest: Manifest, parts: Mapping[int, DomainResult | None], seconds: float
) -> RunReport:
    """Put the parts of all leaders together."""
    domains = []
    for domain in job.domains:
        part = parts[domain.leader]
        assert part is not None  # noqa: S101 -- every leader tells
        domains.append(
            DomainReport(
                host=domain.host,
                leader_rank=domain.names[0],
                ranks=list(domain.names),
                origin_bytes=part.origin_bytes,
                copied_bytes=part.copied_bytes,
                peer_bytes_in=part.peer_bytes_in,
                peer_bytes_out=part.peer_bytes_out,
                cached_bytes=part.cached_bytes,
                locks=part.locks,
                seconds={phase: round(value, 4) for phase, value in part.seconds.items()},
            )
        )
    sizes = next(part.sizes for part in parts.values() if part is not None)
    total = {
        "bytes": sum(sizes),
        "files": len(sizes),
        "origin_bytes": sum(domain.origin_bytes for domain in domains),
        "copied_bytes": sum(domain.copied_bytes for domain in domains),
        "peer_bytes": sum(domain.peer_bytes_in for domain in domains),
        "cached_bytes": sum(domain.cached_bytes for domain in domains),
        "seconds": round(seconds, 4),
    }
    return RunReport(operation, job.ranks, job.nodes, total, domains, _manifest(manifest, sizes, parts))


def _manifest(manifest: Manifest, sizes: tuple[int, ...], parts: Mapping[int, DomainResult | None]) -> dict[str, Any]:
    known = {index: digest for part in parts.values() if part for index, digest in part.sha256.items() if digest}
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
