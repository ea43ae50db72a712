"""Hugging Face caches as an origin: what they hold is read there before the network is, or instead of it.

huggingface_hub reads its variables when its constants are imported: not before somebody asks for one.
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
from weightferry.origins.base import Origin, Unreachable, is_below, origin_for, suggest_similar
from weightferry.origins.filesystem import read_file
from weightferry.settings import Settings
from weightferry.sources import Source, safe_path

_DEFAULT_REVISION = "main"  # huggingface_hub's own


def is_offline() -> bool:
    """Whether the user wants no request to the Hub: ``HF_HUB_OFFLINE``."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def user_hub_cache() -> Path:
    """The Hugging Face cache of this user: ``HF_HUB_CACHE``."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE or constants.default_cache_path)


def cached_blob(hub: Path, source: Source, key: str) -> Path:
    """Where a Hugging Face cache has content of a repository."""
    return hub / source.repo_folder / "blobs" / key


class HubCacheOrigin:
    """An origin of what Hugging Face caches hold; see `Origin`.

    Names of content are its checksums there, so what is read is compared like what comes from the Hub.

    Parameters
    ----------
    folders
        In the order in which they are asked.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    @classmethod
    def replacing_the_hub(cls, folders: Sequence[Path]) -> Callable[[str, Settings], Origin]:
        """Return what makes origins that ask `folders` where others would ask the Hub."""

        def make(scheme: str, settings: Settings) -> Origin:
            return cls(folders) if scheme == "hf" else origin_for(scheme, settings)

        return make

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`: a commit is what all snapshots of it show together, all that was ever wanted."""
        repos = [folder / source.repo_folder for folder in self._folders]
        revision = safe_path(source.revision or _DEFAULT_REVISION)
        commit = next((commit for repo in repos if (commit := _commit(repo, revision))), "")
        files: dict[str, File | None] = {}
        for repo in repos if commit else ():
            for name, file in _shown(repo / "snapshots" / commit).items():
                files[name] = files.get(name) or file
        wanted = {name: file for name, file in files.items() if any(is_below(name, path) for path in paths)}
        if all(any(is_below(name, path) for name in wanted) for path in paths):
            there = tuple(file for _, file in sorted(wanted.items()) if file)
            if len(there) == len(wanted):
                return PinnedSource(source, commit, there)
            lost = ", ".join(name for name, file in wanted.items() if file is None)
            raise OriginUnreachable(f"HF_HUB_OFFLINE is set, and the content is gone of {lost}", subject=str(source))
        raise OriginUnreachable(f"HF_HUB_OFFLINE is set, and {self._lacking(source, revision, paths, list(files))}")

    def _lacking(self, source: Source, revision: str, paths: Sequence[str], there: list[str]) -> str:
        where = ", ".join(map(str, self._folders))
        lost = next((path for path in paths if not any(is_below(name, path) for name in there)), "")
        if there:
            return f"{lost!r} is not among what {where} have of {source} at {revision}{suggest_similar(lost, there)}"
        repos = [folder / source.repo_folder for folder in self._folders]
        if refs := [ref.name for repo in repos for ref in (repo / "refs").glob("*")]:
            return f"of {source} there is no revision {revision!r} in {where}, which have {', '.join(refs)}"
        known = [name for folder in self._folders for name in _names_in(folder)]
        return f"{source} is not in {where}{suggest_similar(source.root, known)}"

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
        raise SourceNotFound("not there any more", subject=f"{pinned.name}/{path}")

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`: what is there was found in the survey."""
        raise Unreachable("HF_HUB_OFFLINE is set", subject=str(source))

    def close(self) -> None:
        """See `Origin.close`."""


def _commit(repo: Path, revision: str) -> str:
    """The commit of a branch, a tag or a commit; empty when it is not there."""
    with contextlib.suppress(OSError, ValueError):
        commit = (repo / "refs" / revision).read_text().strip()
        return commit if commit.isalnum() else ""
    return revision if revision.isalnum() and (repo / "snapshots" / revision).is_dir() else ""


def _shown(snapshot: Path) -> dict[str, File | None]:
    """What a snapshot shows, by its name; None for links that lead nowhere."""
    files: dict[str, File | None] = {}
    for above, _, names in os.walk(snapshot):
        for name in names:
            path = Path(above, name)
            inside = path.relative_to(snapshot).as_posix()
            if checksum := Checksum.parse(path.resolve().name):
                try:
                    files[inside] = File(inside, path.stat().st_size, checksum)
                except OSError:
                    files[inside] = None
                except ValueError:
                    pass  # a name that no source may have
    return files


def _names_in(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return ["/".join(entry.name.split("--")[1:]) for entry in folder.iterdir() if "--" in entry.name]
    return []
