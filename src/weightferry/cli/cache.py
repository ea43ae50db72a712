"""``weightferry cache``: lists, verifies, pins and evicts the sources in a node's cache."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weightferry.cli.arguments import cache_dir_option, json_option
from weightferry.cli.cached_sources import find_source, open_layout
from weightferry.cli.errors import OneLineErrorGroup
from weightferry.cli.verify import verify
from weightferry.report.report_text import format_size

if TYPE_CHECKING:
    from weightferry.cache.inventory import CachedSource
    from weightferry.cache.layout import CacheLayout


@click.group(cls=OneLineErrorGroup)
def cache() -> None:
    """List, verify, pin and evict the sources in this node's cache."""


cache.add_command(verify)


@cache.command()
@cache_dir_option
def where(cache_dir: Path | None) -> None:
    """Print the path of the cache folder."""
    click.echo(open_layout(cache_dir).root)


@cache.command("ls")
@cache_dir_option
@json_option
def ls(cache_dir: Path | None, as_json: bool) -> None:
    """List the sources: size, time of the last stage, state, commits.

    The state is empty, "pinned" or "in use"; eviction removes only sources without a state.
    """
    from weightferry.cache.inventory import list_sources
    from weightferry.cache.partial_cleanup import list_partial_data

    layout = open_layout(cache_dir)
    rows = [_row(layout, source) for source in list_sources(layout)]
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
    if partial_size := sum(partial.disk_size for partial in list_partial_data(layout)):
        click.echo(f"{format_size(partial_size)} in partial downloads of running or killed jobs")


def _row(layout: CacheLayout, source: CachedSource) -> dict[str, Any]:
    from weightferry.cache.inventory import is_in_use, is_pinned

    return {
        "source": source.name,
        "bytes": source.size,
        "files": len(source.sizes),
        "staged": source.last_staged,
        "commits": [commit.name for commit in source.commits],
        "pinned": is_pinned(layout, source),
        "in_use": is_in_use(layout, source),
        "path": str(source.repo),
    }


@cache.command()
@click.option("--to", metavar="SIZE", required=True, help="Largest size of the cache afterwards: 500GB, 1.5TiB, 0.")
@cache_dir_option
@json_option
def evict(to: str, cache_dir: Path | None, as_json: bool) -> None:
    """Evict the oldest sources until the cache has a given size.

    The source whose last stage is oldest goes first, partial downloads of killed jobs go last. Sources that are pinned,
    in use, or owned by another user stay.

    Exit code: 0 on success, 1 if the cache is still larger.
    """
    from weightferry.cache.evict import EvictedContent
    from weightferry.cache.evict import evict as evict_sources
    from weightferry.cache.inventory import content_size
    from weightferry.cache.lock_support import detect_lock_support
    from weightferry.cache.partial_cleanup import list_partial_data, remove_abandoned
    from weightferry.settings import byte_count

    layout = open_layout(cache_dir)
    try:
        limit = byte_count(to)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--to") from None
    removed = evict_sources(layout, limit)
    left = content_size(layout) + sum(partial.disk_size for partial in list_partial_data(layout))
    for freed in remove_abandoned(layout, (), detect_lock_support(layout)) if left > limit else ():
        removed.append(EvictedContent("partial download of a killed job", "", freed))
        left -= freed
        if left <= limit:
            break
    if as_json:
        rows = [{"source": content.source, "commit": content.commit, "bytes": content.size} for content in removed]
        click.echo(json.dumps({"removed": rows, "bytes_left": left}, indent=2))
    else:
        for content in removed:
            name = f"{content.source}@{content.commit[:8]}" if content.commit else content.source
            click.echo(f"removed {name}  {format_size(content.size)}")
        click.echo(f"{format_size(left)} left in {layout.root}")
    if left > limit:
        click.echo(f"weightferry: kept {format_size(left)}: {_why_kept(layout)}", err=True)
        sys.exit(1)


def _why_kept(layout: CacheLayout) -> str:
    from weightferry.cache.lock_support import detect_lock_support

    locks = detect_lock_support(layout)
    if locks.flock_works:
        return "in use by a running process, being downloaded, pinned, or owned by another user"
    return f"flock does not work in {layout.root}, so weightferry cannot tell which files are in use: {locks.reason}"


@cache.command()
@click.argument("source")
@cache_dir_option
def rm(source: str, cache_dir: Path | None) -> None:
    """Remove SOURCE with all its commits.

    SOURCE is a name as `weightferry cache ls` prints it.
    """
    from weightferry.cache.evict import remove_source

    layout = open_layout(cache_dir)
    freed = remove_source(layout, find_source(layout, source))
    if freed is None:
        click.echo(f"weightferry: {source} was not removed: {_why_kept(layout)}", err=True)
        sys.exit(1)
    click.echo(f"removed {source}  {format_size(freed)}")


@cache.command()
@click.argument("source")
@cache_dir_option
def pin(source: str, cache_dir: Path | None) -> None:
    """Protect SOURCE from eviction by any user, until it is unpinned."""
    from weightferry.cache.permissions import touch

    layout = open_layout(cache_dir)
    mark = layout.pin_mark(find_source(layout, source).repo.name)
    if not mark.exists():
        touch(mark)


@cache.command()
@click.argument("source")
@cache_dir_option
def unpin(source: str, cache_dir: Path | None) -> None:
    """Allow the eviction of SOURCE again."""
    layout = open_layout(cache_dir)
    mark = layout.pin_mark(find_source(layout, source).repo.name)
    # In the cache of a group, every member may delete the mark's file; only its owner may unpin.
    if mark.exists() and os.geteuid() not in (0, mark.stat().st_uid):
        owner = mark.stat().st_uid
        click.echo(
            f"weightferry: {source} was pinned by user id {owner}; only that user or root can unpin it", err=True
        )
        sys.exit(1)
    mark.unlink(missing_ok=True)
