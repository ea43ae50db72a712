"""The manifests of staged commits: what is kept, how answers are joined, and that nothing is made of their gaps."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.doubles import hub_source
from weightferry.cache.evict import evict, remove_source
from weightferry.cache.inventory import list_sources
from weightferry.cache.layout import CacheLayout
from weightferry.cache.manifests import read_listings, record_listing
from weightferry.hashing import Checksum
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.origins.listing import KnownListings, Listing, is_commit_id
from weightferry.phases.publish import publish
from weightferry.phases.resolve import limit_listing

OLD, NEW = "a" * 40, "b" * 40
SOURCE = hub_source()


def file(path: str, content: bytes = b"") -> File:
    return File(path, len(content), Checksum("sha256", hashlib.sha256(content).hexdigest()))


def listing(
    *names: str, paths: tuple[str, ...] = ("",), commit: str = OLD, revision: str | None = None, time: float = 1.0
) -> Listing:
    """What the Hub said about `paths`: these files."""
    files = tuple(file(name, name.encode()) for name in names)
    return Listing(PinnedSource(hub_source(revision), commit, files), paths, time)


def known(*listings: Listing) -> KnownListings:
    return KnownListings(lambda _: (), listings)


def names(found: Listing | None) -> list[str]:
    assert found is not None
    return [file.path for file in found.restricted().pinned.files]


class TestJoin:
    def test_answers_for_different_paths_of_a_commit_add_up(self) -> None:
        answers = known(
            listing("config.json", paths=("config.json",)),
            listing("w/a.bin", "w/b.bin", paths=("w",), revision=OLD, time=0.0),
        )
        found = answers.find(SOURCE, ["w", "config.json"])
        assert found is not None
        assert found.paths == ("w", "config.json")
        assert (found.pinned.source, found.pinned.commit, found.time) == (SOURCE, OLD, 1.0)
        assert sorted(names(found)) == ["config.json", "w/a.bin", "w/b.bin"]
        assert names(answers.find(SOURCE, ["w/b.bin"])) == ["w/b.bin"], "a file below a folder that is known"

    def test_the_gaps_of_an_answer_are_not_an_answer(self) -> None:
        answers = known(listing("config.json", paths=("config.json",)))
        found = answers.find(SOURCE, ["config.json", "w", "", "config.jso"])
        assert found is not None
        assert found.paths == ("config.json",), "nothing is known of w, of the whole, or of a name that begins alike"

    def test_what_a_full_listing_lacks_does_not_exist(self) -> None:
        found = known(listing("config.json")).find(SOURCE, ["w"])
        assert found is not None
        assert found.paths == ("w",)
        assert names(found) == []

    @pytest.mark.parametrize("order", [1, -1])
    def test_the_branch_is_where_it_was_seen_last(self, order: int) -> None:
        answers = [
            listing("old", commit=OLD, time=1.0),
            listing("new", commit=NEW, time=2.0),
            listing("old", commit=OLD, revision=OLD, time=0.0),
            listing("old", commit=OLD, revision="other", time=9.0),
        ][::order]
        assert names(known(*answers).find(SOURCE, [""])) == ["new"]
        assert names(known(*answers).find(hub_source("main"), [""])) == ["new"], "the default branch"
        assert names(known(*answers).find(hub_source(OLD), [""])) == ["old"]
        assert known(*answers).find(hub_source("dev"), [""]) is None
        assert known(*answers).revisions(SOURCE) == ["main", "other"]

    def test_two_commits_of_one_moment(self) -> None:
        answers = [listing("a", commit=OLD), listing("b", commit=NEW)]
        assert names(known(*answers).find(SOURCE, [""])) == names(known(*answers[::-1]).find(SOURCE, [""])) == ["b"]

    def test_an_older_commit_does_not_fill_the_gaps_of_a_newer_one(self) -> None:
        answers = known(listing("w/a.bin"), listing("c", paths=("c",), commit=NEW, time=2.0))
        found = answers.find(SOURCE, ["w"])
        assert found is not None
        assert (found.pinned.commit, found.paths) == (NEW, ())

    def test_another_repository_is_another_source(self) -> None:
        answers = known(listing("a"))
        assert answers.find(hub_source(root="org/other"), [""]) is None
        assert answers.find(hub_source(repo_type="dataset"), [""]) is None


@pytest.mark.parametrize(("revision", "full"), [(OLD, True), (None, False), ("main", False), ("abcdef1", False)])
def test_only_a_full_id_never_moves(revision: str | None, full: bool) -> None:
    assert is_commit_id(revision) is full
    assert not is_commit_id(OLD.upper())
    assert not is_commit_id(OLD + "\n")


def test_a_huge_listing_does_not_travel_for_one_file() -> None:
    huge = listing(*(f"{number}.txt" for number in range(100)))
    manifest = Manifest((replace(huge.pinned, files=huge.pinned.files[:2]),))
    assert limit_listing(huge, manifest, 98) is huge
    small = limit_listing(huge, manifest, 97)
    assert names(small) == ["0.txt", "1.txt"]
    assert small.paths == ("0.txt", "1.txt"), "it is no full listing any more"


class TestCache:
    def test_what_is_recorded_is_read(self, layout: CacheLayout) -> None:
        answers = [
            listing("c", "ü/w.bin"),
            listing("c", paths=("c",), revision="v/1", time=5.5),
            replace(listing(paths=("d",)), pinned=PinnedSource(SOURCE, OLD, (File("d", None),))),
        ]
        for answer in answers:
            record_listing(layout, answer)
        assert sorted(read_listings(layout, SOURCE), key=repr) == sorted(answers, key=repr)
        assert list(read_listings(layout, hub_source(root="org/other"))) == []
        assert not layout.hub.exists(), "apart from the Hugging Face cache"

    def test_the_same_question_again_replaces_its_answer(self, layout: CacheLayout) -> None:
        record_listing(layout, listing("c", time=1.0))
        record_listing(layout, listing("c", time=2.0))
        record_listing(layout, listing("c", paths=("c",), time=3.0))
        assert sorted(answer.time for answer in read_listings(layout, SOURCE)) == [2.0, 3.0]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: "",
            lambda text: text[: len(text) // 2],
            lambda text: "[" * 100_000,
            lambda text: "null",
            lambda text: text.replace('"version": 1', '"version": 2'),
            lambda text: text.replace('"c"', '"../c"'),
            lambda text: text.replace(OLD, NEW),
            lambda text: text.replace('"size": 1', '"size": "many"'),
            lambda text: text.replace("sha256", "crc"),
        ],
    )
    def test_a_damaged_manifest_counts_as_absent(self, layout: CacheLayout, damage) -> None:
        record_listing(layout, listing("c"))
        (path,) = layout.manifests("models--org--model").rglob("*.json")
        damaged = damage(path.read_text())
        assert damaged != path.read_text()
        path.write_text(damaged)
        record_listing(layout, listing("d", paths=("d",)))
        assert [answer.paths for answer in read_listings(layout, SOURCE)] == [("d",)]
        record_listing(layout, listing("c"))
        assert len(list(read_listings(layout, SOURCE))) == 2, "it is written again"

    def test_a_manifest_in_the_wrong_repository_counts_for_none(self, layout: CacheLayout) -> None:
        record_listing(layout, listing("c"))
        layout.manifests("models--org--model").rename(layout.manifests("models--org--other"))
        other = hub_source(root="org/other")
        assert KnownListings(lambda source: read_listings(layout, source)).find(other, [""]) is None

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        record_listing(CacheLayout(tmp_path / "file"), listing("c"))


class TestEviction:
    @pytest.fixture
    def staged(self, layout: CacheLayout) -> CacheLayout:
        """Two commits as the phase publish leaves them; the older one was staged first."""
        for commit in (OLD, NEW):
            answer = listing("c", commit + ".bin", commit=commit)
            for each in answer.pinned.files:
                blob = layout.blob(answer.pinned, each)
                blob.parent.mkdir(parents=True, exist_ok=True)
                blob.write_bytes(each.path.encode())
            publish(layout, Manifest((answer.pinned,)), [answer], {})
        return layout

    def test_a_commit_goes_with_its_manifest(self, staged: CacheLayout) -> None:
        size = sum(source.size for source in list_sources(staged))
        assert [gone.commit for gone in evict(staged, size - 1)] == [OLD]
        assert [answer.pinned.commit for answer in read_listings(staged, SOURCE)] == [NEW]
        evict(staged, 0)
        assert list(read_listings(staged, SOURCE)) == []
        assert not staged.manifests("models--org--model").exists()

    def test_a_source_goes_with_all_its_manifests(self, staged: CacheLayout) -> None:
        (source,) = list_sources(staged)
        assert remove_source(staged, source)
        assert list(read_listings(staged, SOURCE)) == []
