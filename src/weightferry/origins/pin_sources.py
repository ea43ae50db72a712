"""Resolve: turn the requests of all ranks into one manifest. One rank of the job calls it."""

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
from weightferry.origins.base import Origin, is_below
from weightferry.origins.registry import origin_for
from weightferry.origins.retry import Monitor, call_with_retries
from weightferry.origins.shard_index import read_shard_paths
from weightferry.settings import Settings
from weightferry.sources import Source, SourceRequest, parse_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestedFiles:
    """The files of one request, as the manifest has them.

    Attributes
    ----------
    source : int
        Index in `Manifest.sources`.
    path : str
        Requested file or folder below the root of that source; empty for the root.
    files : tuple of str
        Paths of all its files. For an index of shards these include the shards.
    """

    source: int
    path: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Resolution:
    """A manifest, and the files in it for each request."""

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
    """Resolve every source once, for all requests together.

    Parameters
    ----------
    requests
        The requests of all ranks.
    settings
        Limits for retries and timeouts.
    monitor
        Its `check` ends a wait when the operation has failed.
    origins
        Creates the origin for a scheme.
    other_ranks_can_ask
        Whether other ranks can resolve instead. Then this function raises `OriginUnreachable` without a retry.

    Raises
    ------
    CollectError
        The text of a source is invalid, its origin failed, or its patterns match no file.
    """
    sources = {request: _parse(request) for request in requests}
    by_root: dict[Source, list[SourceRequest]] = {}
    for request, source in sources.items():
        by_root.setdefault(replace(source, path=""), []).append(request)
    pinned_sources: list[PinnedSource] = []
    found: dict[SourceRequest, RequestedFiles] = {}
    for root, same_root in by_root.items():
        paths = list(dict.fromkeys(sources[request].path for request in same_root))
        with error_context(subject=str(sources[same_root[0]])), closing(origins(root.scheme, settings)) as origin:
            pinned = call_with_retries(
                settings, monitor, partial(origin.resolve, root, paths), other_ranks_can_ask=other_ranks_can_ask
            )
            shards_by_index = {
                sources[request].path: call_with_retries(
                    settings, monitor, partial(read_shard_paths, origin, pinned, request, sources[request].path)
                )
                for request in same_root
                if request.shards
            }
            if shards_by_index:
                all_shards = (shard for shards in shards_by_index.values() for shard in shards)
                paths = list(dict.fromkeys([*paths, *all_shards]))
                # Resolve the shards at the commit of the index. The source keeps the requested branch.
                at_commit = replace(root, revision=pinned.commit) if root.scheme == "hf" else root
                with_shards = call_with_retries(settings, monitor, partial(origin.resolve, at_commit, paths))
                pinned = replace(with_shards, source=pinned.source)
        for request in same_root:
            # If the root is a single file, the origin returns its folder as root and the file as path.
            path = pinned.source.path or sources[request].path
            shards = shards_by_index[path] if request.shards else ()
            files = (*_select_files(request, path, pinned), *shards)
            found[request] = RequestedFiles(len(pinned_sources), path, files)
        needed = {name for request in same_root for name in found[request].files}
        pinned_sources.append(replace(pinned, files=tuple(file for file in pinned.files if file.path in needed)))
    return Resolution(Manifest(tuple(pinned_sources)), found)


def _parse(request: SourceRequest) -> Source:
    source = parse_source(request, lambda text: Path(text).is_dir())
    if request.kind is None and source.scheme == "file" and "://" not in request.source:
        logger.info("%s: using the local folder of this name", request)
    elif source.guessed:
        logger.info("%s: no local folder of this name; using the Hugging Face Hub repository", request)
    return source


def _select_files(request: SourceRequest, path: str, pinned: PinnedSource) -> tuple[str, ...]:
    below = [file.path for file in pinned.files if is_below(file.path, path)]
    selected = list(
        filter_repo_objects(
            below, allow_patterns=list(request.allow) or None, ignore_patterns=list(request.ignore) or None
        )
    )
    if not selected:
        reason = f"none of its {len(below)} files matches the patterns" if below else "it has no files"
        raise BadRequest(reason, subject=str(request))
    return tuple(selected)


def manifest_entries(found: RequestedFiles, manifest: Manifest) -> tuple[File, ...]:
    """Return the manifest's files of one request."""
    pinned = manifest.sources[found.source]
    names = set(found.files)
    return tuple(file for file in pinned.files if file.path in names)
