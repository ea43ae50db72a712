"""What single kinds of origins do beside the contract."""

from __future__ import annotations

import os
import socket
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem

from tests.contract.places import FolderPlace, HttpPlace, made, meaning, read, resolve
from weightferry.errors import AccessDenied, BadRequest, CollectError, OriginError, SourceChanged, SourceNotFound
from weightferry.origins.base import RangeIgnored, Silent, TransientOriginError, Unreachable, origin_for
from weightferry.settings import Settings
from weightferry.sources import Source
from weightferry.testing.origin import FakeOrigin, Fault

BIG = bytes(range(256)) * 400
FILES = {"config.json": b'{"a": 1}', "weights.safetensors": BIG}


class TestHttp:
    """What only plain web servers do."""

    @pytest.fixture
    def http(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpPlace]:
        there: HttpPlace = made(HttpPlace, tmp_path, monkeypatch)
        there.put(FILES)
        yield there
        there.close()

    def test_a_url_signed_for_get_alone(self, http: HttpPlace) -> None:
        http.web.methods = {"GET"}
        pinned = resolve(http, "weights.safetensors")
        assert pinned.files[0].size == len(BIG)
        assert read(http, pinned, "weights.safetensors") == BIG

    def test_ranges_that_are_ignored(self, http: HttpPlace) -> None:
        pinned = resolve(http, "weights.safetensors")
        http.web.ranges = False
        with pytest.raises(RangeIgnored):
            read(http, pinned, "weights.safetensors", 5)
        assert read(http, pinned, "weights.safetensors") == BIG

    def test_one_question_where_the_answer_tells_of_ranges(self, http: HttpPlace) -> None:
        assert resolve(http, "config.json").files[0].ranges
        assert [method for method, _, _ in http.web.seen] == ["HEAD"]

    @pytest.mark.parametrize("accepts", [None, "none"])
    @pytest.mark.parametrize("ranges", [True, False])
    def test_ranges_are_tried_where_it_does_not(self, http: HttpPlace, accepts: str | None, ranges: bool) -> None:
        http.web.accepts, http.web.ranges = accepts, ranges
        (file,) = resolve(http, "weights.safetensors").files
        assert (file.ranges, file.size) == (ranges, len(BIG))
        assert [headers.get("Range") for _, _, headers in http.web.seen] == [None, "bytes=0-0"]

    @pytest.mark.parametrize("ranges", [True, False])
    @pytest.mark.parametrize("path", FILES)
    def test_a_size_that_only_get_tells(self, http: HttpPlace, path: str, ranges: bool) -> None:
        http.web.sizes, http.web.ranges = False, ranges
        (file,) = resolve(http, path).files
        assert (file.ranges, file.size) == (ranges, len(FILES[path]))

    @pytest.mark.parametrize("methods", [{"HEAD", "GET"}, {"GET"}])
    def test_an_empty_file_has_no_first_byte(self, http: HttpPlace, methods: set[str]) -> None:
        http.put({"empty": b""})
        http.web.methods, http.web.accepts = methods, None
        pinned = resolve(http, "empty")
        assert pinned.files[0].size == 0
        assert read(http, pinned, "empty") == b""

    @pytest.mark.parametrize("etags", [True, False])
    @pytest.mark.parametrize("new", [BIG[:1000], BIG + b"x", b"y" * len(BIG)])
    def test_a_file_that_changed_between_two_ranges(self, http: HttpPlace, new: bytes, etags: bool) -> None:
        http.web.etags = etags
        pinned = resolve(http, "weights.safetensors")
        assert read(http, pinned, "weights.safetensors", 0, 5000) == BIG[:5000]
        http.put({"weights.safetensors": new})
        if not etags and len(new) == len(BIG):
            return  # nothing tells; the nodes compare what they got
        with pytest.raises(SourceChanged):
            read(http, pinned, "weights.safetensors", 5000, 9000)

    def test_a_precondition_that_failed(self, http: HttpPlace) -> None:
        pinned = resolve(http, "weights.safetensors")
        http.answer(412, {})
        with pytest.raises(SourceChanged):
            read(http, pinned, "weights.safetensors", 5)

    def test_a_signed_url_is_reached_by_get(self, http: HttpPlace) -> None:
        http.web.methods = {"GET"}
        http.origin.check_access(http.source("config.json"))
        with pytest.raises(SourceNotFound):
            http.origin.check_access(http.source("gone.json"))

    @pytest.mark.parametrize("status", [403, 404, 405])
    def test_what_is_above_files_may_answer_as_it_likes(self, http: HttpPlace, status: int) -> None:
        http.answer(status, {})
        http.origin.check_access(replace(http.source("config.json"), path=""))

    def test_a_proxy_of_the_environment_is_used(self, http: HttpPlace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", http.web.url)
        for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        source = meaning("http://weights.invalid/a%20b/config.json")
        with closing(origin_for("http", Settings())) as origin:
            pinned = origin.resolve(source, [source.path])
            with origin.read(pinned, "config.json") as chunks:
                assert b"".join(chunks) == FILES["config.json"]

    def test_a_server_without_versions_is_asked_every_time(self, http: HttpPlace) -> None:
        http.web.etags = False
        one, two = resolve(http, "config.json"), resolve(http, "config.json")
        assert one.files[0].key != two.files[0].key, "nothing says that a cached copy is still the file"
        assert read(http, one, "config.json") == FILES["config.json"]

    def test_the_query_goes_along_and_compression_is_refused(self, http: HttpPlace) -> None:
        read(http, resolve(http, "config.json"), "config.json")
        for _, path, headers in http.web.seen:
            assert path == "/a%20b/config.json?X-Amz-Signature=planted&id=7"
            assert headers["Accept-Encoding"] == "identity"
            assert headers["Authorization"].startswith("Basic ")

    def test_a_range_that_cannot_be(self, http: HttpPlace) -> None:
        pinned = resolve(http, "config.json")
        with pytest.raises(OriginError, match="416") as raised:
            read(http, pinned, "config.json", 999)
        assert not isinstance(raised.value, TransientOriginError)

    @pytest.mark.parametrize(("text", "wait"), [("3", 3.0), ("0", 0.0), ("soon", None), ("", None)])
    def test_retry_after(self, http: HttpPlace, text: str, wait: float | None) -> None:
        http.answer(503, {"Retry-After": text})
        with pytest.raises(TransientOriginError) as raised:
            resolve(http, "config.json")
        assert raised.value.retry_after == wait

    def test_retry_after_as_a_date(self, http: HttpPlace) -> None:
        http.answer(503, {"Retry-After": formatdate(time.time() + 60, usegmt=True)})
        with pytest.raises(TransientOriginError) as raised:
            resolve(http, "config.json")
        assert raised.value.retry_after == pytest.approx(60, abs=3)

    def test_the_hubs_own_limit(self, http: HttpPlace) -> None:
        http.answer(429, {"RateLimit": '"api";r=0;t=55'})
        with pytest.raises(TransientOriginError) as raised:
            resolve(http, "config.json")
        assert raised.value.retry_after == 55


class TestChains:
    """fsspec's URLs of URLs."""

    @pytest.fixture
    def archive(self, tmp_path: Path) -> Path:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
            opened.writestr("m.bin", b"top")
            opened.writestr("sub/n.bin", b"below")
        return tmp_path / "a.zip"

    @pytest.mark.parametrize(
        ("first", "files"),
        [
            ("zip://", {"m.bin": b"top", "sub/n.bin": b"below"}),
            ("zip://sub", {"n.bin": b"below"}),
            ("zip://m.bin", {"m.bin": b"top"}),
            ("zip://sub/n.bin", {"n.bin": b"below"}),
        ],
    )
    def test_zip(self, archive: Path, first: str, files: dict[str, bytes]) -> None:
        source = meaning(f"{first}::file://{archive}")
        origin = origin_for(source.scheme, Settings())
        pinned = origin.resolve(source, [""])
        assert {file.path for file in pinned.files} == set(files)
        for path, content in files.items():
            with origin.read(pinned, path) as chunks:
                assert b"".join(chunks) == content

    def test_a_file_at_the_top(self) -> None:
        fs = fsspec.filesystem("memory")
        name = f"{uuid4().hex}.bin"
        fs.pipe_file(f"/{name}", b"x")
        try:
            pinned = origin_for("memory", Settings()).resolve(meaning(f"memory://{name}"), [""])
            assert pinned.source.root == "memory://"
            assert [file.path for file in pinned.files] == [name]
        finally:
            fs.rm(f"/{name}")


class Poor(MemoryFileSystem):  # type: ignore[misc]
    """A back end that cannot do what others can; its files are those of memory://."""

    protocol = "poor"
    error: Exception | None = None
    info_error: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.replace("poor://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if self.error:
            raise self.error
        if start:
            raise ValueError("no ranges here")
        content: bytes = super().cat_file(path, start=0, end=end, **kwargs)
        return content

    def info(self, path: str, **kwargs: Any) -> Any:
        if self.info_error:
            raise self.info_error
        return self._with_etag(super().info(path, **kwargs))

    def find(self, path: str, **kwargs: Any) -> Any:
        found = super().find(path, **kwargs)
        return {name: self._with_etag(info) for name, info in found.items()} if kwargs.get("detail") else found

    def _with_etag(self, info: dict[str, Any]) -> dict[str, Any]:
        return info | {"ETag": str(hash(self.store[info["name"]].getvalue()))} if info["type"] == "file" else info


class TestBackEnds:
    """What fsspec leaves to each back end."""

    @pytest.fixture
    def poor(self) -> Iterator[Source]:
        fsspec.register_implementation("poor", Poor, clobber=True)
        folder = f"/{uuid4().hex}"
        Poor().pipe_file(f"{folder}/m.bin", b"0123456789")
        yield meaning(f"poor:/{folder}")
        Poor.error = Poor.info_error = None
        fsspec.filesystem("memory").rm(folder, recursive=True)

    def test_one_without_ranges(self, poor: Source) -> None:
        pinned = origin_for("poor", Settings()).resolve(poor, [""])
        assert not pinned.files[0].ranges

    def test_a_file_that_changed(self, poor: Source) -> None:
        origin = origin_for("poor", Settings())
        pinned = origin.resolve(poor, [""])
        with origin.read(pinned, "m.bin") as chunks:
            assert b"".join(chunks) == b"0123456789"
            Poor().pipe_file(f"{poor.root.removeprefix('poor:/')}/m.bin", b"abcdefghij")
        with pytest.raises(SourceChanged), origin.read(pinned, "m.bin", 0, 5) as chunks:
            b"".join(chunks)

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            (ConnectionRefusedError("no"), Unreachable),
            (socket.gaierror("no such name"), Unreachable),
            (TimeoutError(), Silent),
            (FSTimeoutError(), Silent),
            (ConnectionResetError("cut"), TransientOriginError),
            (RuntimeError("EndpointConnectionError of some library"), TransientOriginError),
            (PermissionError("no"), AccessDenied),
            (FileNotFoundError("gone"), SourceNotFound),
        ],
    )
    def test_errors(self, poor: Source, theirs: Exception, ours: type[CollectError]) -> None:
        origin = origin_for("poor", Settings())
        pinned = origin.resolve(poor, [""])
        Poor.error = Poor.info_error = theirs
        with pytest.raises(ours) as raised, origin.read(pinned, "m.bin") as chunks:
            next(chunks)
        assert type(raised.value) is ours
        with pytest.raises(ours):
            origin.check_access(poor)


class TestFake:
    """What tests of other parts can make of it."""

    def test_one_without_ranges(self) -> None:
        origin = FakeOrigin(FILES, ranges=False)
        pinned = origin.resolve(meaning("fake://bucket"), [""])
        assert {file.ranges for file in pinned.files} == {False}
        with pytest.raises(RangeIgnored), origin.read(pinned, "config.json", 1):
            pass
        with origin.read(pinned, "config.json") as chunks:
            assert b"".join(chunks) == FILES["config.json"]

    def test_silence(self) -> None:
        origin = FakeOrigin(FILES)
        pinned = origin.resolve(meaning("fake://bucket"), [""])
        origin.faults.append(Fault(silent_after=3))
        with origin.read(pinned, "config.json") as chunks:
            assert next(chunks) == FILES["config.json"][:3]
            with pytest.raises(Silent):
                next(chunks)

    def test_one_that_is_not_reached(self) -> None:
        origin, source = FakeOrigin(FILES), meaning("fake://bucket")
        origin.faults.append(Fault(on="reach", error=Unreachable("nobody there")))
        with pytest.raises(Unreachable):
            origin.check_access(source)
        origin.check_access(source)
        assert origin.access_checks == [source, source]
        origin.close()
        assert origin.closed == 1


class TestFolder:
    """What only local folders have."""

    def test_links_that_lead_nowhere_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = made(FolderPlace, tmp_path, monkeypatch)
        place.put(FILES)
        (place.root / "broken").symlink_to("gone")
        with pytest.raises(SourceNotFound, match="leads nowhere, to gone"):
            resolve(place, "broken")
        # Within a folder it is left to those who want it: they find it missing.
        assert resolve(place, "").file("broken").size is None

    def test_a_fifo_is_never_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = made(FolderPlace, tmp_path, monkeypatch)
        place.put(FILES)
        os.mkfifo(place.root / "pipe")
        with pytest.raises(BadRequest, match="neither a file nor a folder"):
            resolve(place, "")

    def test_a_folder_that_may_not_be_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = made(FolderPlace, tmp_path, monkeypatch)
        place.put(FILES)

        def refuse(path: str) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
        with pytest.raises(AccessDenied, match="Permission denied"):
            resolve(place, "")
