"""``weightferry cache verify``: compares cached files with their checksums, and repairs them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightferry.cli.arguments import cache_dir_option, json_option
from weightferry.cli.cached_sources import find_source_or_none, open_layout, unknown_source
from weightferry.cli.errors import print_error
from weightferry.errors import CollectError
from weightferry.report.report_text import format_size

if TYPE_CHECKING:
    from weightferry.cache.verify import VerifyResult


@click.command()
@click.argument("source", default="")
@click.option(
    "--repair", is_flag=True, help="Download damaged files again: from another node of the job, else from the origin."
)
@cache_dir_option
@json_option
def verify(source: str, repair: bool, cache_dir: Path | None, as_json: bool) -> None:
    """Compare the files of SOURCE, or all files, with their checksums.

    Run it alone, or once on each node under srun; rank 0 prints one table for all nodes.

    Exit code: 0 if no file is damaged or all are repaired, 1 otherwise.
    """
    from weightferry.cache.verify import verify as verify_cache
    from weightferry.cluster.connect import launcher_coordinator
    from weightferry.cluster.launchers import read_topology
    from weightferry.phases.agree import agree
    from weightferry.phases.job_request import RankRequest
    from weightferry.report.progress import show_progress
    from weightferry.settings import Settings

    settings = Settings.from_environ(cache_dir=cache_dir)
    layout, topology = open_layout(cache_dir), read_topology()

    def verify_node() -> VerifyResult | None:
        cached = find_source_or_none(layout, source) if source else None
        if source and cached is None:
            return None
        return verify_cache(layout, coordinator.count_bytes, cached.name if cached else "", coordinator.expect_bytes)

    def require_source(results: Mapping[int, VerifyResult | None]) -> dict[int, VerifyResult]:
        found = {leader: result for leader, result in results.items() if result is not None}
        if not found:
            raise unknown_source(layout, source)
        return found

    try:
        with launcher_coordinator(settings, topology, "verify") as coordinator:
            _, job = agree(coordinator, lambda: RankRequest({}), settings)
            hosts = {domain.leader: domain.host for domain in job.domains}
            with (
                show_progress(coordinator.job_progress, hosts, "read")
                if topology.rank == 0
                else contextlib.nullcontext()
            ):
                results = coordinator.run_phase("verify", verify_node, require_source, job.leaders)
            if coordinator.rank == 0 and not as_json:
                click.echo(_text(results, hosts))
            damaged = tuple(dict.fromkeys(file.source for result in results.values() for file in result.damaged))
            if damaged and repair:
                from weightferry.repair_cache import repair as repair_files

                damaged = repair_files(coordinator, layout, settings, results)
                if coordinator.rank == 0 and not as_json:
                    click.echo("repaired" if not damaged else f"not repaired: {', '.join(damaged)}; stage them again")
            if coordinator.rank == 0 and as_json:
                click.echo(_json(results, hosts, damaged if repair else None))
    except CollectError as error:
        if topology.rank == 0:
            print_error(error)
        sys.exit(1)
    sys.exit(1 if damaged else 0)


def _json(results: dict[int, VerifyResult], hosts: dict[int, str], not_repaired: tuple[str, ...] | None) -> str:
    """Write the results as JSON; `not_repaired` is None if no repair was tried."""
    return json.dumps(
        [
            {
                "host": hosts[leader],
                "files": result.files,
                "bytes": result.size,
                "without_checksum": result.without_checksum,
                "damaged": [
                    {
                        "source": file.source,
                        "paths": file.paths,
                        "blob": str(file.blob),
                        "why": file.reason,
                        "repaired": not_repaired is not None and file.source not in not_repaired,
                    }
                    for file in result.damaged
                ],
            }
            for leader, result in results.items()
        ],
        indent=2,
    )


def _text(results: dict[int, VerifyResult], hosts: dict[int, str]) -> str:
    lines = []
    for leader, result in results.items():
        unknown = f", {result.without_checksum} without a checksum" if result.without_checksum else ""
        size = format_size(result.size)
        lines.append(f"{hosts[leader]}: {result.files} files, {size}, {len(result.damaged)} damaged{unknown}")
        lines += [
            f"  {file.source}: {', '.join(file.paths) or file.blob.name}: {file.reason}" for file in result.damaged
        ]
    return "\n".join(lines)
