"""The manifests of staged commits in a cache: one small file for each answer of the Hub, read together.

A file is never changed by two writers for different reasons: jobs that ask for different paths of one commit write
different files. So no lock is needed, and no job loses what another one knows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from weightferry.cache.atomic import write_atomically
from weightferry.cache.layout import CacheLayout
from weightferry.cache.permissions import list_entries, list_folders
from weightferry.origins.listing import Listing
from weightferry.sources import Source

logger = logging.getLogger(__name__)

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def record_listing(layout: CacheLayout, listing: Listing) -> None:
    """Keep what the Hub said about a commit, until the commit is evicted. Does nothing in a read-only cache."""
    pinned = listing.pinned
    path = layout.manifest(pinned.source.repo_folder, pinned.commit, listing.question)
    with contextlib.suppress(OSError):
        write_atomically(path, listing.to_json())


def read_listings(layout: CacheLayout, source: Source) -> Iterator[Listing]:
    """Yield what a cache knows of a repository; a file that cannot be read or is damaged counts as absent."""
    for commit in sorted(list_folders(layout.manifests(source.repo_folder))):
        for entry in sorted(list_entries(commit), key=lambda entry: entry.name):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                listing = _read(Path(entry.path))
                if listing is not None and listing.pinned.commit == commit.name:
                    yield listing


def _read(path: Path) -> Listing | None:
    try:
        return Listing.from_json(path.read_text())
    except OSError:
        return None
    except _MALFORMED as error:
        logger.info("%s: not a manifest (%s: %s); it is not used", path, type(error).__name__, error)
        return None
