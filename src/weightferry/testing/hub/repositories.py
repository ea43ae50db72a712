"""Repositories with branches and tags, from folders on disk and from content in memory."""

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

from weightferry.testing.hub.commits import Blob, Commit, CommitBuilder

RepoType = Literal["model", "dataset", "space"]
Gated = Literal[False, "auto", "manual"]
ContentReader = Callable[[], Mapping[str, Blob]]

# The folder of each type below the root, and the start of the URL paths of its pages.
_PREFIXES: dict[RepoType, str] = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_RESERVED_NAMES = {"api", "datasets", "spaces"}
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_IGNORED_FOLDERS = {".git", ".cache"}


def folder_reader(folder: Path) -> ContentReader:
    """Return a function that lists a folder at each call, without ``.git`` and ``.cache`` (of downloads).

    It follows links to files, so that a snapshot folder of a Hugging Face cache can be served.
    """
    return lambda: dict(_scan(folder))


def _scan(folder: Path) -> Iterator[tuple[str, Blob]]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - _IGNORED_FOLDERS)
        for name in sorted(names):
            path = Path(parent, name)
            try:
                status = path.stat()
            except OSError:
                continue  # a broken link, or a file that was removed after the listing
            if stat.S_ISREG(status.st_mode):
                yield path.relative_to(folder).as_posix(), Blob(path, status.st_size, status.st_mtime_ns)


def memory_reader(content: Mapping[str, bytes]) -> ContentReader:
    """Return a function that lists files in memory.

    Raises
    ------
    ValueError
        A path is absolute, leaves the repository, has empty parts, or passes through another file.
    """
    for path in content:
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"not a path inside a repository: {path!r}")
        if any("/".join(parts[:depth]) in content for depth in range(1, len(parts))):
            raise ValueError(f"a file has the name of a folder of {path!r}")
    blobs = {path: Blob.of(data) for path, data in content.items()}
    return lambda: blobs


class Branch:
    """A branch; its commit is always that of the files that `read` returns now."""

    def __init__(self, read: ContentReader, commits: CommitBuilder) -> None:
        self._read = read
        self._commit_builder = commits
        self._lock = threading.Lock()
        self._blobs: Mapping[str, Blob] | None = None
        self._current: Commit | None = None
        self._commits: dict[str, Commit] = {}

    def commit(self) -> Commit:
        """Return the current commit; hash the files that changed."""
        with self._lock:
            blobs = self._read()
            if self._current is None or blobs != self._blobs:
                # Replace an equal commit too: only the new one has the modification times of the files on disk.
                self._blobs, self._current = blobs, self._commit_builder.commit(blobs)
                self._commits[self._current.sha] = self._current
            return self._current

    def find(self, sha: str) -> Commit | None:
        """Return a commit of this branch, current or seen before; None if it never was."""
        return commit if (commit := self.commit()).sha == sha else self._commits.get(sha)


@dataclass
class Repo:
    """A repository: branches, tags, and every commit that a branch had when it was read.

    Attributes
    ----------
    allowed
        Tokens with access to a `private` or `gated` repository; None: every valid token.
    former_branches
        The contents that `set_branch` replaced.
    """

    type: RepoType
    id: str
    private: bool = False
    gated: Gated = False
    allowed: frozenset[str] | None = None
    branches: dict[str, Branch] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    former_branches: list[Branch] = field(default_factory=list)

    @property
    def page(self) -> str:
        """The path of its page: ``org/name``, ``datasets/org/name``, ``spaces/org/name``."""
        return _PREFIXES[self.type] + self.id

    def has_access(self, token: str | None) -> bool:
        """Whether this token may see the private repository, or read the files of the gated one."""
        return token is not None and (self.allowed is None or token in self.allowed)

    def set_branch(self, name: str, branch: Branch) -> None:
        """Give a branch new content; the old content stays readable by its commit."""
        if name in self.branches:
            self.former_branches.append(self.branches[name])
        self.branches[name] = branch

    def resolve(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a tag or a commit id; None if there is none."""
        if revision in self.branches:
            return self.branches[revision].commit()
        if revision in self.tags:
            return self.tags[revision]
        branches = [*self.branches.values(), *self.former_branches]
        return next((commit for branch in branches if (commit := branch.find(revision))), None)


class Repositories:
    """All repositories of a server: the folders below a root, found on request, and the added ones."""

    def __init__(self, root: Path | None, commits: CommitBuilder, *, private_root: bool = False) -> None:
        self._root = root
        self._commit_builder = commits
        self._private_root = private_root
        self._lock = threading.RLock()
        self._repos: dict[tuple[RepoType, str], Repo] = {}

    def find(self, repo_type: RepoType, repo_id: str) -> Repo | None:
        """Return a repository, or None if there is none of that name."""
        with self._lock:
            folder = self._folder(repo_type, repo_id)
            if folder is not None and (repo_type, repo_id) not in self._repos:
                repo = Repo(repo_type, repo_id, private=self._private_root)
                repo.set_branch("main", Branch(folder_reader(folder), self._commit_builder))
                self._repos[repo_type, repo_id] = repo
            return self._repos.get((repo_type, repo_id))

    @contextmanager
    def edit(self, repo_type: RepoType, repo_id: str) -> Iterator[Repo]:
        """Yield the repository of that name, or a new one, for a change by one thread at a time."""
        if repo_type not in _PREFIXES:
            raise ValueError(f"repo_type must be model, dataset or space, not {repo_type!r}")
        if not _is_valid(repo_id):
            raise ValueError(f"repo_id must be org/name, not {repo_id!r}")
        with self._lock:
            repo = self.find(repo_type, repo_id) or Repo(repo_type, repo_id)
            yield repo
            self._repos[repo_type, repo_id] = repo

    def all(self) -> list[Repo]:
        """Return all repositories, with the folders below the root."""
        for repo_type, prefix in _PREFIXES.items():
            for folder in sorted(self._root.glob(f"{prefix}*/*")) if self._root else []:
                self.find(repo_type, f"{folder.parent.name}/{folder.name}")
        return list(self._repos.values())

    def _folder(self, repo_type: RepoType, repo_id: str) -> Path | None:
        if self._root is None or not _is_valid(repo_id):
            return None
        folder = self._root / _PREFIXES[repo_type] / repo_id
        return folder if folder.is_dir() else None


def _is_valid(repo_id: str) -> bool:
    parts = repo_id.split("/")
    return (
        len(parts) == 2
        and parts[0] not in _RESERVED_NAMES
        and all(_NAME.fullmatch(part) and ".." not in part for part in parts)
    )
