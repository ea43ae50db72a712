"""The last phase: links where they were asked for, and every rank opens what it was given."""

from __future__ import annotations

import filecmp
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.atomic import point
from weightferry.cache.layout import CacheLayout
from weightferry.cluster.domains import wait_until_visible
from weightferry.errors import BadRequest, CollectError, IntegrityError, SourceNotFound, at
from weightferry.manifest import File, Manifest
from weightferry.origins.pin_sources import RequestedFiles, Resolution, files_of
from weightferry.phases.agree import RankRequest

_BLOCK = 1 << 16
"""Bytes at the beginning of a file that every rank reads: they show whether it sees what was brought."""


@dataclass(frozen=True)
class LinkPlan:
    """Where one rank finds what it asked for.

    Attributes
    ----------
    paths : mapping of str to Path
        By name: what is handed to the caller.
    targets : mapping of str to Path
        By name: the file or folder itself, in the cache or where a local source is.
    links : mapping of Path to Path
        Link to target.
    found : mapping of str to Found
        By name: which files of the manifest these are.
    replaces_files : bool
        Whether a link takes the place of another file: one named ``NAME.ckpt`` in `collect_in` is ours to make, the
        files of a folder that somebody named are not.
    """

    paths: Mapping[str, Path]
    targets: Mapping[str, Path]
    links: Mapping[Path, Path]
    found: Mapping[str, RequestedFiles]
    replaces_files: bool

    @classmethod
    def of(cls, wish: RankRequest, resolved: Resolution, layout: CacheLayout) -> LinkPlan:
        """Work out the paths of one rank's wish."""
        paths, targets, links, found = {}, {}, {}, {}
        for name, request in wish.requests.items():
            found[name] = what = resolved.found[request]
            folder = layout.snapshot(resolved.manifest.sources[what.source])
            paths[name] = targets[name] = folder / what.path
            if wish.into is not None and wish.suffix is not None:
                paths[name] = link = Path(os.path.normpath(wish.into / f"{name}{wish.suffix}"))
                links[link] = targets[name]
            elif wish.into is not None:
                # The single file that was asked for is linked by its name, a folder's files by their paths in it.
                single = what.files == (what.path,)
                above = what.path.rpartition("/")[0] if single else what.path
                paths[name] = wish.into / what.path.rpartition("/")[2] if single else wish.into
                links |= {wish.into / os.path.relpath(file, above or "."): folder / file for file in what.files}
        return cls(paths, targets, links, found, replaces_files=wish.suffix is not None)


def make_links(shown: LinkPlan) -> None:
    """Make the links of one folder, each atomically and only where it differs."""
    for link, target in shown.links.items():
        with at(subject=str(link)):
            if _is_already(link, target):
                continue
            if not shown.replaces_files and link.exists() and not link.is_symlink():
                raise BadRequest("another file is in the way of the link, and it is not replaced", subject=str(link))
            point(link, target)


def _is_already(link: Path, target: Path) -> bool:
    """Whether there is no reason to replace it: it is where the target is, or a real file that is equal to it."""
    folders = link.parent, target.parent
    if link.name == target.name and all(map(Path.is_dir, folders)) and Path.samefile(*folders):
        # A local source in the folder of links itself, maybe a link already: it would be made to point to itself.
        return True
    if link.is_symlink() or not link.is_file() or not target.is_file():
        return False
    return link.samefile(target) or filecmp.cmp(link, target, shallow=False)


@dataclass(frozen=True)
class VisibilityCheck:
    """What a rank must see of the files it was given.

    Attributes
    ----------
    blocks : tuple of int
        Of each file of `Manifest.staged()`, the CRC-32 of its first block, as leaders read it.
    patience : float
        Seconds for files to show that other machines made.
    check : callable
        Called while waiting; what it raises ends the wait.
    """

    blocks: tuple[int, ...] = ()
    patience: float = 0.0
    check: Callable[[], None] = lambda: None


def first_blocks(layout: CacheLayout, manifest: Manifest) -> tuple[int, ...]:
    """Read the first block of every staged file on a leader, for the others to compare."""
    blocks = []
    for pinned, file in manifest.staged():
        path = layout.pointer(pinned, file)
        with at(subject=str(path)), path.open("rb") as opened:
            blocks.append(zlib.crc32(opened.read(_BLOCK)))
    return tuple(blocks)


def agree_on_blocks(manifest: Manifest, said: Mapping[int, tuple[int, ...] | None]) -> tuple[int, ...]:
    """Compare what leaders read; runs on rank 0.

    Raises
    ------
    IntegrityError
        Two of them see different bytes.
    """
    (first, job), *others = ((rank, blocks) for rank, blocks in said.items() if blocks is not None)
    for rank, blocks in others:
        for (pinned, file), mine, theirs in zip(manifest.staged(), job, blocks, strict=True):
            if mine != theirs:
                subject = f"{pinned.name}/{file.path}"
                raise IntegrityError(f"begins differently for ranks {first} and {rank}", subject=subject)
    return job


def check_readable(shown: LinkPlan, resolved: Resolution, sight: VisibilityCheck) -> None:
    """Open everything this rank was given, through the links, and compare sizes and first blocks.

    Raises
    ------
    CollectError
        Something is not there for this rank, cannot be opened, or has another size or beginning than expected.
    """
    linked = {target: link for link, target in shown.links.items()}
    names = ((pinned.name, file.path) for pinned, file in resolved.manifest.staged())
    blocks = dict(zip(names, sight.blocks, strict=True))
    for name, found in shown.found.items():
        pinned = resolved.manifest.sources[found.source]
        for file in files_of(found, resolved.manifest):
            below = os.path.relpath(file.path, found.path) if found.path != file.path else ""
            target = Path(os.path.normpath(shown.targets[name] / below))  # the shards of an index lie beside it
            # One link for the whole of it, or one for each file, or none.
            is_link = shown.paths[name] in shown.links and not below.startswith("..")
            path = shown.paths[name] / below if is_link else linked.get(target, target)
            with at(subject=str(path)):
                _check(path, file, blocks.get((pinned.name, file.path)), sight, in_place=pinned.in_place)


def _check(path: Path, file: File, block: int | None, sight: VisibilityCheck, *, in_place: bool) -> None:
    def look() -> tuple[int, int]:
        with path.open("rb") as opened:
            return os.fstat(opened.fileno()).st_size, zlib.crc32(opened.read(0 if block is None else _BLOCK))

    try:
        size, crc = wait_until_visible(look, path, sight.patience, sight.check)
    except FileNotFoundError as error:
        where = "a local source must be there on every node" if in_place else "it vanished from the cache"
        raise SourceNotFound(f"not there for this rank: {where}", subject=str(path)) from error
    if file.size is not None and size != file.size:
        raise CollectError(f"has {size} bytes for this rank, {file.size} were expected", subject=str(path))
    if block is not None and crc != block:
        raise IntegrityError("begins differently for this rank than for the one that brought it", subject=str(path))
