"""The last phase: links where they were asked for, and every rank opens what it was given."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.links import point
from weightferry.cluster.agree import Wish
from weightferry.errors import BadRequest, CollectError, SourceNotFound, at
from weightferry.manifest import File
from weightferry.origins.resolve import Found, Resolved, files_of


@dataclass(frozen=True)
class Shown:
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
    found: Mapping[str, Found]
    replaces_files: bool

    @classmethod
    def of(cls, wish: Wish, resolved: Resolved, layout: CacheLayout) -> Shown:
        """Work out the paths of one rank's wish."""
        paths, targets, links, found = {}, {}, {}, {}
        for name, ask in wish.asks.items():
            found[name] = what = resolved.found[ask]
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


def make_links(shown: Shown) -> None:
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


def check_readable(shown: Shown, resolved: Resolved) -> None:
    """Open everything this rank was given, through the links, and compare the sizes.

    Raises
    ------
    CollectError
        Something is not there for this rank, cannot be opened, or has another size than the manifest says.
    """
    linked = {target: link for link, target in shown.links.items()}
    for name, found in shown.found.items():
        pinned = resolved.manifest.sources[found.source]
        for file in files_of(found, resolved.manifest):
            below = os.path.relpath(file.path, found.path) if found.path != file.path else ""
            target = shown.targets[name] / below
            # One link for the whole of it, or one for each file, or none.
            is_link = shown.paths[name] in shown.links
            path = shown.paths[name] / below if is_link else linked.get(target, target)
            _open(path, file, in_place=pinned.in_place)


def _open(path: Path, file: File, *, in_place: bool) -> None:
    with at(subject=str(path)):
        try:
            with path.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
        except FileNotFoundError as error:
            where = "a local source must be there on every node" if in_place else "it vanished from the cache"
            raise SourceNotFound(f"not there for this rank: {where}", subject=str(path)) from error
        if file.size is not None and size != file.size:
            raise CollectError(f"has {size} bytes for this rank, {file.size} were expected", subject=str(path))
