"""Listings: what the Hub said about the files of a commit, so that nobody has to ask for it again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from weightferry.manifest import PinnedSource
from weightferry.origins.base import is_below
from weightferry.origins.lockfile import pinned_from_json, pinned_to_json
from weightferry.sources import Source

_VERSION = 1
_DEFAULT_BRANCH = "main"  # as in huggingface_hub


@dataclass(frozen=True)
class Listing:
    """All files below some paths of a repository at one commit.

    A listing says nothing about other paths of the commit: neither that they exist nor that they do not.

    Attributes
    ----------
    pinned : PinnedSource
        The commit and the files. `pinned.source.revision` is the branch, tag or commit that the Hub was asked for.
    paths : tuple of str
        The files or folders that the Hub was asked for; an empty path is the whole repository.
    time : float
        When the Hub said that the branch is at this commit, in seconds since the epoch; 0 for a commit id.
    """

    pinned: PinnedSource
    paths: tuple[str, ...]
    time: float

    def restricted(self) -> Listing:
        """Return this listing without files that are not below its paths."""
        files = tuple(file for file in self.pinned.files if any(is_below(file.path, path) for path in self.paths))
        return replace(self, pinned=replace(self.pinned, files=files))

    @property
    def question(self) -> str:
        """A digest of the revision and the paths: another answer with the same digest replaces this one."""
        asked = json.dumps([_revision(self.pinned.source), *self.paths])
        return hashlib.sha256(asked.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def to_json(self) -> str:
        """Return this listing as text."""
        content = {"version": _VERSION, "time": self.time, "paths": self.paths, "source": pinned_to_json(self.pinned)}
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Listing:
        """Return the listing in a text.

        Raises
        ------
        ValueError, KeyError, TypeError, AttributeError, RecursionError
            The text is not a listing of this version.
        """
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}")
        return cls(pinned_from_json(content["source"]), tuple(map(str, content["paths"])), float(content["time"]))


def is_commit_id(revision: str | None) -> bool:
    """Return whether a revision is a full commit id, which always means the same files."""
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))


class KnownListings:
    """What caches know of the repositories of a job.

    Parameters
    ----------
    read
        Returns the listings of a repository in the caches that this rank sees.
    more
        Listings that other ranks sent.
    """

    def __init__(self, read: Callable[[Source], Iterable[Listing]], more: Iterable[Listing] = ()) -> None:
        self._read, self._more = read, tuple(more)

    def find(self, source: Source, paths: Sequence[str]) -> Listing | None:
        """Return what all listings together say about a source.

        A branch or tag is at the commit of the most recent listing of it. All listings of that commit count.

        Returns
        -------
        Listing or None
            With all known files of the commit. Its `paths` are those of `paths` that are known, in their order. None
            when no listing knows the revision.
        """
        listings, commit, time = self._at_revision(source)
        if not listings:
            return None
        listed = [path for listing in listings for path in listing.paths]
        covered = tuple(path for path in paths if any(is_below(path, above) for above in listed))
        files = {file.path: file for listing in listings for file in listing.pinned.files}
        return Listing(PinnedSource(source, commit, tuple(files.values())), covered, time)

    def revisions(self, source: Source) -> list[str]:
        """Return the branches and tags of a repository that a listing knows."""
        found = {_revision(listing.pinned.source) for listing in self._of_repository(source)}
        return sorted(revision for revision in found if not is_commit_id(revision))

    def listed_paths(self, source: Source) -> list[str]:
        """Return the paths whose files are known at the revision of a source."""
        return sorted({path for listing in self._at_revision(source)[0] for path in listing.paths})

    def _at_revision(self, source: Source) -> tuple[list[Listing], str, float]:
        """Return the listings of the commit that a revision means, that commit, and since when that is known."""
        listings = self._of_repository(source)
        commit, time = source.revision or "", 0.0
        if not is_commit_id(source.revision):
            about = [listing for listing in listings if _revision(listing.pinned.source) == _revision(source)]
            # The commit decides between two listings of one moment, so that every rank would choose the same one.
            time, commit = max(((listing.time, listing.pinned.commit) for listing in about), default=(0.0, ""))
        return [listing for listing in listings if listing.pinned.commit == commit], commit, time

    def _of_repository(self, source: Source) -> list[Listing]:
        listings = (*self._read(source), *self._more)
        return [listing for listing in listings if _same_repository(listing.pinned.source, source)]


def _same_repository(source: Source, other: Source) -> bool:
    return (source.scheme, source.root, source.repo_type) == (other.scheme, other.root, other.repo_type)


def _revision(source: Source) -> str:
    return source.revision or _DEFAULT_BRANCH
