"""Every path in a cache folder. No other module builds such a path.

::

    CACHE/
      hub/            a valid Hugging Face cache (HF_HUB_CACHE may point here)
        models--org--name/{blobs/KEY, snapshots/COMMIT/PATH -> ../../blobs/KEY, refs/REVISION}
        .locks/models--org--name/KEY.lock      huggingface_hub uses the same lock names
      objects/        the same structure for every other source
        https--host--folder--DIGEST/{blobs, snapshots, sha256/KEY}
        .locks/...
      partial/        incomplete files, each with its journal; no file here has its final name
      verified/       notes about content that was hashed since it last changed
      manifests/      by source and commit: what the Hub said about the files of the commit, a file for each answer
      used/           by source: COMMIT, touched when it is staged; NAME.lock, held by each process that uses it;
                      NAME.keep, the mark of a pinned source
      space.lock      held by the leader that makes room and reserves space
      no-flock        why flock does not work here, once two machines held one lock at the same time
      probe.lock      locked briefly, to test whether flock excludes other processes
      identity        a random name of this cache, the same for every job that uses it
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

from weightferry.manifest import File, PinnedSource
from weightferry.sources import safe_path

_OWN_FOLDERS = ("hub", "objects", "partial", "verified", "manifests", "used")


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
        """The Hugging Face cache in this cache; ``HF_HUB_CACHE`` may point to it."""
        return self.root / "hub"

    def _source_root(self, pinned: PinnedSource) -> Path:
        return self.hub if pinned.source.scheme == "hf" else self.root / "objects"

    def _folder_name(self, pinned: PinnedSource) -> str:
        source = pinned.source
        if source.scheme == "hf":
            return source.repo_folder
        # The first part is for people to read; the digest makes the name unique.
        readable = re.sub(r"[^A-Za-z0-9._-]+", "--", source.identity.partition("?")[0])[:80]
        return f"{readable}--{hashlib.sha256(source.identity.encode()).hexdigest()[:16]}"

    def own_folders(self) -> tuple[Path, ...]:
        """Return the folders that only the cache may write to."""
        return tuple(self.root / name for name in _OWN_FOLDERS)

    def source_roots(self) -> tuple[Path, Path]:
        """Return the two folders that contain the folders of sources."""
        return self.hub, self.root / "objects"

    def repo(self, pinned: PinnedSource) -> Path:
        """Return the folder of one source, with all its commits."""
        return self._source_root(pinned) / self._folder_name(pinned)

    @staticmethod
    def blobs(repo: Path) -> Path:
        """Return the folder with the content of the source whose folder is `repo`."""
        return repo / "blobs"

    @staticmethod
    def snapshots(repo: Path) -> Path:
        """Return the folder with one subfolder for each commit of the source whose folder is `repo`."""
        return repo / "snapshots"

    @staticmethod
    def refs(repo: Path) -> Path:
        """Return the folder with the branches of the source whose folder is `repo`."""
        return repo / "refs"

    @staticmethod
    def sha256_of(repo: Path, blob: str) -> Path:
        """Return the file that records the SHA-256 of a content whose origin publishes no checksum."""
        return repo / "sha256" / blob

    @property
    def verified(self) -> Path:
        """The folder with all notes about verified content."""
        return self.root / "verified"

    def verified_of(self, repo: Path) -> Path:
        """Return the folder with the notes about verified content of one source."""
        return self.verified / repo.name

    def blob(self, pinned: PinnedSource, file: File) -> Path:
        """Return the final path of a file's content."""
        return self.blobs(self.repo(pinned)) / file.key

    def snapshot(self, pinned: PinnedSource) -> Path:
        """Return the folder in which a commit's files have their own names; for local sources the source itself."""
        if pinned.in_place:
            return Path(pinned.source.root)
        return self.snapshots(self.repo(pinned)) / pinned.commit

    def pointer(self, pinned: PinnedSource, file: File) -> Path:
        """Return the link in the snapshot that points to a file's content."""
        return self.snapshot(pinned) / file.path

    def ref(self, pinned: PinnedSource) -> Path | None:
        """Return the file that names the commit of a branch; None for sources without branches and for a commit id."""
        revision = pinned.source.revision or "main"
        if pinned.source.scheme != "hf" or revision == pinned.commit:
            return None
        return self.refs(self.repo(pinned)) / safe_path(revision)

    def lock(self, pinned: PinnedSource, file: File) -> Path:
        """Return the lock of a file's content; huggingface_hub takes the same lock."""
        return self._source_root(pinned) / ".locks" / self._folder_name(pinned) / f"{file.key}.lock"

    def sha256_note(self, pinned: PinnedSource, file: File) -> Path:
        """Return the file that records the SHA-256 of a file whose origin publishes no checksum."""
        return self.sha256_of(self.repo(pinned), file.key)

    def verified_note(self, pinned: PinnedSource, file: File) -> Path:
        """Return the note that a big file was hashed and its checksum matched."""
        return self.verified_of(self.repo(pinned)) / file.key

    @property
    def partial(self) -> Path:
        """The folder of all partial data."""
        return self.root / "partial"

    def owns(self, path: Path) -> bool:
        """Whether `path`, with links resolved, lies in a folder that only the cache may write to."""
        resolved = path.resolve()
        return any(resolved.is_relative_to(folder.resolve()) for folder in self.own_folders())

    def partial_of(self, pinned: PinnedSource, file: File) -> Path:
        """Return the path of a file's partial data.

        Only the process that holds the lock of the content writes there. The next holder resumes from it.
        """
        return self.partial / self._folder_name(pinned) / file.key

    def new_partial(self, pinned: PinnedSource, file: File) -> Path:
        """Return an unused path for partial data, for a process without the lock: it shares the path with no other."""
        return self.partial_of(pinned, file).with_name(f"{file.key}.{secrets.token_hex(8)}")

    def partial_locks(self, path: Path) -> tuple[Path, ...]:
        """Return the locks of the partial data at `path`; empty for a path from `new_partial`.

        The process that downloads this data holds one of them.
        """
        if "." in path.name:
            return ()
        return tuple(root / ".locks" / path.parent.name / f"{path.name}.lock" for root in self.source_roots())

    def small_files_partial(self, pinned: PinnedSource) -> Path:
        """Return the file that reserves the space of all small files of a source until they are published."""
        return self.partial / self._folder_name(pinned) / "small-files"

    def small_files_lock(self, pinned: PinnedSource) -> Path:
        """Return the lock of all small files of a source together."""
        return self._source_root(pinned) / ".locks" / self._folder_name(pinned) / "small-files.lock"

    def manifests(self, folder: str) -> Path:
        """Return the folder with the manifests of all commits of a source; `folder` is the name of its folder."""
        return self.root / "manifests" / folder

    def manifests_of_commit(self, folder: str, commit: str) -> Path:
        """Return the folder with the answers of the Hub about one commit of a source."""
        return self.manifests(folder) / commit

    def manifest(self, folder: str, commit: str, question: str) -> Path:
        """Return the file with one answer of the Hub; `question` is a digest of the revision and paths it is about."""
        return self.manifests_of_commit(folder, commit) / f"{question}.json"

    def used_lock(self, folder: str) -> Path:
        """Return the lock that every process holds while it uses a source; `folder` is the name of its folder."""
        return self.root / "used" / f"{folder}.lock"

    def used_notes(self, folder: str) -> Path:
        """Return the folder with the notes about when commits of a source were last staged."""
        return self.root / "used" / folder

    def used_note(self, folder: str, commit: str) -> Path:
        """Return the file whose modification time is when a commit of a source was last staged."""
        return self.used_notes(folder) / commit

    def pin_mark(self, folder: str) -> Path:
        """Return the file that protects a source from eviction while it exists."""
        return self.root / "used" / f"{folder}.keep"

    @property
    def probe_lock(self) -> Path:
        """The file that is locked to test whether `flock` excludes other processes."""
        return self.root / "probe.lock"

    @property
    def no_flock(self) -> Path:
        """The file that says why `flock` does not work in this cache; it exists once that was seen."""
        return self.root / "no-flock"

    @property
    def space_lock(self) -> Path:
        """The lock for counting content, evicting and reserving space: one leader at a time."""
        return self.root / "space.lock"

    @property
    def identity_file(self) -> Path:
        """The file with the random name of this cache, the same for all processes that see it."""
        return self.root / "identity"
