"""Contract tests of all origins: a new origin is complete when it passes them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.backends import (
    FakeBackend,
    FolderBackend,
    HttpBackend,
    HubBackend,
    MemoryBackend,
    OriginBackend,
    create_backend,
    read,
    resolve,
)
from weightferry.errors import AccessDenied, BadRequest, CollectError, OriginError, SourceChanged, SourceNotFound
from weightferry.hashing import Hashes
from weightferry.manifest import PinnedSource
from weightferry.origins.base import Busy, TransientOriginError, Unreachable

BIG = bytes(range(256)) * 400
FILES = {"config.json": b'{"a": 1}', "empty.txt": b"", "weights.safetensors": BIG}
SUBFOLDER = {"onnx/model.bin": b"onnx" * 9, "onnx/deep/notes.md": b"# notes"}
ODD = ["a b.bin", "grüße-日本.bin", "x+y.bin", "100%.bin", "50%25.bin", "#1.bin", "q?a=b&c.bin", "it's (1) [x]*.bin"]


def fixture(*kinds: type) -> Any:
    """Return a fixture that yields a backend of each of these kinds, with the test files in it."""

    def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        created = create_backend(request.param, tmp_path, monkeypatch)
        created.put(FILES | (SUBFOLDER if created.lists else {}))
        yield created
        created.close()

    return pytest.fixture(params=kinds, ids=lambda kind: kind.__name__)(backend)


backend = fixture(HubBackend, HttpBackend, FolderBackend, MemoryBackend, FakeBackend)
# http cannot list folders.
listing = fixture(HubBackend, FolderBackend, MemoryBackend, FakeBackend)
# The fake has the same files for all roots.
with_root = fixture(HubBackend, FolderBackend, MemoryBackend)
# Folders are used in place, so their content has no name in a cache.
cached = fixture(HubBackend, HttpBackend, MemoryBackend, FakeBackend)
# A commit never changes; every rank checks a folder; memory:// has no versions.
versioned = fixture(HttpBackend, FakeBackend)
failing = fixture(HubBackend, HttpBackend, FakeBackend)
served = fixture(HubBackend, HttpBackend)


def take(backend: Any, pinned: PinnedSource, path: str, into: bytearray) -> None:
    with backend.origin.read(pinned, path) as chunks:
        for chunk in chunks:
            into += chunk


class TestResolve:
    def test_files(self, backend: OriginBackend) -> None:
        pinned = resolve(backend, *FILES)
        assert {file.path: file.size for file in pinned.files} == {path: len(FILES[path]) for path in FILES}
        assert pinned.source.root == backend.source().root
        assert pinned.commit != "" or pinned.in_place

    def test_only_the_requested_files(self, backend: OriginBackend) -> None:
        assert [file.path for file in resolve(backend, "config.json").files] == ["config.json"]

    def test_published_checksums_match(self, backend: OriginBackend) -> None:
        for file in resolve(backend, *FILES).files:
            hashes = Hashes(file.checksum, file.size)
            hashes.update(FILES[file.path])
            assert hashes.matches

    def test_resolving_twice_gives_equal_results(self, backend: OriginBackend) -> None:
        assert resolve(backend, *FILES) == resolve(backend, *FILES)

    def test_new_content_has_a_new_commit_and_key(self, cached: OriginBackend) -> None:
        before = resolve(cached, "config.json")
        cached.put({"config.json": b'{"a": 22}'})
        after = resolve(cached, "config.json")
        assert after.commit != before.commit
        assert after.files[0].key != before.files[0].key

    def test_the_whole_root(self, listing: OriginBackend) -> None:
        pinned = resolve(listing, "")
        assert {file.path: file.size for file in pinned.files} == {p: len(c) for p, c in (FILES | SUBFOLDER).items()}

    def test_a_folder(self, listing: OriginBackend) -> None:
        assert {file.path for file in resolve(listing, "onnx").files} == set(SUBFOLDER)
        assert {file.path for file in resolve(listing, "onnx/deep", "config.json").files} == {
            "onnx/deep/notes.md",
            "config.json",
        }

    def test_a_root_that_is_one_file(self, backend: OriginBackend) -> None:
        source = backend.source("config.json")
        pinned = backend.origin.resolve(source, [source.path])
        assert pinned.source.path in ("config.json", source.path)
        assert [file.path for file in pinned.files] == ["config.json"]
        assert read(backend, pinned, "config.json") == FILES["config.json"]

    @pytest.mark.parametrize("path", ["confg.json", "config.json/x", "nothing/there.bin", "onn"])
    def test_a_missing_path(self, backend: OriginBackend, path: str) -> None:
        with pytest.raises(SourceNotFound) as raised:
            resolve(backend, "config.json", path)
        assert path.rpartition("/")[2] in raised.value.subject + str(raised.value)

    def test_a_missing_root(self, with_root: OriginBackend) -> None:
        root = with_root.source()
        gone = type(root)(root.scheme, f"{root.root}x", repo_type=root.repo_type)
        with pytest.raises(SourceNotFound):
            with_root.origin.resolve(gone, [""])


class TestRead:
    @pytest.mark.parametrize("path", FILES)
    def test_the_whole_file(self, backend: OriginBackend, path: str) -> None:
        assert read(backend, resolve(backend, path), path) == FILES[path]

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 1), (1, None), (100, 200), (100, len(BIG)), (len(BIG) - 1, None), (0, len(BIG)), (0, None)],
    )
    def test_ranges(self, backend: OriginBackend, start: int, stop: int | None) -> None:
        pinned = resolve(backend, "weights.safetensors")
        assert read(backend, pinned, "weights.safetensors", start, stop) == BIG[start:stop]

    def test_ranges_of_small_files(self, backend: OriginBackend) -> None:
        assert read(backend, resolve(backend, "config.json"), "config.json", 2, 5) == FILES["config.json"][2:5]

    @pytest.mark.parametrize("name", ODD)
    def test_odd_names(self, backend: OriginBackend, name: str) -> None:
        names = [name] if not backend.lists else [name, f"sub {name}/{name}"]
        backend.put({path: path.encode() for path in names})
        pinned = resolve(backend, *names)
        assert sorted(file.path for file in pinned.files) == sorted(names)
        for path in names:
            assert read(backend, pinned, path) == path.encode()

    def test_several_at_once(self, backend: OriginBackend) -> None:
        pinned = resolve(backend, *FILES)
        with (
            backend.origin.read(pinned, "weights.safetensors", 5) as one,
            backend.origin.read(pinned, "weights.safetensors", 9) as two,
        ):
            assert b"".join(two) == BIG[9:]
            assert b"".join(one) == BIG[5:]

    def test_a_reader_that_stops_early(self, backend: OriginBackend) -> None:
        pinned = resolve(backend, "weights.safetensors")
        with backend.origin.read(pinned, "weights.safetensors") as chunks:
            assert next(iter(chunks))
        assert read(backend, pinned, "weights.safetensors") == BIG

    def test_an_error_of_the_reader_is_not_translated(self, backend: OriginBackend) -> None:
        # A full disk must not look like an error of the origin that can be retried.
        pinned = resolve(backend, "weights.safetensors")
        full = OSError(28, "No space left on device")
        with pytest.raises(OSError, match="No space") as raised, backend.origin.read(pinned, "weights.safetensors"):
            raise full
        assert raised.value is full

    def test_a_file_that_changed(self, versioned: OriginBackend) -> None:
        pinned = resolve(versioned, "config.json")
        versioned.put({"config.json": b"other!!!"})
        with pytest.raises(SourceChanged):
            read(versioned, pinned, "config.json")

    def test_a_removed_file(self, backend: OriginBackend) -> None:
        pinned = resolve(backend, "config.json")
        gone = PinnedSource(pinned.source, pinned.commit, (type(pinned.files[0])("gone.json", 8, version="1"),))
        with pytest.raises(SourceNotFound):
            read(backend, gone, "gone.json")


class TestCheckAccess:
    def test_the_root_and_a_file(self, backend: OriginBackend) -> None:
        backend.origin.check_access(backend.source("config.json"))
        backend.origin.check_access(replace(backend.source("config.json"), path=""))

    def test_a_single_request(self, served: Any) -> None:
        served.fail_with(503, {"Retry-After": "7"})
        with pytest.raises(TransientOriginError) as raised:
            served.origin.check_access(served.source("config.json"))
        assert raised.value.retry_after == 7
        served.origin.check_access(served.source("config.json"))

    def test_without_access(self, served: Any) -> None:
        served.fail_with(401, {})
        with pytest.raises(AccessDenied):
            served.origin.check_access(replace(served.source("config.json"), path=""))


def test_closing_twice(backend: OriginBackend) -> None:
    resolve(backend, *FILES)
    backend.origin.close()
    backend.origin.close()


class TestTransient:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    def test_status(self, failing: Any, status: int) -> None:
        pinned = resolve(failing, *FILES)
        for path in ("config.json", "weights.safetensors"):
            failing.fail_with(status, {"Retry-After": "7"})
            with pytest.raises(TransientOriginError) as raised:
                read(failing, pinned, path)
            assert raised.value.retry_after == 7
            assert isinstance(raised.value, Busy) == (status in (429, 503))
            assert str(status) in str(raised.value)
            assert read(failing, pinned, path) == FILES[path]

    @pytest.mark.parametrize("after", [0, 5000])
    def test_a_cut_connection_keeps_the_bytes(self, failing: Any, after: int) -> None:
        pinned = resolve(failing, "weights.safetensors")
        failing.cut_connection(after)
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
    def test_the_error_class(self, served: Any, status: int, error: type[CollectError], method: str) -> None:
        pinned = resolve(served, *FILES)
        served.fail_with(status, {}, times=2)  # http tries GET after HEAD is refused
        call = {
            "resolve": lambda: resolve(served, "config.json"),
            "read": lambda: read(served, pinned, "config.json"),
        }
        with pytest.raises(error) as raised:
            call[method]()
        assert not isinstance(raised.value, TransientOriginError)
        assert type(raised.value) is error
        if method == "read":
            assert "config.json" in raised.value.subject, "which file"

    def test_connection_refused(self, served: Any) -> None:
        pinned = resolve(served, "config.json")
        served.shut_down()
        for call in (
            lambda: resolve(served, "config.json"),
            lambda: read(served, pinned, "config.json"),
            lambda: served.origin.check_access(served.source()),
        ):
            with pytest.raises(Unreachable):
                call()

    @pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
    def test_no_text_contains_a_secret(self, served: Any, status: int, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
        caplog.set_level(0)
        pinned = resolve(served, *FILES)
        monkeypatch.setenv("HF_TOKEN", "planted-token-1234")
        path = "weights.safetensors"
        for call in (lambda: resolve(served, path), lambda: read(served, pinned, path)):
            served.fail_with(status, {}, times=2)
            with pytest.raises(CollectError) as raised:
                call()
            self.assert_hidden("".join(traceback.format_exception(raised.value)) + raised.value.subject)
            served.clear_faults()
            call()
        self.assert_hidden(caplog.text)

    def assert_hidden(self, text: str) -> None:
        for secret in ("planted", "pa55w0rd"):
            assert secret not in text
        assert set(re.findall("Signature=(.{8})", text)) <= {"<hidden>"}


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../x", "..\\x"])
def test_a_listing_with_paths_outside_of_the_source_is_refused(name: str, tmp_path: Path, monkeypatch) -> None:
    fake, hub = create_backend(FakeBackend, tmp_path, monkeypatch), create_backend(HubBackend, tmp_path, monkeypatch)
    try:
        hub.put({"x": b""})
        info = hub.origin._api.repo_info("org/model", files_metadata=True)
        info.siblings[0].rfilename = name
        monkeypatch.setattr(hub.origin._api, "repo_info", lambda *_, **__: info)
        fake.put({name: b""})
        for backend in (fake, hub):
            with pytest.raises(BadRequest, match="outside of the source; do not trust"):
                resolve(backend, "")
    finally:
        hub.close()


@pytest.mark.parametrize("sha", ["../../../etc", "", None, "A" * 40, "main"])
def test_an_invalid_commit_from_the_hub(sha: str | None, tmp_path: Path, monkeypatch) -> None:
    hub = create_backend(HubBackend, tmp_path, monkeypatch)
    try:
        hub.put({"x": b""})
        info = hub.origin._api.repo_info("org/model", files_metadata=True)
        info.sha = sha
        monkeypatch.setattr(hub.origin._api, "repo_info", lambda *_, **__: info)
        with pytest.raises(OriginError, match="commit"):
            resolve(hub, "")
    finally:
        hub.close()
