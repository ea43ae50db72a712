"""From what all ranks ask for to one manifest; called on one rank of the job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects

from weightferry.errors import BadRequest, at
from weightferry.manifest import File, Manifest, Pinned
from weightferry.origins.base import Origin, is_below, origin_for
from weightferry.origins.index import shards_of
from weightferry.origins.retry import Watch, retrying
from weightferry.settings import Settings
from weightferry.sources import Ask, Source, understand

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Where the manifest has what was asked for.

    Attributes
    ----------
    source : int
        Place in `Manifest.sources`.
    path : str
        Of a file or folder below that source's root; empty: the root.
    files : tuple of str
        The paths of all its files; of an index, its shards too.
    """

    source: int
    path: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Resolved:
    """A manifest, and what each ask means in it."""

    manifest: Manifest
    found: Mapping[Ask, Found]


def resolve(
    asks: Collection[Ask],
    settings: Settings,
    watch: Watch,
    origins: Callable[[str, Settings], Origin] = origin_for,
    *,
    elsewhere: bool = False,
) -> Resolved:
    """Pin every source once, however many files of it are wanted.

    Parameters
    ----------
    elsewhere
        Other ranks could ask too: having no way to an origin is told at once.

    Raises
    ------
    CollectError
        What the text of a source, its origin, or its patterns are wrong about.
    """
    understood = {ask: _understand(ask) for ask in asks}
    roots: dict[Source, list[Ask]] = {}
    for ask, source in understood.items():
        roots.setdefault(replace(source, path=""), []).append(ask)
    pinned_sources: list[Pinned] = []
    found: dict[Ask, Found] = {}
    for root, group in roots.items():
        paths = list(dict.fromkeys(understood[ask].path for ask in group))
        with at(subject=str(understood[group[0]])), closing(origins(root.scheme, settings)) as origin:
            pinned = retrying(settings, watch, partial(origin.resolve, root, paths), elsewhere=elsewhere)
            indexed = {
                understood[ask].path: retrying(
                    settings, watch, partial(shards_of, origin, pinned, ask, understood[ask].path)
                )
                for ask in group
                if ask.shards
            }
            if indexed:
                paths = list(dict.fromkeys([*paths, *(shard for shards in indexed.values() for shard in shards)]))
                # At the commit that the index was read at; the branch stays the one that was asked for.
                at_commit = replace(root, revision=pinned.commit) if root.scheme == "hf" else root
                again = retrying(settings, watch, partial(origin.resolve, at_commit, paths))
                pinned = replace(again, source=pinned.source)
        for ask in group:
            # A root that turned out to be one file comes back as its folder and the file's path.
            path = pinned.source.path or understood[ask].path
            shards = indexed[path] if ask.shards else ()
            found[ask] = Found(len(pinned_sources), path, (*_wanted(ask, path, pinned), *shards))
        kept = {name for ask in group for name in found[ask].files}
        pinned_sources.append(replace(pinned, files=tuple(f for f in pinned.files if f.path in kept)))
    return Resolved(Manifest(tuple(pinned_sources)), found)


def _understand(ask: Ask) -> Source:
    source = understand(ask, lambda text: Path(text).is_dir())
    if ask.kind is None and source.scheme == "file" and "://" not in ask.source:
        logger.info("%s is a local folder, and used as such", ask)
    elif source.guessed:
        logger.info("%s is no local folder: taken for a repository of the Hugging Face Hub", ask)
    return source


def _wanted(ask: Ask, path: str, pinned: Pinned) -> tuple[str, ...]:
    below = [f.path for f in pinned.files if is_below(f.path, path)]
    kept = list(
        filter_repo_objects(below, allow_patterns=list(ask.allow) or None, ignore_patterns=list(ask.ignore) or None)
    )
    if not kept:
        why = f"none of its {len(below)} files matches the patterns" if below else "it has no files"
        raise BadRequest(why, subject=str(ask))
    return tuple(kept)


def files_of(found: Found, manifest: Manifest) -> tuple[File, ...]:
    """Return the manifest's entries for what was asked."""
    pinned = manifest.sources[found.source]
    names = set(found.files)
    return tuple(file for file in pinned.files if file.path in names)
