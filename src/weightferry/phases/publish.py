"""Phase 6, publish: snapshots show the files that are complete. `cache.publish` gives each file its final name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.manifests import record_listing
from weightferry.cache.publish import link_snapshot, record_staged
from weightferry.errors import error_context
from weightferry.manifest import Manifest
from weightferry.origins.listing import Listing


def publish(
    layout: CacheLayout, manifest: Manifest, listings: Iterable[Listing], tier_paths: Mapping[Path, Path]
) -> None:
    """Make the snapshots of a leader's cache show every file, and record that these commits were staged now.

    Parameters
    ----------
    listings
        What the phase resolve learned about Hub repositories. The cache keeps it, so that a later job need not ask.
    tier_paths
        By the path that content would have in the cache, its path in a read-only tier.
    """
    for pinned in manifest.sources:
        if not pinned.in_place:
            with error_context(phase="publish", subject=pinned.name):
                link_snapshot(layout, pinned, tier_paths)
            record_staged(layout, pinned)
    for listing in listings:
        with error_context(phase="publish", subject=listing.pinned.name):
            record_listing(layout, listing)
