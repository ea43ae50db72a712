"""A backend for every kind of origin, for the contract tests: all backends serve the same files."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit
from uuid import uuid4

import fsspec
import pytest
from huggingface_hub import constants

from tests.contract.hub_library import close_hub_session, set_endpoint
from weightferry.manifest import PinnedSource
from weightferry.origins.base import Busy, Origin, TransientOriginError
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.sources import Source, SourceRequest, parse_source
from weightferry.testing import hub as hub_server
from weightferry.testing.origin import FakeOrigin, Fault


class OriginBackend(Protocol):
    """Files behind an origin, and the abilities of this kind of origin.

    Attributes
    ----------
    origin
        The origin under test.
    lists
        Whether the origin can list folders.
    """

    origin: Origin
    lists: bool

    def source(self, path: str = "") -> Source:
        """Return the parsed source of the root, or of a file below it."""

    def put(self, files: Mapping[str, bytes]) -> None:
        """Add or replace files."""

    def close(self) -> None: ...


def parse(text: str) -> Source:
    return parse_source(SourceRequest.of(text), lambda _: False)


def create_backend(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return kind(Settings(cache_dir=tmp_path / "cache", connect_timeout=5, read_timeout=5), tmp_path, monkeypatch)


def resolve(backend: Any, *paths: str) -> PinnedSource:
    pinned: PinnedSource = backend.origin.resolve(backend.source(), list(paths))
    return pinned


def read(backend: Any, pinned: PinnedSource, path: str, *span: int | None) -> bytes:
    with backend.origin.read(pinned, path, *span) as chunks:
        return b"".join(chunks)


class HubBackend:
    lists = True

    def __init__(self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        del tmp_path
        self.server = hub_server.HubServer(options=hub_server.HubOptions(lfs_threshold=1000))
        use_server(self.server, monkeypatch)
        self.origin = origin_for("hf", settings)
        self._files: dict[str, bytes] = {}

    def source(self, path: str = "") -> Source:
        return parse(f"hf://org/model/{path}")

    def put(self, files: Mapping[str, bytes]) -> None:
        self._files |= files
        self.server.add_repo("org/model", self._files)

    def fail_with(self, status: int, headers: Mapping[str, str], times: int = 1) -> None:
        self.server.faults.add(hub_server.Fault(status=status, headers=headers, times=times))

    def clear_faults(self) -> None:
        self.server.faults.clear()

    def cut_connection(self, after: int) -> None:
        self.server.faults.add(hub_server.Fault(kind="content", cut_after=after, reset=True))

    def shut_down(self) -> None:
        self.server.close()

    def close(self) -> None:
        self.origin.close()
        close_hub_session()
        self.shut_down()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder by path; links are followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use_server(server: hub_server.HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub use `server`, without a token."""
    close_hub_session()
    set_endpoint(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


class HttpBackend:
    lists = False

    def __init__(self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        del tmp_path, monkeypatch
        self.web = WebServer()
        self.origin = origin_for("http", settings)

    def source(self, path: str = "") -> Source:
        return parse(f"{self.web.url}/a%20b/{quote(path, safe='') or 'x'}?X-Amz-Signature=planted&id=7")

    def put(self, files: Mapping[str, bytes]) -> None:
        self.web.files |= {f"/a b/{path}": content for path, content in files.items()}

    def fail_with(self, status: int, headers: Mapping[str, str], times: int = 1) -> None:
        self.web.failures += [(status, dict(headers))] * times

    def clear_faults(self) -> None:
        self.web.failures.clear()

    def cut_connection(self, after: int) -> None:
        self.web.cut_after = after

    def shut_down(self) -> None:
        self.web.close()

    def close(self) -> None:
        self.origin.close()
        self.shut_down()


class FolderBackend:
    lists = True

    def __init__(self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        del monkeypatch
        self.root = tmp_path / "a b#%"
        self.origin = origin_for("file", settings)

    def source(self, path: str = "") -> Source:
        return parse(str(self.root / path))

    def put(self, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(content)

    def close(self) -> None: ...


class MemoryBackend:
    lists = True

    def __init__(self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        del tmp_path, monkeypatch
        self.root = f"/{uuid4().hex}/model"  # memory:// is one per process
        self.fs = fsspec.filesystem("memory")
        self.origin = origin_for("memory", settings)

    def source(self, path: str = "") -> Source:
        return parse(f"memory:/{self.root}/{path}")

    def put(self, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            self.fs.pipe_file(f"{self.root}/{path}", content)

    def close(self) -> None:
        self.fs.rm(self.root.rpartition("/")[0], recursive=True)


class FakeBackend:
    lists = True

    def __init__(self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        del settings, tmp_path, monkeypatch
        self.fake = FakeOrigin({}, publishes=None)
        self.origin: Origin = self.fake

    def source(self, path: str = "") -> Source:
        return parse(f"fake://bucket/{path}")

    def put(self, files: Mapping[str, bytes]) -> None:
        self.fake.files |= files

    def fail_with(self, status: int, headers: Mapping[str, str], times: int = 1) -> None:
        wait = float(headers.get("Retry-After", 0)) or None
        kind = Busy if status in (429, 503) else TransientOriginError
        self.fake.faults.append(Fault(times=times, error=kind(f"{status}", retry_after=wait)))

    def cut_connection(self, after: int) -> None:
        self.fake.faults.append(Fault(cut_after=after))

    def close(self) -> None: ...


class WebServer:
    """A web server for the files in a dict, with HEAD, ranges, ETags, and failures on request.

    Attributes
    ----------
    failures
        Status and headers of the next responses, in order.
    cut_after
        The server closes the next connection after this many bytes of the body.
    methods
        Supported HTTP methods.
    ranges, etags
        Whether the server supports range requests, and sends ETags.
    accepts
        Value of the Accept-Ranges header; None: no header.
    sizes
        Whether the response to a HEAD has a Content-Length.
    requests
        Method, path with query, and headers of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.failures: list[tuple[int, dict[str, str]]] = []
        self.cut_after: int | None = None
        self.methods, self.ranges, self.etags, self.sizes = {"HEAD", "GET"}, True, True, True
        self.accepts: str | None = "bytes"
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"web": self}))
        self._server.daemon_threads = True
        self.url = f"http://user:pa55w0rd@127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    web: WebServer

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def _respond(self) -> None:
        web = self.web
        web.requests.append((self.command, self.path, dict(self.headers)))
        if web.failures:
            return self._send(*web.failures.pop(0), b"because")
        if self.command not in web.methods:
            return self._send(405, {}, b"")
        content = web.files.get(unquote(urlsplit(self.path).path))
        if content is None:
            return self._send(404, {}, b"")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag} if web.etags else {}
        if web.accepts:
            headers["Accept-Ranges"] = web.accepts
        byte_range = self.headers.get("Range", "").removeprefix("bytes=") if web.ranges else ""
        if not byte_range or self.headers.get("If-Range", etag) != etag:
            return self._send(200, headers, content)
        first, _, last = byte_range.partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        if start >= len(content):
            return self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(206, headers, content[start:stop])

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        length = {"Content-Length": str(len(body))} if self.web.sizes or self.command == "GET" else {}
        for name, value in {**headers, **length, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            cut_after, self.web.cut_after = self.web.cut_after, None
            self.wfile.write(body[:cut_after])
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...
