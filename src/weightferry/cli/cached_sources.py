"""Finds the cache folder and the sources that the cache commands name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from weightferry.errors import BadRequest

if TYPE_CHECKING:
    from weightferry.cache.inventory import CachedSource
    from weightferry.cache.layout import CacheLayout


def open_layout(cache_dir: Path | None) -> CacheLayout:
    """Return the layout of the cache folder.

    Raises
    ------
    BadRequest
        The path exists, and is not a folder that this user can read.
    """
    from weightferry.cache.layout import CacheLayout
    from weightferry.settings import Settings

    layout = CacheLayout(Settings.from_environ(cache_dir=cache_dir).cache_dir)
    if layout.root.exists() and not (layout.root.is_dir() and os.access(layout.root, os.R_OK | os.X_OK)):
        raise BadRequest(f"{layout.root} is not a folder that this user can read")
    return layout


def find_source(layout: CacheLayout, name: str) -> CachedSource:
    """Return the source of that name.

    Raises
    ------
    BadRequest
        The cache does not hold it.
    """
    source = find_source_or_none(layout, name)
    if source is None:
        raise unknown_source(layout, name)
    return source


def find_source_or_none(layout: CacheLayout, name: str) -> CachedSource | None:
    """Return the source of that name; None if the cache does not hold it."""
    from weightferry.cache.inventory import list_sources

    name = name.removeprefix("hf://")
    return next((source for source in list_sources(layout) if name in (source.name, source.repo.name)), None)


def unknown_source(layout: CacheLayout, name: str) -> BadRequest:
    """Make the error for a source that the cache does not hold; it suggests a similar name."""
    from weightferry.cache.inventory import list_sources
    from weightferry.origins.base import suggest_similar

    similar = suggest_similar(name, [source.name for source in list_sources(layout)])
    return BadRequest(f"{name} is not in {layout.root}{similar}")
