"""From what all ranks ask for to one manifest; called on one rank of the job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects

from weightferry.errors import BadRequest, error_context
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.origins.base import Origin, is_below, origin_for
from weightferry.origins.retry import Monitor, call_with_retries
from weightferry.origins.shard_index import read_shard_paths
from weightferry.settings import Settings
from weightferry.sources import Source, SourceRequest, parse_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestedFiles:
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
class Resolution:
    """A manifest, and what each ask means in it."""

    manifest: Manifest
    found: Mapping[SourceRequest, RequestedFiles]


def pin_sources(
    requests: Collection[SourceRequest],
    settings: Settings,
    monitor: Monitor,
    origins: Callable[[str, Settings], Origin] = origin_for,
    *,
    other_ranks_can_ask: bool = False,
) -> Resolution:
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
    understood = {request: _understand(request) for request in requests}
    roots: dict[Source, list[SourceRequest]] = {}
    for request, source in understood.items():
        roots.setdefault(replace(source, path=""), []).append(request)
    pinned_sources: list[PinnedSource] = []
    found: dict[SourceRequest, RequestedFiles] = {}
    for root, group in roots.items():
        paths = list(dict.fromkeys(understood[request].path for request in group))
        with error_context(subject=str(understood[group[0]])), closing(origins(root.scheme, settings)) as origin:
            pinned = call_with_retries(
                settings, monitor, partial(origin.resolve, root, paths), other_ranks_can_ask=other_ranks_can_ask
            )
            indexed = {
                understood[request].path: call_with_retries(
                    settings, monitor, partial(read_shard_paths, origin, pinned, request, understood[request].path)
                )
                for request in group
                if request.shards
            }
            if indexed:
                paths = list(dict.fromkeys([*paths, *(shard for shards in indexed.values() for shard in shards)]))
                # At the commit that the index was read at; the branch stays the one that was asked for.
                at_commit = replace(root, revision=pinned.commit) if root.scheme == "hf" else root
                again = call_with_retries(settings, monitor, partial(origin.resolve, at_commit, paths))
                pinned = replace(again, source=pinned.source)
        for request in group:
            # A root that turned out to be one file comes back as its folder and the file's path.
            path = pinned.source.path or understood[request].path
            shards = indexed[path] if request.shards else ()
            found[request] = RequestedFiles(len(pinned_sources), path, (*_wanted(request, path, pinned), *shards))
        kept = {name for request in group for name in found[request].files}
        pinned_sources.append(replace(pinned, files=tuple(f for f in pinned.files if f.path in kept)))
    return Resolution(Manifest(tuple(pinned_sources)), found)


def _understand(request: SourceRequest) -> Source:
    source = parse_source(request, lambda text: Path(text).is_dir())
    if request.kind is None and source.scheme == "file" and "://" not in request.source:
        logger.info("%s is a local folder, and used as such", request)
    elif source.guessed:
        logger.info("%s is no local folder: taken for a repository of the Hugging Face Hub", request)
    return source


def _wanted(request: SourceRequest, path: str, pinned: PinnedSource) -> tuple[str, ...]:
    below = [f.path for f in pinned.files if is_below(f.path, path)]
    kept = list(
        filter_repo_objects(
            below, allow_patterns=list(request.allow) or None, ignore_patterns=list(request.ignore) or None
        )
    )
    if not kept:
        why = f"none of its {len(below)} files matches the patterns" if below else "it has no files"
        raise BadRequest(why, subject=str(request))
    return tuple(kept)


def manifest_entries(found: RequestedFiles, manifest: Manifest) -> tuple[File, ...]:
    """Return the manifest's entries for what was asked."""
    pinned = manifest.sources[found.source]
    names = set(found.files)
    return tuple(file for file in pinned.files if file.path in names)
