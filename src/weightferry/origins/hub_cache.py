"""Hugging Face caches as an origin: files in them are read from disk before, or instead of, the network.

`huggingface_hub.constants` is imported inside the functions: it reads the environment variables at its import, which
must not happen before a value is needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from weightferry.errors import OriginUnreachable, SourceNotFound
from weightferry.hashing import Checksum
from weightferry.manifest import File, PinnedSource
from weightferry.origins.base import Origin, Unreachable, is_below, suggest_similar
from weightferry.origins.filesystem import read_file
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.sources import Source, safe_path

HF_HUB_OFFLINE = "HF_HUB_OFFLINE is set"
"""The usual reason not to ask the Hub, for errors."""

_DEFAULT_REVISION = "main"  # as in huggingface_hub


def is_offline() -> bool:
    """Return whether ``HF_HUB_OFFLINE`` forbids requests to the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def user_hub_cache() -> Path:
    """Return the Hugging Face cache folder of this user: ``HF_HUB_CACHE``."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE or constants.default_cache_path)


def cached_blob(hub: Path, source: Source, key: str) -> Path:
    """Return the path of a repository's content in a Hugging Face cache; `key` is the checksum of the content."""
    return hub / source.repo_folder / "blobs" / key


class HubCacheOrigin:
    """An origin that reads from Hugging Face caches; see `Origin`.

    These caches name content by its checksum, so the bytes are verified like bytes from the Hub.

    Parameters
    ----------
    folders
        The cache folders, in the order in which they are searched.
    reason
        Why the Hub is not asked, for errors.
    """

    def __init__(self, folders: Sequence[Path], reason: str = HF_HUB_OFFLINE) -> None:
        self._folders, self._reason = folders, reason

    @classmethod
    def replacing_the_hub(
        cls,
        folders: Sequence[Path],
        reason: str = HF_HUB_OFFLINE,
        create_other: Callable[[str, Settings], Origin] = origin_for,
    ) -> Callable[[str, Settings], Origin]:
        """Return a factory of origins that uses `folders` instead of the Hub, and `create_other` for other schemes."""

        def create(scheme: str, settings: Settings) -> Origin:
            return cls(folders, reason) if scheme == "hf" else create_other(scheme, settings)

        return create

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`. The files of a commit are those of all its snapshots in `folders` together."""
        repos = [folder / source.repo_folder for folder in self._folders]
        revision = safe_path(source.revision or _DEFAULT_REVISION)
        commit = next((commit for repo in repos if (commit := _find_commit(repo, revision))), "")
        files: dict[str, File | None] = {}
        for repo in repos if commit else ():
            for name, file in _list_snapshot(repo / "snapshots" / commit).items():
                files[name] = files.get(name) or file
        requested = {name: file for name, file in files.items() if any(is_below(name, path) for path in paths)}
        if all(any(is_below(name, path) for name in requested) for path in paths):
            cached = tuple(file for _, file in sorted(requested.items()) if file)
            if len(cached) == len(requested):
                return PinnedSource(source, commit, cached)
            without_content = ", ".join(name for name, file in requested.items() if file is None)
            raise OriginUnreachable(
                f"{self._reason}, and the cache lacks the content of {without_content}", subject=str(source)
            )
        missing = self._describe_missing(source, revision, paths, list(files))
        raise OriginUnreachable(f"{self._reason}, and {missing}")

    def _describe_missing(self, source: Source, revision: str, paths: Sequence[str], names: list[str]) -> str:
        folders = ", ".join(map(str, self._folders))
        if names:
            path = next((path for path in paths if not any(is_below(name, path) for name in names)), "")
            return f"{path!r} of {source} at {revision} is not in {folders}{suggest_similar(path, names)}"
        repos = [folder / source.repo_folder for folder in self._folders]
        if refs := [ref.name for repo in repos for ref in (repo / "refs").glob("*")]:
            return f"revision {revision!r} of {source} is not in {folders}, which have {', '.join(refs)}"
        known = [repo_id for folder in self._folders for repo_id in _list_repo_ids(folder)]
        return f"{source} is not in {folders}{suggest_similar(source.root, known)}"

    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """See `Origin.read`."""
        file = pinned.file(path)
        for folder in self._folders:
            blob = cached_blob(folder, pinned.source, file.key)
            with contextlib.suppress(OSError):
                if blob.stat().st_size == file.size:
                    return read_file(blob, start, stop)
        raise SourceNotFound("no longer in the Hugging Face cache", subject=f"{pinned.name}/{path}")

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`. It always fails: the survey has already found the files in these caches."""
        raise Unreachable(f"{self._reason}, so no request is sent to the Hub", subject=str(source))

    def close(self) -> None:
        """See `Origin.close`."""


def _find_commit(repo: Path, revision: str) -> str:
    """Return the commit of a branch, a tag or a commit; empty if the cache does not have it."""
    with contextlib.suppress(OSError, ValueError):
        commit = (repo / "refs" / revision).read_text().strip()
        return commit if commit.isalnum() else ""
    return revision if revision.isalnum() and (repo / "snapshots" / revision).is_dir() else ""


def _list_snapshot(snapshot: Path) -> dict[str, File | None]:
    """Return the files of a snapshot by path; None for a broken link, whose content was removed."""
    files: dict[str, File | None] = {}
    for folder, _, names in os.walk(snapshot):
        for name in names:
            path = Path(folder, name)
            inside = path.relative_to(snapshot).as_posix()
            if checksum := Checksum.parse(path.resolve().name):
                try:
                    files[inside] = File(inside, path.stat().st_size, checksum)
                except OSError:
                    files[inside] = None
                except ValueError:
                    pass  # not a valid path in a source
    return files


def _list_repo_ids(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return ["/".join(entry.name.split("--")[1:]) for entry in folder.iterdir() if "--" in entry.name]
    return []
