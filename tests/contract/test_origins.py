"""What every origin must do; a new one is done when it passes here."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.places import FakePlace, FolderPlace, HttpPlace, HubPlace, MemoryPlace, Place, made, read, resolve
from weightferry.errors import AccessDenied, BadRequest, CollectError, OriginError, SourceChanged, SourceNotFound
from weightferry.hashing import Hashes
from weightferry.manifest import PinnedSource
from weightferry.origins.base import Busy, TransientOriginError, Unreachable

BIG = bytes(range(256)) * 400
FILES = {"config.json": b'{"a": 1}', "empty.txt": b"", "weights.safetensors": BIG}
BELOW = {"onnx/model.bin": b"onnx" * 9, "onnx/deep/notes.md": b"# notes"}
ODD = ["a b.bin", "grüße-日本.bin", "x+y.bin", "100%.bin", "50%25.bin", "#1.bin", "q?a=b&c.bin", "it's (1) [x]*.bin"]


def fixture(*kinds: type) -> Any:
    """Make a fixture that gives each of these kinds of places, with the files in it."""

    def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        there = made(request.param, tmp_path, monkeypatch)
        there.put(FILES | (BELOW if there.lists else {}))
        yield there
        there.close()

    return pytest.fixture(params=kinds, ids=lambda kind: kind.__name__)(place)


place = fixture(HubPlace, HttpPlace, FolderPlace, MemoryPlace, FakePlace)
listing = fixture(HubPlace, FolderPlace, MemoryPlace, FakePlace)  # http has no folders
rooted = fixture(HubPlace, FolderPlace, MemoryPlace)  # one dict serves all roots of the fake
kept = fixture(HubPlace, HttpPlace, MemoryPlace, FakePlace)  # folders are used in place: no names for their content
noticing = fixture(HttpPlace, FakePlace)  # a commit never changes; a folder is compared by every rank; memory:// cannot
failing = fixture(HubPlace, HttpPlace, FakePlace)
served = fixture(HubPlace, HttpPlace)


def take(place: Any, pinned: PinnedSource, path: str, into: bytearray) -> None:
    with place.origin.read(pinned, path) as chunks:
        for chunk in chunks:
            into += chunk


class TestResolve:
    def test_files(self, place: Place) -> None:
        pinned = resolve(place, *FILES)
        assert {file.path: file.size for file in pinned.files} == {path: len(FILES[path]) for path in FILES}
        assert pinned.source.root == place.source().root
        assert pinned.commit != "" or pinned.in_place

    def test_only_what_was_asked(self, place: Place) -> None:
        assert [file.path for file in resolve(place, "config.json").files] == ["config.json"]

    def test_published_checksums_are_right(self, place: Place) -> None:
        for file in resolve(place, *FILES).files:
            hashes = Hashes(file.checksum, file.size)
            hashes.update(FILES[file.path])
            assert hashes.matches

    def test_the_same_again_has_the_same_names(self, place: Place) -> None:
        assert resolve(place, *FILES) == resolve(place, *FILES)

    def test_another_content_has_another_name(self, kept: Place) -> None:
        before = resolve(kept, "config.json")
        kept.put({"config.json": b'{"a": 22}'})
        after = resolve(kept, "config.json")
        assert after.commit != before.commit
        assert after.files[0].key != before.files[0].key

    def test_the_whole(self, listing: Place) -> None:
        pinned = resolve(listing, "")
        assert {file.path: file.size for file in pinned.files} == {p: len(c) for p, c in (FILES | BELOW).items()}

    def test_a_folder(self, listing: Place) -> None:
        assert {file.path for file in resolve(listing, "onnx").files} == set(BELOW)
        assert {file.path for file in resolve(listing, "onnx/deep", "config.json").files} == {
            "onnx/deep/notes.md",
            "config.json",
        }

    def test_a_root_that_is_one_file(self, place: Place) -> None:
        source = place.source("config.json")
        pinned = place.origin.resolve(source, [source.path])
        assert pinned.source.path in ("config.json", source.path)
        assert [file.path for file in pinned.files] == ["config.json"]
        assert read(place, pinned, "config.json") == FILES["config.json"]

    @pytest.mark.parametrize("path", ["confg.json", "config.json/x", "nothing/there.bin", "onn"])
    def test_what_is_missing(self, place: Place, path: str) -> None:
        with pytest.raises(SourceNotFound) as raised:
            resolve(place, "config.json", path)
        assert path.rpartition("/")[2] in raised.value.subject + str(raised.value)

    def test_a_missing_root(self, rooted: Place) -> None:
        root = rooted.source()
        gone = type(root)(root.scheme, f"{root.root}x", repo_type=root.repo_type)
        with pytest.raises(SourceNotFound):
            rooted.origin.resolve(gone, [""])


class TestRead:
    @pytest.mark.parametrize("path", FILES)
    def test_whole(self, place: Place, path: str) -> None:
        assert read(place, resolve(place, path), path) == FILES[path]

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 1), (1, None), (100, 200), (100, len(BIG)), (len(BIG) - 1, None), (0, len(BIG)), (0, None)],
    )
    def test_ranges(self, place: Place, start: int, stop: int | None) -> None:
        pinned = resolve(place, "weights.safetensors")
        assert read(place, pinned, "weights.safetensors", start, stop) == BIG[start:stop]

    def test_ranges_of_small_files(self, place: Place) -> None:
        assert read(place, resolve(place, "config.json"), "config.json", 2, 5) == FILES["config.json"][2:5]

    @pytest.mark.parametrize("name", ODD)
    def test_odd_names(self, place: Place, name: str) -> None:
        names = [name] if not place.lists else [name, f"sub {name}/{name}"]
        place.put({path: path.encode() for path in names})
        pinned = resolve(place, *names)
        assert sorted(file.path for file in pinned.files) == sorted(names)
        for path in names:
            assert read(place, pinned, path) == path.encode()

    def test_several_at_once(self, place: Place) -> None:
        pinned = resolve(place, *FILES)
        with (
            place.origin.read(pinned, "weights.safetensors", 5) as one,
            place.origin.read(pinned, "weights.safetensors", 9) as two,
        ):
            assert b"".join(two) == BIG[9:]
            assert b"".join(one) == BIG[5:]

    def test_stopping_half_way(self, place: Place) -> None:
        pinned = resolve(place, "weights.safetensors")
        with place.origin.read(pinned, "weights.safetensors") as chunks:
            assert next(iter(chunks))
        assert read(place, pinned, "weights.safetensors") == BIG

    def test_an_error_of_the_reader_is_left_alone(self, place: Place) -> None:
        # A full disk must not look like an origin that may be asked again.
        pinned = resolve(place, "weights.safetensors")
        full = OSError(28, "No space left on device")
        with pytest.raises(OSError, match="No space") as raised, place.origin.read(pinned, "weights.safetensors"):
            raise full
        assert raised.value is full

    def test_a_file_that_changed(self, noticing: Place) -> None:
        pinned = resolve(noticing, "config.json")
        noticing.put({"config.json": b"other!!!"})
        with pytest.raises(SourceChanged):
            read(noticing, pinned, "config.json")

    def test_a_file_that_went_away(self, place: Place) -> None:
        pinned = resolve(place, "config.json")
        gone = PinnedSource(pinned.source, pinned.commit, (type(pinned.files[0])("gone.json", 8, version="1"),))
        with pytest.raises(SourceNotFound):
            read(place, gone, "gone.json")


class TestReach:
    def test_the_root_and_a_file(self, place: Place) -> None:
        place.origin.check_access(place.source("config.json"))
        place.origin.check_access(replace(place.source("config.json"), path=""))

    def test_no_more_than_one_question(self, served: Any) -> None:
        served.answer(503, {"Retry-After": "7"})
        with pytest.raises(TransientOriginError) as raised:
            served.origin.check_access(served.source("config.json"))
        assert raised.value.retry_after == 7
        served.origin.check_access(served.source("config.json"))

    def test_without_the_right_to_read(self, served: Any) -> None:
        served.answer(401, {})
        with pytest.raises(AccessDenied):
            served.origin.check_access(replace(served.source("config.json"), path=""))


def test_closing_twice(place: Place) -> None:
    resolve(place, *FILES)
    place.origin.close()
    place.origin.close()


class TestTransient:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    def test_status(self, failing: Any, status: int) -> None:
        pinned = resolve(failing, *FILES)
        for path in ("config.json", "weights.safetensors"):
            failing.answer(status, {"Retry-After": "7"})
            with pytest.raises(TransientOriginError) as raised:
                read(failing, pinned, path)
            assert raised.value.retry_after == 7
            assert isinstance(raised.value, Busy) == (status in (429, 503))
            assert str(status) in str(raised.value)
            assert read(failing, pinned, path) == FILES[path]

    @pytest.mark.parametrize("after", [0, 5000])
    def test_a_cut_body_keeps_what_came(self, failing: Any, after: int) -> None:
        pinned = resolve(failing, "weights.safetensors")
        failing.cut(after)
        got = bytearray()
        with pytest.raises(TransientOriginError):
            take(failing, pinned, "weights.safetensors", got)
        assert got == BIG[: len(got)]
        assert len(got) <= after
        assert bytes(got) + read(failing, pinned, "weights.safetensors", len(got)) == BIG


class TestStatus:
    @pytest.mark.parametrize(
        ("status", "error"),
        [(401, AccessDenied), (403, AccessDenied), (404, SourceNotFound), (410, SourceNotFound), (418, OriginError)],
    )
    @pytest.mark.parametrize("method", ["resolve", "read"])
    def test_it_has_its_class(self, served: Any, status: int, error: type[CollectError], method: str) -> None:
        pinned = resolve(served, *FILES)
        served.answer(status, {}, times=2)  # http asks again with GET where HEAD is refused
        call = {"resolve": lambda: resolve(served, "config.json"), "read": lambda: read(served, pinned, "config.json")}
        with pytest.raises(error) as raised:
            call[method]()
        assert not isinstance(raised.value, TransientOriginError)
        assert type(raised.value) is error
        if method == "read":
            assert "config.json" in raised.value.subject, "which file"

    def test_nobody_there(self, served: Any) -> None:
        pinned = resolve(served, "config.json")
        served.shut()
        for call in (
            lambda: resolve(served, "config.json"),
            lambda: read(served, pinned, "config.json"),
            lambda: served.origin.check_access(served.source()),
        ):
            with pytest.raises(Unreachable):
                call()

    @pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
    def test_no_secret_in_any_text(self, served: Any, status: int, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
        caplog.set_level(0)
        pinned = resolve(served, *FILES)
        monkeypatch.setenv("HF_TOKEN", "planted-token-1234")
        path = "weights.safetensors"
        for call in (lambda: resolve(served, path), lambda: read(served, pinned, path)):
            served.answer(status, {}, times=2)
            with pytest.raises(CollectError) as raised:
                call()
            self.assert_hidden("".join(traceback.format_exception(raised.value)) + raised.value.subject)
            served.heal()
            call()
        self.assert_hidden(caplog.text)

    def assert_hidden(self, text: str) -> None:
        for secret in ("planted", "pa55w0rd"):
            assert secret not in text
        assert set(re.findall("Signature=(.{8})", text)) <= {"<hidden>"}


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../x", "..\\x"])
def test_an_origin_that_lists_climbing_names_is_refused(name: str, tmp_path: Path, monkeypatch) -> None:
    fake, hub = made(FakePlace, tmp_path, monkeypatch), made(HubPlace, tmp_path, monkeypatch)
    try:
        hub.put({"x": b""})
        info = hub.origin._api.repo_info("org/model", files_metadata=True)
        info.siblings[0].rfilename = name
        monkeypatch.setattr(hub.origin._api, "repo_info", lambda *_, **__: info)
        fake.put({name: b""})
        for place in (fake, hub):
            with pytest.raises(BadRequest, match="climbs out of the source: refused"):
                resolve(place, "")
    finally:
        hub.close()


@pytest.mark.parametrize("sha", ["../../../etc", "", None, "A" * 40, "main"])
def test_a_hub_that_answers_with_a_commit_that_is_none(sha: str | None, tmp_path: Path, monkeypatch) -> None:
    hub = made(HubPlace, tmp_path, monkeypatch)
    try:
        hub.put({"x": b""})
        info = hub.origin._api.repo_info("org/model", files_metadata=True)
        info.sha = sha
        monkeypatch.setattr(hub.origin._api, "repo_info", lambda *_, **__: info)
        with pytest.raises(OriginError, match="commit"):
            resolve(hub, "")
    finally:
        hub.close()
