"""Tests for one kind of origin each, in addition to the contract tests."""

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

from tests.contract.backends import FolderBackend, HttpBackend, create_backend, parse, read, resolve
from weightferry.errors import AccessDenied, BadRequest, CollectError, OriginError, SourceChanged, SourceNotFound
from weightferry.origins.base import RangeIgnored, Silent, TransientOriginError, Unreachable
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.sources import Source
from weightferry.testing.origin import FakeOrigin, Fault

BIG = bytes(range(256)) * 400
FILES = {"config.json": b'{"a": 1}', "weights.safetensors": BIG}


class TestHttp:
    """Behaviour of plain web servers."""

    @pytest.fixture
    def http(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpBackend]:
        created: HttpBackend = create_backend(HttpBackend, tmp_path, monkeypatch)
        created.put(FILES)
        yield created
        created.close()

    def test_a_url_signed_for_get_alone(self, http: HttpBackend) -> None:
        http.web.methods = {"GET"}
        pinned = resolve(http, "weights.safetensors")
        assert pinned.files[0].size == len(BIG)
        assert read(http, pinned, "weights.safetensors") == BIG

    def test_a_server_that_ignores_ranges(self, http: HttpBackend) -> None:
        pinned = resolve(http, "weights.safetensors")
        http.web.ranges = False
        with pytest.raises(RangeIgnored):
            read(http, pinned, "weights.safetensors", 5)
        assert read(http, pinned, "weights.safetensors") == BIG

    def test_one_request_if_ranges_are_announced(self, http: HttpBackend) -> None:
        assert resolve(http, "config.json").files[0].ranges
        assert [method for method, _, _ in http.web.requests] == ["HEAD"]

    @pytest.mark.parametrize("accepts", [None, "none"])
    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_range_is_tried_otherwise(self, http: HttpBackend, accepts: str | None, ranges: bool) -> None:
        http.web.accepts, http.web.ranges = accepts, ranges
        (file,) = resolve(http, "weights.safetensors").files
        assert (file.ranges, file.size) == (ranges, len(BIG))
        assert [headers.get("Range") for _, _, headers in http.web.requests] == [None, "bytes=0-0"]

    @pytest.mark.parametrize("ranges", [True, False])
    @pytest.mark.parametrize("path", FILES)
    def test_a_size_that_only_get_returns(self, http: HttpBackend, path: str, ranges: bool) -> None:
        http.web.sizes, http.web.ranges = False, ranges
        (file,) = resolve(http, path).files
        assert (file.ranges, file.size) == (ranges, len(FILES[path]))

    @pytest.mark.parametrize("methods", [{"HEAD", "GET"}, {"GET"}])
    def test_an_empty_file(self, http: HttpBackend, methods: set[str]) -> None:
        http.put({"empty": b""})
        http.web.methods, http.web.accepts = methods, None
        pinned = resolve(http, "empty")
        assert pinned.files[0].size == 0
        assert read(http, pinned, "empty") == b""

    @pytest.mark.parametrize("etags", [True, False])
    @pytest.mark.parametrize("new", [BIG[:1000], BIG + b"x", b"y" * len(BIG)])
    def test_a_file_that_changed_between_two_ranges(self, http: HttpBackend, new: bytes, etags: bool) -> None:
        http.web.etags = etags
        pinned = resolve(http, "weights.safetensors")
        assert read(http, pinned, "weights.safetensors", 0, 5000) == BIG[:5000]
        http.put({"weights.safetensors": new})
        if not etags and len(new) == len(BIG):
            return  # the server gives no sign of the change; the nodes compare their bytes
        with pytest.raises(SourceChanged):
            read(http, pinned, "weights.safetensors", 5000, 9000)

    def test_precondition_failed(self, http: HttpBackend) -> None:
        pinned = resolve(http, "weights.safetensors")
        http.fail_with(412, {})
        with pytest.raises(SourceChanged):
            read(http, pinned, "weights.safetensors", 5)

    def test_access_to_a_signed_url_is_checked_with_get(self, http: HttpBackend) -> None:
        http.web.methods = {"GET"}
        http.origin.check_access(http.source("config.json"))
        with pytest.raises(SourceNotFound):
            http.origin.check_access(http.source("gone.json"))

    @pytest.mark.parametrize("status", [403, 404, 405])
    def test_any_response_of_a_folder_passes_the_access_check(self, http: HttpBackend, status: int) -> None:
        http.fail_with(status, {})
        http.origin.check_access(replace(http.source("config.json"), path=""))

    def test_a_proxy_of_the_environment_is_used(self, http: HttpBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", http.web.url)
        for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        source = parse("http://weights.invalid/a%20b/config.json")
        with closing(origin_for("http", Settings())) as origin:
            pinned = origin.resolve(source, [source.path])
            with origin.read(pinned, "config.json") as chunks:
                assert b"".join(chunks) == FILES["config.json"]

    def test_a_file_without_validators_is_never_cached(self, http: HttpBackend) -> None:
        http.web.etags = False
        one, two = resolve(http, "config.json"), resolve(http, "config.json")
        assert one.files[0].key != two.files[0].key, "without a validator a cached copy is never reused"
        assert read(http, one, "config.json") == FILES["config.json"]

    def test_the_query_is_sent_and_compression_is_not_accepted(self, http: HttpBackend) -> None:
        read(http, resolve(http, "config.json"), "config.json")
        for _, path, headers in http.web.requests:
            assert path == "/a%20b/config.json?X-Amz-Signature=planted&id=7"
            assert headers["Accept-Encoding"] == "identity"
            assert headers["Authorization"].startswith("Basic ")

    def test_a_range_beyond_the_end(self, http: HttpBackend) -> None:
        pinned = resolve(http, "config.json")
        with pytest.raises(OriginError, match="416") as raised:
            read(http, pinned, "config.json", 999)
        assert not isinstance(raised.value, TransientOriginError)

    @pytest.mark.parametrize(("text", "wait"), [("3", 3.0), ("0", 0.0), ("soon", None), ("", None)])
    def test_retry_after(self, http: HttpBackend, text: str, wait: float | None) -> None:
        http.fail_with(503, {"Retry-After": text})
        with pytest.raises(TransientOriginError) as raised:
            resolve(http, "config.json")
        assert raised.value.retry_after == wait

    def test_retry_after_as_a_date(self, http: HttpBackend) -> None:
        http.fail_with(503, {"Retry-After": formatdate(time.time() + 60, usegmt=True)})
        with pytest.raises(TransientOriginError) as raised:
            resolve(http, "config.json")
        assert raised.value.retry_after == pytest.approx(60, abs=3)

    def test_the_rate_limit_header_of_the_hub(self, http: HttpBackend) -> None:
        http.fail_with(429, {"RateLimit": '"api";r=0;t=55'})
        with pytest.raises(TransientOriginError) as raised:
            resolve(http, "config.json")
        assert raised.value.retry_after == 55


class TestChains:
    """Chained URLs of fsspec."""

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
        source = parse(f"{first}::file://{archive}")
        origin = origin_for(source.scheme, Settings())
        pinned = origin.resolve(source, [""])
        assert {file.path for file in pinned.files} == set(files)
        for path, content in files.items():
            with origin.read(pinned, path) as chunks:
                assert b"".join(chunks) == content

    def test_a_file_in_the_top_folder(self) -> None:
        fs = fsspec.filesystem("memory")
        name = f"{uuid4().hex}.bin"
        fs.pipe_file(f"/{name}", b"x")
        try:
            pinned = origin_for("memory", Settings()).resolve(parse(f"memory://{name}"), [""])
            assert pinned.source.root == "memory://"
            assert [file.path for file in pinned.files] == [name]
        finally:
            fs.rm(f"/{name}")


class LimitedFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A back end without range reads, that raises errors on request; its files are those of memory://."""

    protocol = "limited"
    error: Exception | None = None
    info_error: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.replace("limited://", "memory://"))

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
    """Differences between the back ends of fsspec."""

    @pytest.fixture
    def limited(self) -> Iterator[Source]:
        fsspec.register_implementation("limited", LimitedFileSystem, clobber=True)
        folder = f"/{uuid4().hex}"
        LimitedFileSystem().pipe_file(f"{folder}/m.bin", b"0123456789")
        yield parse(f"limited:/{folder}")
        LimitedFileSystem.error = LimitedFileSystem.info_error = None
        fsspec.filesystem("memory").rm(folder, recursive=True)

    def test_without_ranges(self, limited: Source) -> None:
        pinned = origin_for("limited", Settings()).resolve(limited, [""])
        assert not pinned.files[0].ranges

    def test_a_file_that_changed(self, limited: Source) -> None:
        origin = origin_for("limited", Settings())
        pinned = origin.resolve(limited, [""])
        with origin.read(pinned, "m.bin") as chunks:
            assert b"".join(chunks) == b"0123456789"
            LimitedFileSystem().pipe_file(f"{limited.root.removeprefix('limited:/')}/m.bin", b"abcdefghij")
        with pytest.raises(SourceChanged), origin.read(pinned, "m.bin", 0, 5) as chunks:
            b"".join(chunks)

    @pytest.mark.parametrize(
        ("raised_by_backend", "expected"),
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
    def test_errors(self, limited: Source, raised_by_backend: Exception, expected: type[CollectError]) -> None:
        origin = origin_for("limited", Settings())
        pinned = origin.resolve(limited, [""])
        LimitedFileSystem.error = LimitedFileSystem.info_error = raised_by_backend
        with pytest.raises(expected) as raised, origin.read(pinned, "m.bin") as chunks:
            next(chunks)
        assert type(raised.value) is expected
        with pytest.raises(expected):
            origin.check_access(limited)


class TestFake:
    """`FakeOrigin`, which other tests use."""

    def test_without_ranges(self) -> None:
        origin = FakeOrigin(FILES, ranges=False)
        pinned = origin.resolve(parse("fake://bucket"), [""])
        assert {file.ranges for file in pinned.files} == {False}
        with pytest.raises(RangeIgnored), origin.read(pinned, "config.json", 1):
            pass
        with origin.read(pinned, "config.json") as chunks:
            assert b"".join(chunks) == FILES["config.json"]

    def test_silence(self) -> None:
        origin = FakeOrigin(FILES)
        pinned = origin.resolve(parse("fake://bucket"), [""])
        origin.faults.append(Fault(silent_after=3))
        with origin.read(pinned, "config.json") as chunks:
            assert next(chunks) == FILES["config.json"][:3]
            with pytest.raises(Silent):
                next(chunks)

    def test_an_unreachable_origin(self) -> None:
        origin, source = FakeOrigin(FILES), parse("fake://bucket")
        origin.faults.append(Fault(on="check_access", error=Unreachable("connection refused")))
        with pytest.raises(Unreachable):
            origin.check_access(source)
        origin.check_access(source)
        assert origin.access_checks == [source, source]
        origin.close()
        assert origin.closed == 1


class TestFolder:
    """Behaviour of local folders."""

    def test_broken_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = create_backend(FolderBackend, tmp_path, monkeypatch)
        backend.put(FILES)
        (backend.root / "broken").symlink_to("gone")
        with pytest.raises(SourceNotFound, match="broken symbolic link to gone"):
            resolve(backend, "broken")
        # In a folder it is not an error: a rank that wants the file finds it missing later.
        assert resolve(backend, "").file("broken").size is None

    def test_a_fifo_is_never_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = create_backend(FolderBackend, tmp_path, monkeypatch)
        backend.put(FILES)
        os.mkfifo(backend.root / "pipe")
        with pytest.raises(BadRequest, match="neither a file nor a folder"):
            resolve(backend, "")

    def test_a_folder_without_read_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = create_backend(FolderBackend, tmp_path, monkeypatch)
        backend.put(FILES)

        def refuse(path: str) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
        with pytest.raises(AccessDenied, match="Permission denied"):
            resolve(backend, "")
