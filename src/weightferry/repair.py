"""Bring damaged content anew: good bytes come from a node that has them, else from the origin."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.verify import Damage, Verified, doubt
from weightferry.cluster.agree import Wish
from weightferry.cluster.control import Control
from weightferry.hashing import Checksum
from weightferry.manifest import File, Manifest, Pinned
from weightferry.origins.locked import Lockfile
from weightferry.settings import Settings
from weightferry.sources import Ask, understand
from weightferry.staging import collect

Sizes = dict[tuple[str, str], int]
"""Bytes of content, by repository and name."""


def repair(control: Control, layout: CacheLayout, settings: Settings, found: Mapping[int, Verified]) -> tuple[str, ...]:
    """Stage again what is damaged, on all nodes at once; every rank calls it.

    Where every damaged file is right on some node, no origin is asked.

    Parameters
    ----------
    found
        By leader, what was found; the same on every rank.

    Returns
    -------
    tuple of str
        Sources that are not of the Hub: the cache does not know where they came from. Their damaged content is removed.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    damaged = [one for said in found.values() for one in said.damaged]
    known = {one: _ask(one) for one in damaged if one.repo_id and one.commits and one.paths}

    def look() -> Sizes:
        mine = found.get(control.rank, Verified()).damaged
        for one in mine:
            doubt(layout, one)
        return _right_here(layout, list(known), {one.blob.name for one in mine})

    sizes = control.round("repair", look, _together, list(found))
    if known:
        asks = {f"{number}/{path}": ask for number, one in enumerate(known.values()) for path, ask in one.items()}
        with _pinned(control, list(known), sizes) as lockfile:
            collect(lambda: Wish(asks), control, settings, lockfile=lockfile)
    return tuple(dict.fromkeys(one.source for one in damaged if one not in known))


def _together(said: Mapping[int, Sizes]) -> Sizes:
    return {key: size for one in said.values() for key, size in one.items()}


def _root(damage: Damage) -> str:
    return f"hf://{damage.repo_id}@{damage.commits[-1]}"


def _ask(damage: Damage) -> dict[str, Ask]:
    return {path: Ask.of(_root(damage), path) for path in damage.paths}


def _right_here(layout: CacheLayout, damaged: list[Damage], wrong: set[str]) -> Sizes:
    sizes = {}
    for one in damaged:
        blob = layout.blobs(layout.hub / one.blob.parents[1].name) / one.blob.name
        with contextlib.suppress(OSError):
            if blob.name not in wrong:
                sizes[one.repo_id, blob.name] = blob.stat().st_size
    return sizes


@contextlib.contextmanager
def _pinned(control: Control, damaged: list[Damage], sizes: Sizes) -> Iterator[Path | None]:
    """Write a lock file on rank 0 of what is to be brought; None where the origin has to be asked for sizes."""
    if any((one.repo_id, one.blob.name) not in sizes for one in damaged):
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repair.lock"
        if control.rank == 0:
            path.write_text(Lockfile.text(_manifest(damaged, sizes)))
        yield path


def _manifest(damaged: list[Damage], sizes: Sizes) -> Manifest:
    """Pin what is to be brought: one entry for each source, with all its files."""
    sources: dict[str, Pinned] = {}
    for one in damaged:
        root, size = _root(one), sizes[one.repo_id, one.blob.name]
        pinned = sources.get(root) or Pinned(understand(Ask.of(root), lambda _: False), one.commits[-1], ())
        files = tuple(File(path, size, Checksum.read(one.blob.name)) for path in one.paths)
        sources[root] = replace(pinned, files=pinned.files + files)
    return Manifest(tuple(sources.values()))
