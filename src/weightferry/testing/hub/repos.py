"""Repositories: names for commits, over folders on disk and over content in memory."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from weightferry.testing.hub.commits import Blob, Commit, Library

RepoType = Literal["model", "dataset", "space"]
Gated = Literal[False, "auto", "manual"]
Reader = Callable[[], Mapping[str, Blob]]

# Where each kind of repository lies below a root, which is also how URLs of its pages begin.
_PREFIXES: dict[RepoType, str] = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_NOT_AN_ORGANIZATION = {"api", "datasets", "spaces"}
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_NOT_CONTENT = {".git", ".cache"}


def folder_reader(folder: Path) -> Reader:
    """Read a folder as it is at each call, without what belongs to git (``.git``) and to downloads (``.cache``).

    Links to files are followed, so that a snapshot folder of a Hugging Face cache can be served as it lies there.
    """
    return lambda: dict(_scan(folder))


def _scan(folder: Path) -> Iterator[tuple[str, Blob]]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - _NOT_CONTENT)
        for name in sorted(names):
            path = Path(parent, name)
            try:
                now = path.stat()
            except OSError:
                continue  # a broken link, or gone between the listing and here
            if stat.S_ISREG(now.st_mode):
                yield path.relative_to(folder).as_posix(), Blob(path, now.st_size, now.st_mtime_ns)


def memory_reader(content: Mapping[str, bytes]) -> Reader:
    """Hold files in memory.

    Raises
    ------
    ValueError
        If a path is absolute, climbs out, has empty parts, or runs through another file.
    """
    for path in content:
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"not a path inside a repository: {path!r}")
        if any("/".join(parts[:depth]) in content for depth in range(1, len(parts))):
            raise ValueError(f"a file stands where {path!r} needs a folder")
    blobs = {path: Blob.of(data) for path, data in content.items()}
    return lambda: blobs


class Head:
    """What a branch points at: the commit of what `read` returns at the time."""

    def __init__(self, read: Reader, library: Library) -> None:
        self._read = read
        self._library = library
        self._lock = threading.Lock()
        self._blobs: Mapping[str, Blob] | None = None
        self._now: Commit | None = None
        self._commits: dict[str, Commit] = {}

    def commit(self) -> Commit:
        """Return the present commit; hashing happens here, and only of what changed."""
        with self._lock:
            blobs = self._read()
            if self._now is None or blobs != self._blobs:
                # The newest of equal commits: its blobs are the ones that are on disk.
                self._blobs, self._now = blobs, self._library.commit(blobs)
                self._commits[self._now.sha] = self._now
            return self._now

    def find(self, sha: str) -> Commit | None:
        """Return a commit that this is, or was when somebody asked."""
        return commit if (commit := self.commit()).sha == sha else self._commits.get(sha)


@dataclass
class Repo:
    """A repository: branches that move, tags that do not, and every commit that a branch was known to point at.

    Attributes
    ----------
    allowed
        Tokens with access where `private` or `gated`; None means every valid token.
    former
        What branches pointed at before they were moved.
    """

    type: RepoType
    id: str
    private: bool = False
    gated: Gated = False
    allowed: frozenset[str] | None = None
    branches: dict[str, Head] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    former: list[Head] = field(default_factory=list)

    @property
    def page(self) -> str:
        """The path of its page: ``org/name``, ``datasets/org/name``, ``spaces/org/name``."""
        return _PREFIXES[self.type] + self.id

    def admits(self, token: str | None) -> bool:
        """Whether this token may see the repository if private, and read it if gated."""
        return token is not None and (self.allowed is None or token in self.allowed)

    def set_branch(self, name: str, head: Head) -> None:
        """Point a branch at new content; what it was before stays readable by commit."""
        if name in self.branches:
            self.former.append(self.branches[name])
        self.branches[name] = head

    def resolve(self, revision: str) -> Commit | None:
        """Find a branch, a tag or a commit."""
        if revision in self.branches:
            return self.branches[revision].commit()
        if revision in self.tags:
            return self.tags[revision]
        heads = [*self.branches.values(), *self.former]
        return next((commit for head in heads if (commit := head.find(revision))), None)


class Repositories:
    """All repositories of a server: the folders under a root, found when asked for, and those added by hand."""

    def __init__(self, root: Path | None, library: Library, *, private_root: bool = False) -> None:
        self._root = root
        self._library = library
        self._private_root = private_root
        self._lock = threading.RLock()
        self._repos: dict[tuple[RepoType, str], Repo] = {}

    def find(self, repo_type: RepoType, repo_id: str) -> Repo | None:
        """Return a repository, or None where there is none of that name."""
        with self._lock:
            folder = self._folder(repo_type, repo_id)
            if folder is not None and (repo_type, repo_id) not in self._repos:
                repo = Repo(repo_type, repo_id, private=self._private_root)
                repo.set_branch("main", Head(folder_reader(folder), self._library))
                self._repos[repo_type, repo_id] = repo
            return self._repos.get((repo_type, repo_id))

    @contextmanager
    def edit(self, repo_type: RepoType, repo_id: str) -> Iterator[Repo]:
        """Yield the repository of that name, a new one where there is none, for a change by one thread at a time."""
        if repo_type not in _PREFIXES:
            raise ValueError(f"not a kind of repository: {repo_type!r}")
        if not _valid(repo_id):
            raise ValueError(f"not an org/name: {repo_id!r}")
        with self._lock:
            repo = self.find(repo_type, repo_id) or Repo(repo_type, repo_id)
            yield repo
            self._repos[repo_type, repo_id] = repo

    def all(self) -> list[Repo]:
        """Return what there is now, folders under the root included."""
        for repo_type, prefix in _PREFIXES.items():
            for folder in sorted(self._root.glob(f"{prefix}*/*")) if self._root else []:
                self.find(repo_type, f"{folder.parent.name}/{folder.name}")
        return list(self._repos.values())

    def _folder(self, repo_type: RepoType, repo_id: str) -> Path | None:
        if self._root is None or not _valid(repo_id):
            return None
        folder = self._root / _PREFIXES[repo_type] / repo_id
        return folder if folder.is_dir() else None


def _valid(repo_id: str) -> bool:
    parts = repo_id.split("/")
    return (
        len(parts) == 2
        and parts[0] not in _NOT_AN_ORGANIZATION
        and all(_NAME.fullmatch(part) and ".." not in part for part in parts)
    )
