"""The manifest and checksums: invalid values of an origin are refused, and cache names never change."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
from dataclasses import replace

import pytest

from tests.unit.doubles import SOURCE, hub_source
from weightferry.errors import BadRequest
from weightferry.hashing import Checksum, Hashes
from weightferry.manifest import File, Manifest, PinnedSource, listing_commit
from weightferry.sources import Source

SHA = hashlib.sha256(b"x").hexdigest()


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x", "a\\b", "a\0b", "", ".", "a//b", "./a", "a/"])
def test_invalid_paths(path: str) -> None:
    with pytest.raises(ValueError, match=r"relative path|normal form"):
        File(path, 1)


@pytest.mark.parametrize("commit", ["../../x", "..", "a/b", ".", "a b", "a\n"])
def test_invalid_commits(commit: str) -> None:
    with pytest.raises(ValueError, match="commit"):
        PinnedSource(SOURCE, commit, ())


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [("sha256", "../x"), ("sha256", SHA[:40]), ("git-sha1", SHA), ("sha256", SHA.upper()), ("sha256", SHA + "\n")],
)
def test_invalid_checksums(algorithm, text: str) -> None:
    with pytest.raises(ValueError, match=algorithm):
        Checksum(algorithm, text)


class TestKey:
    def test_it_is_the_checksum(self) -> None:
        assert File("a", 1, Checksum("sha256", SHA), version="7").key == SHA

    def test_without_a_checksum_it_depends_on_path_size_and_version(self) -> None:
        file = File("a", 1, version="7")
        others = [replace(file, path="b"), replace(file, size=2), replace(file, size=None), replace(file, version="8")]
        assert len({other.key for other in [file, *others]}) == 5
        assert file.key == File("a", 1, version="7").key
        assert File("../a".strip("./"), 1, version="7").key == file.key

    def test_it_never_changes(self) -> None:
        # Existing caches have these names: another rule would download every file again.
        assert File("a", 1, version="7").key == hashlib.sha256(b"a\x001\x007").hexdigest()


def test_listing_commit() -> None:
    one, two = File("a", 1, version="1"), File("b", 2, version="1")
    assert listing_commit([one, two]) == listing_commit([two, one])
    assert len({listing_commit(files) for files in ([one], [two], [one, two], [one, replace(two, version="2")])}) == 4
    assert PinnedSource(SOURCE, listing_commit([one]), (one,)).commit.isalnum()


def test_pinned_source() -> None:
    pinned = PinnedSource(hub_source("main"), "c0" * 20, (File("a", 1), File("b/c", 2)))
    assert pinned.name == f"hf://org/model@{'c0' * 20}"
    assert pinned.file("b/c").size == 2
    with pytest.raises(KeyError):
        pinned.file("b")
    signed = PinnedSource(Source("https", "https://user:pw@h/d", "x", query="X-Amz-Signature=s1gn"), "", ())
    assert signed.name == "https://h/d"


def test_manifest() -> None:
    local = PinnedSource(Source("file", "/data"), "", (File("x", 5),))
    remote = PinnedSource(SOURCE, "", (File("y", 7), File("z", None)))
    manifest = Manifest((local, remote))
    assert list(manifest.staged()) == [(remote, remote.files[0]), (remote, remote.files[1])]
    assert manifest.size == 12
    assert pickle.loads(pickle.dumps(manifest)) == manifest


class TestHashes:
    def test_git_computes_the_same_id(self, tmp_path) -> None:
        (tmp_path / "f").write_bytes(b"some content\n")
        try:
            answer = subprocess.run(["git", "hash-object", tmp_path / "f"], capture_output=True, text=True, check=True)
        except FileNotFoundError:
            pytest.skip("needs git: apt-get install git")
        checksum = Checksum("git-sha1", answer.stdout.strip())
        assert Hashes(checksum, 13).update_from(tmp_path / "f").matches

    def test_in_several_updates(self) -> None:
        hashes = Hashes(Checksum("sha256", hashlib.sha256(b"abc").hexdigest()), 3)
        for part in (b"a", b"", b"bc"):
            assert not hashes.matches
            hashes.update(part)
        assert hashes.matches
        assert hashes.sha256 == hashes.hexdigest == hashlib.sha256(b"abc").hexdigest()
        hashes.update(b"d")
        assert not hashes.matches

    def test_without_a_checksum_everything_matches(self) -> None:
        assert Hashes().matches


def test_bad_requests_are_value_errors() -> None:
    assert issubclass(BadRequest, ValueError)
