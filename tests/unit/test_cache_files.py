"""The cache: paths, links, publishing, and which files count as complete."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from tests.unit.doubles import SOURCE, hub_source, manifest_of, pin, surveyor_of
from weightferry.cache import verified_notes
from weightferry.cache.atomic import replace_symlink, write_atomically
from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport
from weightferry.cache.partial_cleanup import remove_expired
from weightferry.cache.publish import link_snapshot, publish
from weightferry.cache.survey import DomainSurvey, is_complete, known_sha256
from weightferry.cache.verified_notes import is_verified, note_verified
from weightferry.errors import BadRequest
from weightferry.hashing import Checksum
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.sources import Source
from weightferry.testing.origin import FakeOrigin

SHA = "ab" * 32
COMMIT = "c0" * 20
FILE = File("onnx/m.bin", 3, Checksum("sha256", SHA))


def pinned(source: Source, *files: File, commit: str = COMMIT) -> PinnedSource:
    return PinnedSource(source, commit, files or (FILE,))


def surveyed(layout: CacheLayout, manifest: Manifest) -> DomainSurvey:
    surveyor = surveyor_of(layout, manifest)
    try:
        return surveyor.survey()
    finally:
        surveyor.release()


class TestLayout:
    @pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
    @pytest.mark.parametrize("repo_id", ["org/name", "gpt2", "a.b-c_d/e.f"])
    def test_folders_are_those_of_huggingface_hub(self, repo_type: str, repo_id: str) -> None:
        layout = CacheLayout(Path("/cache"))
        here = pinned(hub_source(root=repo_id, repo_type=repo_type))
        folder = Path("/cache/hub") / repo_folder_name(repo_id=repo_id, repo_type=repo_type)
        assert layout.hub == Path("/cache/hub")
        assert layout.repo(here) == folder
        assert layout.blob(here, FILE) == folder / "blobs" / SHA
        assert layout.snapshot(here) == folder / "snapshots" / COMMIT
        assert layout.pointer(here, FILE) == folder / "snapshots" / COMMIT / "onnx" / "m.bin"

    def test_the_lock_is_that_of_huggingface_hub(self) -> None:
        # file_download.py: os.path.join(cache_dir, ".locks", repo_folder_name(...), f"{etag}.lock")
        name = repo_folder_name(repo_id="org/model", repo_type="model")
        lock = CacheLayout(Path(HF_HUB_CACHE).parent).lock(pinned(hub_source()), FILE)
        assert lock == Path(HF_HUB_CACHE) / ".locks" / name / f"{SHA}.lock"

    @pytest.mark.parametrize(
        ("revision", "name"), [(None, "main"), ("main", "main"), ("v1.0", "v1.0"), ("refs/pr/1", "refs/pr/1")]
    )
    def test_refs(self, revision: str | None, name: str) -> None:
        here = pinned(hub_source(revision))
        assert CacheLayout(Path("/c")).ref(here) == Path("/c/hub/models--org--model/refs") / name

    def test_a_commit_and_other_sources_have_no_ref(self) -> None:
        layout = CacheLayout(Path("/c"))
        assert layout.ref(pinned(hub_source(COMMIT))) is None
        assert layout.ref(pinned(SOURCE)) is None

    def test_a_revision_cannot_leave_the_cache(self) -> None:
        with pytest.raises(BadRequest):
            CacheLayout(Path("/c")).ref(pinned(hub_source("../../../etc")))

    def test_other_sources_have_their_own_folder(self) -> None:
        layout, here = (
            CacheLayout(Path("/c")),
            pinned(Source("https", "https://host:8/a b/v1", query="X-Amz-Date=1&id=7")),
        )
        folder = layout.repo(here)
        assert folder.parent == Path("/c/objects")
        assert folder.name.startswith("https--host--8--a--b--v1--")
        assert layout.lock(here, FILE) == Path("/c/objects/.locks") / folder.name / f"{SHA}.lock"
        assert layout.sha256_note(here, FILE) == folder / "sha256" / SHA

    def test_one_source_has_one_folder(self) -> None:
        layout = CacheLayout(Path("/c"))

        def folder(root: str, query: str = "") -> Path:
            return layout.repo(pinned(Source("https", root, query=query)))

        signed = folder("https://host/a", "X-Amz-Signature=1&X-Amz-Date=2")
        assert signed == folder("https://host/a", "X-Amz-Signature=8&X-Amz-Date=9") == folder("https://host/a")
        assert folder("https://user:pw@host/a") == signed
        assert folder("https://host/a", "id=1") != folder("https://host/a", "id=2") != signed
        assert folder("https://host/" + "x" * 300) != folder("https://host/" + "x" * 301)
        assert len(folder("https://host/" + "x" * 300).name) < 200

    def test_local_sources_are_used_in_place(self) -> None:
        here = pinned(Source("file", "/data/model"), commit="")
        assert here.in_place
        assert CacheLayout(Path("/c")).snapshot(here) == Path("/data/model")
        assert CacheLayout(Path("/c")).pointer(here, FILE) == Path("/data/model/onnx/m.bin")

    def test_new_partial_paths_are_unique(self) -> None:
        layout, here = CacheLayout(Path("/c")), pinned(hub_source())
        names = {layout.new_partial(here, FILE) for _ in range(100)}
        assert len(names) == 100
        assert {name.parent for name in names} == {layout.partial / "models--org--model"}
        assert layout.partial_of(here, FILE) == Path("/c/partial/models--org--model") / SHA


class TestReplaceSymlink:
    def test_parents_are_made(self, tmp_path: Path) -> None:
        replace_symlink(tmp_path / "a/b/link", "target")
        assert os.readlink(tmp_path / "a/b/link") == "target"

    @pytest.mark.parametrize("existing", ["file", "link", "dangling", "link to a folder"])
    def test_an_existing_file_or_link_is_replaced(self, tmp_path: Path, existing: str) -> None:
        link = tmp_path / "link"
        if existing == "file":
            link.write_text("old")
        else:
            link.symlink_to({"link": __file__, "dangling": "nowhere", "link to a folder": str(tmp_path)}[existing])
        replace_symlink(link, "target")
        assert os.readlink(link) == "target"
        assert list(tmp_path.iterdir()) == [link]

    def test_a_right_link_is_not_touched(self, tmp_path: Path) -> None:
        replace_symlink(tmp_path / "link", "target")
        before = (tmp_path / "link").lstat()
        replace_symlink(tmp_path / "link", Path("target"))
        after = (tmp_path / "link").lstat()
        assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)

    def test_a_folder_is_not_removed(self, tmp_path: Path) -> None:
        (tmp_path / "link").mkdir()
        with pytest.raises(BadRequest, match="folder is in the way"):
            replace_symlink(tmp_path / "link", "target")
        assert (tmp_path / "link").is_dir()
        assert len(list(tmp_path.iterdir())) == 1

    def test_long_names(self, tmp_path: Path) -> None:
        name = "日" * 85  # 255 bytes, the limit of a file name
        replace_symlink(tmp_path / name, "target")
        assert (tmp_path / name).is_symlink()

    def test_the_link_always_exists_while_threads_replace_it(self, tmp_path: Path) -> None:
        targets = [tmp_path / f"t{number}" for number in range(4)]
        for target in targets:
            target.write_text("content")
        link, over, missed = tmp_path / "link", threading.Event(), []
        replace_symlink(link, targets[0])

        def hammer(number: int) -> None:
            while not over.is_set():
                number = (number + 1) % len(targets)
                replace_symlink(link, targets[number])

        def read() -> None:
            while not over.is_set():
                try:
                    assert link.read_text() == "content"
                except (OSError, AssertionError) as error:
                    missed.append(error)

        threads = [threading.Thread(target=hammer, args=(n,)) for n in range(4)] + [threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        over.set()
        for thread in threads:
            thread.join()
        assert missed == []
        assert {path.name for path in tmp_path.iterdir()} == {"link", "t0", "t1", "t2", "t3"}


class TestWriteAtomically:
    def test_new_with_parents_and_again(self, tmp_path: Path) -> None:
        path = tmp_path / "refs/refs/pr/1"
        write_atomically(path, "one")
        first = path.stat()
        write_atomically(path, "one")
        assert path.stat().st_ino == first.st_ino, "unchanged content is not written again"
        write_atomically(path, "two")
        assert path.read_text() == "two"
        assert list(path.parent.iterdir()) == [path]

    def test_invalid_content_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "ref").write_bytes(b"\xff\xfe\x00")
        write_atomically(tmp_path / "ref", "main")
        assert (tmp_path / "ref").read_text() == "main"

    def test_a_failed_write_keeps_the_old_content(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_atomically(tmp_path / "ref", "old")

        def full(path: Path, _: bytes) -> None:
            path.touch()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("weightferry.cache.atomic.write_new", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(tmp_path / "ref", "new")
        assert (tmp_path / "ref").read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 1


class TestPublishAndSurvey:
    def put(self, layout: CacheLayout, manifest: Manifest, content: bytes) -> tuple[PinnedSource, File]:
        here, file = next(manifest.staged())
        partial = layout.new_partial(here, file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        publish(layout, here, file, partial, hashlib.sha256(content).hexdigest())
        assert not partial.exists()
        return here, file

    def test_a_published_file_is_complete(self, layout: CacheLayout) -> None:
        manifest = manifest_of(FakeOrigin({"m.bin": b"abc"}))
        assert surveyed(layout, manifest).complete == {}
        self.put(layout, manifest, b"abc")
        assert surveyed(layout, manifest).complete == {0: hashlib.sha256(b"abc").hexdigest()}

    @pytest.mark.parametrize("publishes", ["sha256", "git-sha1", None])
    @pytest.mark.parametrize("torn", [b"", b"ab", b"abcd"])
    def test_a_file_of_wrong_size_is_not_complete(self, layout: CacheLayout, publishes, torn: bytes) -> None:
        manifest = manifest_of(FakeOrigin({"m.bin": b"abc"}, publishes=publishes))
        self.put(layout, manifest, torn)
        assert surveyed(layout, manifest).complete == {}

    def test_a_git_blob_with_wrong_bytes_is_not_complete(self, layout: CacheLayout) -> None:
        manifest = manifest_of(FakeOrigin({"m.bin": b"abc"}, publishes="git-sha1"))
        here, file = self.put(layout, manifest, b"abX")
        assert is_complete(layout, here, file), "the size is right"
        assert known_sha256(layout, here, file) is None
        assert surveyed(layout, manifest).complete == {}
        self.put(layout, manifest, b"abc")
        assert surveyed(layout, manifest).complete == {0: hashlib.sha256(b"abc").hexdigest()}

    @pytest.mark.parametrize("kind", ["folder", "dangling link", "fifo"])
    def test_only_a_regular_file_is_complete(self, layout: CacheLayout, kind: str) -> None:
        manifest = manifest_of(FakeOrigin({"m.bin": b""}))
        blob = layout.blob(*next(manifest.staged()))
        blob.parent.mkdir(parents=True)
        {"folder": blob.mkdir, "dangling link": lambda: blob.symlink_to("no"), "fifo": lambda: os.mkfifo(blob)}[kind]()
        assert surveyed(layout, manifest).complete == {}

    def test_the_digest_is_recorded_when_the_origin_publishes_none(self, layout: CacheLayout) -> None:
        manifest = manifest_of(FakeOrigin({"m.bin": b"abc"}, publishes=None))
        here, file = self.put(layout, manifest, b"abc")
        assert surveyed(layout, manifest).complete == {0: hashlib.sha256(b"abc").hexdigest()}
        layout.sha256_note(here, file).unlink()
        assert surveyed(layout, manifest).complete == {0: ""}, "complete, with unknown digest"

    def test_link_snapshot(self, layout: CacheLayout) -> None:
        manifest = manifest_of(FakeOrigin({"a/b/m.bin": b"abc"}), hub_source())
        here, file = self.put(layout, manifest, b"abc")
        link_snapshot(layout, here)
        link_snapshot(layout, here)
        pointer = layout.pointer(here, file)
        assert pointer.read_bytes() == b"abc"
        assert os.readlink(pointer) == f"../../../../blobs/{file.key}", (
            "relative: the cache may be moved or mounted elsewhere"
        )
        assert (layout.repo(here) / "refs/main").read_text() == here.commit

    def test_remove_expired(self, layout: CacheLayout) -> None:
        here = pin(FakeOrigin({"m.bin": b"abc", "n.bin": b"x"}))
        old, new, other = (layout.new_partial(here, here.files[number]) for number in (0, 0, 1))
        old.parent.mkdir(parents=True)
        for path in (old, new, other):
            path.write_bytes(b"part")
        for path in (old, other):
            os.utime(path, (time.time() - 100, time.time() - 100))
        remove_expired(layout, (), 50, LockSupport())
        assert not old.exists()
        assert new.exists()
        assert not other.exists(), "no later job may need that file"


def test_a_big_file_is_hashed_again_when_it_changed(tmp_path: Path) -> None:
    """The right size and name do not prove the content."""
    content = b"right" * 300_000
    checksum = Checksum("sha256", hashlib.sha256(content).hexdigest())
    here = PinnedSource(hub_source(), "0" * 40, (File("w.bin", len(content), checksum),))
    layout, file = CacheLayout(tmp_path), here.files[0]
    partial = layout.new_partial(here, file)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content)
    publish(layout, here, file, partial, checksum.hexdigest)
    assert layout.verified_note(here, file).exists()
    assert known_sha256(layout, here, file) == checksum.hexdigest
    layout.blob(here, file).write_bytes(b"wrong" * 300_000)
    assert known_sha256(layout, here, file) is None
    assert surveyed(layout, Manifest((here,))).complete == {}
    # A file that another program wrote is hashed once, then trusted while it does not change.
    layout.blob(here, file).write_bytes(content)
    assert known_sha256(layout, here, file) == checksum.hexdigest
    assert is_verified(layout, here, file)


def test_a_crash_of_the_machine_invalidates_notes(layout: CacheLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    here, file = next(manifest_of(FakeOrigin({"m.bin": b"abc"})).staged())
    blob = layout.blob(here, file)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"abc")
    note_verified(layout, here, file)
    assert is_verified(layout, here, file)
    monkeypatch.setattr(verified_notes, "boot_id", lambda: "the next kernel")
    assert not is_verified(layout, here, file)


@pytest.mark.parametrize(("path", "owned"), [("hub/x", True), ("objects", True), ("partial/y", True), ("links", False)])
def test_folders_that_the_cache_owns(tmp_path: Path, path: str, owned: bool) -> None:
    assert CacheLayout(tmp_path / "cache").owns(tmp_path / "cache" / path) is owned
    assert not CacheLayout(tmp_path / "cache").owns(tmp_path / path)
