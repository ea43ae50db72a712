"""``weightferry cache``: what an administrator does with a node's cache."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightferry.cli.arguments import NamedPath
from weightferry.errors import BadRequest, CollectError
from weightferry.report.text import format_size

if TYPE_CHECKING:
    from weightferry.cache.inventory import CachedSource
    from weightferry.cache.layout import CacheLayout
    from weightferry.cache.verify import VerifyResult

_cache_dir = click.option("--cache-dir", metavar="D", type=NamedPath(path_type=Path), help="The cache folder.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class _OneLineErrors(click.Group):
    """Says what went wrong in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command`."""
        try:
            return super().invoke(ctx)
        except (CollectError, OSError) as error:
            click.echo(f"weightferry: {type(error).__name__}: {error}", err=True)
            sys.exit(1)


@click.group(cls=_OneLineErrors)
def cache() -> None:
    """Look at the cache of this node, check it, and make room in it."""


def _layout(cache_dir: Path | None) -> CacheLayout:
    from weightferry.cache.layout import CacheLayout
    from weightferry.settings import Settings

    layout = CacheLayout(Settings.from_environ(cache_dir=cache_dir).cache_dir)
    if layout.root.exists() and not (layout.root.is_dir() and os.access(layout.root, os.R_OK | os.X_OK)):
        raise BadRequest(f"{layout.root} is no folder that this user may read")
    return layout


@cache.command()
@_cache_dir
def where(cache_dir: Path | None) -> None:
    """Print the path of the cache folder."""
    click.echo(_layout(cache_dir).root)


@cache.command("ls")
@_cache_dir
@_json
def ls(cache_dir: Path | None, as_json: bool) -> None:
    """List the sources: size, commits, when they were last staged, and whether they may be evicted."""
    from weightferry.cache.inventory import inventory
    from weightferry.cache.partial_cleanup import unfinished

    layout = _layout(cache_dir)
    rows = [_row(layout, held) for held in inventory(layout)]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    width = max((len(row["source"]) for row in rows), default=6)
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["staged"])) if row["staged"] else "-"
        state = "pinned" if row["pinned"] else "in use" if row["in_use"] else ""
        commits = ",".join(commit[:8] for commit in row["commits"][-3:])
        click.echo(f"{row['source']:{width}}  {format_size(row['bytes']):>9}  {when:16}  {state:6}  {commits}")
    click.echo(f"{len(rows)} sources, {format_size(sum(row['bytes'] for row in rows))} in {layout.root}")
    if left := sum(one.taken for one in unfinished(layout)):
        click.echo(f"{format_size(left)} on their way, or left by jobs that were killed")


def _row(layout: CacheLayout, held: CachedSource) -> dict[str, Any]:
    from weightferry.cache.inventory import is_in_use, is_pinned

    return {
        "source": held.name,
        "bytes": held.size,
        "files": len(held.sizes),
        "staged": held.staged,
        "commits": [commit.name for commit in held.commits],
        "pinned": is_pinned(layout, held),
        "in_use": is_in_use(layout, held),
        "path": str(held.repo),
    }


@cache.command()
@click.option("--to", metavar="SIZE", required=True, help="Until the cache has at most this: 500GB, 1.5TiB, 0.")
@_cache_dir
@_json
def evict(to: str, cache_dir: Path | None, as_json: bool) -> None:
    """Remove what was staged longest ago, then what killed jobs left; nothing that is pinned, or in use."""
    from weightferry.cache.evict import EvictedContent
    from weightferry.cache.evict import evict as make_room
    from weightferry.cache.inventory import total
    from weightferry.cache.lock_support import exclusion
    from weightferry.cache.partial_cleanup import remove_abandoned, unfinished
    from weightferry.settings import byte_count

    layout = _layout(cache_dir)
    try:
        wanted = byte_count(to)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--to") from None
    removed = make_room(layout, wanted)
    left = total(layout) + sum(one.taken for one in unfinished(layout))
    for gone in remove_abandoned(layout, (), exclusion(layout)) if left > wanted else ():
        removed.append(EvictedContent("what killed jobs left", "", gone))
        left -= gone
        if left <= wanted:
            break
    if as_json:
        told = [{"source": one.source, "commit": one.commit, "bytes": one.size} for one in removed]
        click.echo(json.dumps({"removed": told, "bytes_left": left}, indent=2))
    else:
        for one in removed:
            what = f"{one.source}@{one.commit[:8]}" if one.commit else one.source
            click.echo(f"removed {what}  {format_size(one.size)}")
        click.echo(f"{format_size(left)} left in {layout.root}")
    if left > wanted:
        click.echo(f"weightferry: {_why_left(layout)}", err=True)
        sys.exit(1)


def _why_left(layout: CacheLayout) -> str:
    from weightferry.cache.lock_support import exclusion

    locks = exclusion(layout)
    if locks.by_flock:
        return "what is left is pinned, in use, or belongs to somebody else"
    return f"nobody knows what is in use in {layout.root}: {locks.why}"


@cache.command()
@click.argument("source")
@_cache_dir
def rm(source: str, cache_dir: Path | None) -> None:
    """Remove SOURCE, as `ls` names it, whole."""
    from weightferry.cache.evict import remove_source

    layout = _layout(cache_dir)
    gone = remove_source(layout, _find(layout, source))
    if gone is None:
        click.echo(f"weightferry: {source} is not removed: {_why_left(layout)}", err=True)
        sys.exit(1)
    click.echo(f"removed {source}  {format_size(gone)}")


@cache.command()
@click.argument("source")
@_cache_dir
def pin(source: str, cache_dir: Path | None) -> None:
    """Keep SOURCE from being evicted, by anybody, until it is unpinned."""
    from weightferry.cache.permissions import touch

    layout = _layout(cache_dir)
    mark = layout.pin_mark(_find(layout, source).repo.name)
    if not mark.exists():
        touch(mark)


@cache.command()
@click.argument("source")
@_cache_dir
def unpin(source: str, cache_dir: Path | None) -> None:
    """Let SOURCE be evicted again."""
    layout = _layout(cache_dir)
    mark = layout.pin_mark(_find(layout, source).repo.name)
    # In the cache of a group the right to remove it says nothing.
    if mark.exists() and os.geteuid() not in (0, mark.stat().st_uid):
        click.echo(f"weightferry: {source} was pinned by user {mark.stat().st_uid}", err=True)
        sys.exit(1)
    mark.unlink(missing_ok=True)


@cache.command()
@click.argument("source", default="")
@click.option("--repair", is_flag=True, help="Bring damaged files anew: from another node of the job, else the origin.")
@_cache_dir
@_json
def verify(source: str, repair: bool, cache_dir: Path | None, as_json: bool) -> None:
    """Read everything, or SOURCE alone, and compare it with its checksums.

    Run it alone, or once a node under srun: one table tells of all nodes. Exits with 1 when anything is damaged and was
    not repaired.
    """
    from weightferry.cache.verify import verify as read_all
    from weightferry.cluster.connect import joined
    from weightferry.cluster.topology import read_topology
    from weightferry.phases.agree import RankRequest, agree
    from weightferry.report.progress import show_progress
    from weightferry.settings import Settings

    settings = Settings.from_environ(cache_dir=cache_dir)
    layout, topology = _layout(cache_dir), read_topology()

    def look() -> VerifyResult | None:
        held = _held(layout, source) if source else None
        if source and held is None:
            return None
        return read_all(layout, coordinator.count_bytes, held.name if held else "", coordinator.expect_bytes)

    def somebody_has_it(said: Mapping[int, VerifyResult | None]) -> dict[int, VerifyResult]:
        found = {leader: one for leader, one in said.items() if one is not None}
        if not found:
            raise _not_there(layout, source)
        return found

    try:
        with joined(settings, topology, "verify") as coordinator:
            _, job = agree(coordinator, lambda: RankRequest({}), settings)
            hosts = {domain.leader: domain.host for domain in job.domains}
            with (
                show_progress(coordinator.job_progress, hosts, "read")
                if topology.rank == 0
                else contextlib.nullcontext()
            ):
                found = coordinator.run_phase("verify", look, somebody_has_it, job.leaders)
            if coordinator.rank == 0 and not as_json:
                click.echo(_verified_text(found, hosts))
            left = tuple(dict.fromkeys(one.source for said in found.values() for one in said.damaged))
            if left and repair:
                from weightferry.repair import repair as bring_anew

                left = bring_anew(coordinator, layout, settings, found)
                if coordinator.rank == 0 and not as_json:
                    click.echo("repaired" if not left else f"not repaired: {', '.join(left)}; stage them again")
            if coordinator.rank == 0 and as_json:
                click.echo(_verified_json(found, hosts, left if repair else None))
            bad = bool(left)
    except CollectError as error:
        if topology.rank == 0:
            click.echo(f"weightferry: {type(error).__name__}: {error}", err=True)
        sys.exit(1)
    sys.exit(1 if bad else 0)


def _verified_json(found: dict[int, VerifyResult], hosts: dict[int, str], left: tuple[str, ...] | None) -> str:
    return json.dumps(
        [
            {
                "host": hosts[leader],
                "files": said.files,
                "bytes": said.size,
                "without_checksum": said.unknown,
                "damaged": [
                    {
                        "source": one.source,
                        "paths": one.paths,
                        "blob": str(one.blob),
                        "why": one.why,
                        "repaired": left is not None and one.source not in left,
                    }
                    for one in said.damaged
                ],
            }
            for leader, said in found.items()
        ],
        indent=2,
    )


def _verified_text(found: dict[int, VerifyResult], hosts: dict[int, str]) -> str:
    lines = []
    for leader, said in found.items():
        unknown = f", {said.unknown} without a checksum" if said.unknown else ""
        lines.append(
            f"{hosts[leader]}: {said.files} files, {format_size(said.size)}, {len(said.damaged)} damaged{unknown}"
        )
        lines += [f"  {one.source}: {', '.join(one.paths) or one.blob.name}: {one.why}" for one in said.damaged]
    return "\n".join(lines)


def _find(layout: CacheLayout, source: str) -> CachedSource:
    held = _held(layout, source)
    if held is None:
        raise _not_there(layout, source)
    return held


def _held(layout: CacheLayout, source: str) -> CachedSource | None:
    from weightferry.cache.inventory import inventory

    name = source.removeprefix("hf://")
    return next((one for one in inventory(layout) if name in (one.name, one.repo.name)), None)


def _not_there(layout: CacheLayout, source: str) -> BadRequest:
    from weightferry.cache.inventory import inventory
    from weightferry.origins.base import suggest_similar

    near = suggest_similar(source, [one.name for one in inventory(layout)])
    return BadRequest(f"{source} is not in {layout.root}{near}")
