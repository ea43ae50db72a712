"""Every path in a cache folder; nobody else joins strings into one.

::

    CACHE/
      hub/            a valid Hugging Face cache (HF_HUB_CACHE may point here)
        models--org--name/{blobs/KEY, snapshots/COMMIT/PATH -> ../../blobs/KEY, refs/REVISION}
        .locks/models--org--name/KEY.lock      the name that huggingface_hub uses too
      objects/        the same shape for every other source
        https--host--folder--DIGEST/{blobs, snapshots, sha256/KEY}
        .locks/...
      partial/        what is not whole yet, each with its journal; nothing in here has its final name
      verified/       notes on content that was hashed since it last changed
      used/           by source: COMMIT, touched whenever it is staged; NAME.lock, held by whoever uses it; NAME.keep
      space.lock      held by whoever makes room and takes space
      no-flock        why flock means nothing here, once two machines were seen to hold one lock at once
      probe.lock      locked for a moment, to see whether locks exclude
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

from weightferry.manifest import File, PinnedSource
from weightferry.sources import safe_path

_OWN_FOLDERS = ("hub", "objects", "partial", "verified", "used")


class CacheLayout:
    """The paths of one cache folder.

    Parameters
    ----------
    root
        The cache folder; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"CacheLayout({str(self.root)!r})"

    @property
    def hub(self) -> Path:
        """What ``HF_HUB_CACHE`` may be set to."""
        return self.root / "hub"

    def _family(self, pinned: PinnedSource) -> Path:
        return self.hub if pinned.source.scheme == "hf" else self.root / "objects"

    def _folder_name(self, pinned: PinnedSource) -> str:
        source = pinned.source
        if source.scheme == "hf":
            return source.repo_folder
        # Readable first, unique by the digest.
        readable = re.sub(r"[^A-Za-z0-9._-]+", "--", source.identity.partition("?")[0])[:80]
        return f"{readable}--{hashlib.sha256(source.identity.encode()).hexdigest()[:16]}"

    def own_folders(self) -> tuple[Path, ...]:
        """The folders that only the cache may write to."""
        return tuple(self.root / name for name in _OWN_FOLDERS)

    def families(self) -> tuple[Path, Path]:
        """The folders that hold sources."""
        return self.hub, self.root / "objects"

    def repo(self, pinned: PinnedSource) -> Path:
        """The folder of one source, all its commits."""
        return self._family(pinned) / self._folder_name(pinned)

    @staticmethod
    def blobs(repo: Path) -> Path:
        """The folder of the content of a source, whose own folder is `repo`; as in the next ones."""
        return repo / "blobs"

    @staticmethod
    def snapshots(repo: Path) -> Path:
        """The folder of what shows its commits."""
        return repo / "snapshots"

    @staticmethod
    def refs(repo: Path) -> Path:
        """The folder of its branches."""
        return repo / "refs"

    @staticmethod
    def sha256_of(repo: Path, blob: str) -> Path:
        """Where the SHA-256 of a content is kept whose origin publishes no checksum."""
        return repo / "sha256" / blob

    @property
    def verified(self) -> Path:
        """The folder of all notes on content that was found right."""
        return self.root / "verified"

    def verified_of(self, repo: Path) -> Path:
        """The folder of the notes on its content that was found right."""
        return self.verified / repo.name

    def blob(self, pinned: PinnedSource, file: File) -> Path:
        """Where the content of a file gets its final name."""
        return self.blobs(self.repo(pinned)) / file.key

    def snapshot(self, pinned: PinnedSource) -> Path:
        """The folder that shows one commit under the files' own names; for local sources the source itself."""
        if pinned.in_place:
            return Path(pinned.source.root)
        return self.snapshots(self.repo(pinned)) / pinned.commit

    def pointer(self, pinned: PinnedSource, file: File) -> Path:
        """The link to a file's content in the snapshot."""
        return self.snapshot(pinned) / file.path

    def ref(self, pinned: PinnedSource) -> Path | None:
        """The file that says which commit a branch is at; None where there are no branches, or for a commit itself."""
        revision = pinned.source.revision or "main"
        if pinned.source.scheme != "hf" or revision == pinned.commit:
            return None
        return self.refs(self.repo(pinned)) / safe_path(revision)

    def lock(self, pinned: PinnedSource, file: File) -> Path:
        """The lock that huggingface_hub takes for the same content."""
        return self._family(pinned) / ".locks" / self._folder_name(pinned) / f"{file.key}.lock"

    def sha256_note(self, pinned: PinnedSource, file: File) -> Path:
        """Where the SHA-256 of a file is kept whose origin publishes no checksum."""
        return self.sha256_of(self.repo(pinned), file.key)

    def verified_note(self, pinned: PinnedSource, file: File) -> Path:
        """Where it is noted that a big file was hashed and found right."""
        return self.verified_of(self.repo(pinned)) / file.key

    @property
    def partial(self) -> Path:
        """The folder of all partial data."""
        return self.root / "partial"

    def owns(self, path: Path) -> bool:
        """Whether `path` lies, links followed, in a folder that only the cache may write to."""
        below = path.resolve()
        return any(below.is_relative_to(folder.resolve()) for folder in self.own_folders())

    def partial_of(self, pinned: PinnedSource, file: File) -> Path:
        """Where whoever holds the lock on a file's content keeps its partial data, and finds what a killed one left."""
        return self.partial / self._folder_name(pinned) / file.key

    def new_partial(self, pinned: PinnedSource, file: File) -> Path:
        """A name for partial data that nobody else uses: without the lock, writers must still not meet."""
        return self.partial_of(pinned, file).with_name(f"{file.key}.{secrets.token_hex(8)}")

    def locks_of_partial(self, path: Path) -> tuple[Path, ...]:
        """The locks one of which is held by whoever brings the partial data at `path`; none for `new_partial`."""
        if "." in path.name:
            return ()
        return tuple(family / ".locks" / path.parent.name / f"{path.name}.lock" for family in self.families())

    def small_partial(self, pinned: PinnedSource) -> Path:
        """What takes the space of all small files of a source until they are there."""
        return self.partial / self._folder_name(pinned) / "small-files"

    def small_lock(self, pinned: PinnedSource) -> Path:
        """The lock on all small files of a source together."""
        return self._family(pinned) / ".locks" / self._folder_name(pinned) / "small-files.lock"

    def used_lock(self, folder: str) -> Path:
        """The lock that every process holds that uses a source; `folder` is the name of its folder."""
        return self.root / "used" / f"{folder}.lock"

    def used_notes(self, folder: str) -> Path:
        """The folder of the files whose times tell when commits of a source were last staged."""
        return self.root / "used" / folder

    def used_note(self, folder: str, commit: str) -> Path:
        """The file whose time tells when a commit of a source was last staged."""
        return self.used_notes(folder) / commit

    def pin_mark(self, folder: str) -> Path:
        """The file that keeps a source from being evicted."""
        return self.root / "used" / f"{folder}.keep"

    @property
    def probe(self) -> Path:
        """A file on which it is tried whether locks exclude."""
        return self.root / "probe.lock"

    @property
    def no_flock(self) -> Path:
        """Says why `flock` means nothing here, once that was seen."""
        return self.root / "no-flock"

    @property
    def space_lock(self) -> Path:
        """The lock on counting what is there, making room and taking space: one leader at a time."""
        return self.root / "space.lock"

    @property
    def identity(self) -> Path:
        """The file that names this cache, the same for all who see it."""
        return self.root / "identity"
