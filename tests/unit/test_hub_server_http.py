"""`HubServer`, tested with plain HTTP: ranges, signed URLs, faults, and `close`."""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from weightferry.testing.hub import Fault, HubOptions, HubServer

WEIGHTS = os.urandom(200_000)
FILES = {"config.json": b"0123456789", "model.safetensors": WEIGHTS}
RESOLVE = "/org/model/resolve/main/"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def request(url: str, method: str = "GET", timeout: float = 10, body: str | None = None, **headers: str) -> Reply:
    """Send one request, follow no redirect; an underscore in a header name stands for a hyphen."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
        with connection.getresponse() as response:
            return Reply(response.status, response.headers, response.read())
    finally:
        connection.close()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo("org/model", FILES)
        yield server


def link(hub: HubServer, path: str = "model.safetensors") -> str:
    location = request(f"{hub.url}{RESOLVE}{path}", "HEAD").headers["Location"]
    hub.reset()
    return location if location.startswith("http") else hub.url + location


class TestRanges:
    @pytest.mark.parametrize(
        ("byte_range", "start", "stop"),
        [
            ("0-0", 0, 1),
            ("100-199", 100, 200),
            ("199990-", 199_990, 200_000),
            ("-5", 199_995, 200_000),
            ("199990-300000", 199_990, 200_000),
            ("-300000", 0, 200_000),
        ],
    )
    def test_a_range(self, hub: HubServer, byte_range: str, start: int, stop: int) -> None:
        reply = request(link(hub), Range=f"bytes={byte_range}")
        assert (reply.status, reply.body) == (206, WEIGHTS[start:stop])
        assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/200000"
        assert [(r.range, r.body_bytes) for r in hub.requests] == [(f"bytes={byte_range}", stop - start)]

    @pytest.mark.parametrize("byte_range", ["200000-", "300000-300001", "-0"])
    def test_an_unsatisfiable_range(self, hub: HubServer, byte_range: str) -> None:
        reply = request(link(hub), Range=f"bytes={byte_range}")
        assert (reply.status, reply.headers["Content-Range"]) == (416, "bytes */200000")
        assert hub.content_bytes() == 0

    @pytest.mark.parametrize("byte_range", ["bytes=5-2", "bytes=-", "bytes=0-1,5-6", "lines=1-2", "bytes=a-b"])
    def test_ranges_that_the_server_ignores(self, hub: HubServer, byte_range: str) -> None:
        assert request(link(hub), Range=byte_range).body == WEIGHTS

    def test_a_range_of_a_git_file(self, hub: HubServer) -> None:
        assert request(link(hub, "config.json"), Range="bytes=2-4").body == b"234"

    def test_if_range(self, hub: HubServer) -> None:
        url = link(hub)
        etag = request(url, "HEAD").headers["ETag"]
        assert request(url, Range="bytes=0-9", If_Range=etag).status == 206
        assert request(url, Range="bytes=0-9", If_Range='"other"').status == 200
        assert request(url, Range="bytes=0-9", If_Range="Wed, 21 Oct 2015 07:28:00 GMT").status == 200

    def test_if_none_match(self, hub: HubServer) -> None:
        for url in (link(hub), link(hub, "config.json"), f"{hub.url}{RESOLVE}config.json"):
            etag = request(url, "HEAD").headers.get("ETag") or request(url, "HEAD").headers["X-Linked-ETag"]
            reply = request(url, If_None_Match=f'"x", {etag}')
            assert (reply.status, reply.body) == (304, b"")

    def test_many_requests_on_one_connection(self, hub: HubServer) -> None:
        parts = urlsplit(link(hub))
        connection = http.client.HTTPConnection(parts.netloc)
        began = time.monotonic()
        for start in range(0, 200_000, 2_000):
            connection.request("GET", f"{parts.path}?{parts.query}", headers={"Range": f"bytes={start}-{start + 1999}"})
            with connection.getresponse() as response:
                assert response.read() == WEIGHTS[start : start + 2000]
        connection.close()
        assert time.monotonic() - began < 3  # with Nagle's algorithm: 40 ms each
        assert hub.content_bytes() == 200_000


class TestResolve:
    def test_headers_of_an_lfs_file(self, hub: HubServer) -> None:
        reply = request(f"{hub.url}{RESOLVE}model.safetensors", "HEAD")
        assert reply.status == 302
        assert reply.headers["X-Repo-Commit"] == hub.commit("org/model")
        assert reply.headers["X-Linked-Size"] == "200000"
        assert len(reply.headers["X-Linked-ETag"]) == 64 + 2
        assert reply.headers["Location"].startswith(hub.cdn_url)
        assert urlsplit(hub.cdn_url).hostname != urlsplit(hub.url).hostname, "not every release looks at ports"
        assert "X-Xet-Hash" not in reply.headers
        # The CDN's ETag looks like a SHA-256 and is not the file's.
        assert request(reply.headers["Location"], "HEAD").headers["ETag"] != reply.headers["X-Linked-ETag"]

    def test_headers_of_a_git_file(self, hub: HubServer) -> None:
        reply = request(f"{hub.url}{RESOLVE}config.json", "HEAD")
        assert reply.status == 307
        assert reply.headers["Location"].startswith("/api/resolve-cache/models/org/model/")
        assert "X-Linked-Size" not in reply.headers
        assert int(reply.headers["Content-Length"]) != 10
        reply = request(hub.url + reply.headers["Location"], "HEAD")
        assert (reply.status, reply.headers["Content-Length"]) == (200, "10")

    def test_a_get_is_a_redirect_without_content(self, hub: HubServer) -> None:
        reply = request(f"{hub.url}{RESOLVE}model.safetensors")
        assert [(r.kind, r.status, r.body_bytes) for r in hub.requests] == [("redirect", 302, len(reply.body))]
        assert hub.content_bytes() == 0

    def test_which_files_are_in_lfs(self, hub: HubServer) -> None:
        with HubServer(options=HubOptions(lfs_threshold=100)) as small:
            small.add_repo("org/model", {"a.txt": b"1" * 100, "b.txt": b"1" * 99, "c.BIN": b"1"})
            statuses = {
                name: request(f"{small.url}{RESOLVE}{name}", "HEAD").status for name in ("a.txt", "b.txt", "c.BIN")
            }
        assert statuses == {"a.txt": 302, "b.txt": 307, "c.BIN": 302}

    @pytest.mark.parametrize(
        "path",
        [
            f"{RESOLVE}../../../../secret",
            f"{RESOLVE}..%2F..%2Fsecret",
            f"{RESOLVE}%2e%2e/secret",
            f"{RESOLVE}/secret",
            "/../x/resolve/main/secret",
            "/%2e%2e/x/resolve/main/secret",
            "/..%2F/x/resolve/main/secret",
            "/org/..%2F..%2Fx/resolve/main/secret",
            "/api/models/../..",
            "/api/models/%2e%2e/x",
        ],
    )
    def test_paths_stay_inside_the_root(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "root/org/model").mkdir(parents=True)
        (tmp_path / "secret").write_text("secret")
        (tmp_path / "x").mkdir()
        (tmp_path / "x/secret").write_text("secret")
        with HubServer(tmp_path / "root") as hub:
            reply = request(hub.url + path)
        assert reply.status in (401, 404)

    def test_unknown_paths_and_methods(self, hub: HubServer) -> None:
        assert request(f"{hub.url}/blog").status == 404
        assert request(f"{hub.url}/api/models/org/model/nothing").status == 404
        assert request(f"{hub.url}/api/models/org/model", "DELETE").status == 405
        assert request(f"{hub.url}/api/models/org/model/paths-info/main", "POST", body="[1").status == 200
        assert (
            request(f"{hub.url}/api/models/org/model/paths-info/main", "POST", body="[1", Content_Type="json").status
            == 400
        )
        assert [r.kind for r in hub.requests] == ["other", "other", "metadata", "metadata", "metadata"]

    def test_errors_have_a_code_and_a_text(self, hub: HubServer) -> None:
        reply = request(f"{hub.url}{RESOLVE}missing.json")
        assert (reply.status, reply.headers["X-Error-Code"]) == (404, "EntryNotFound")
        assert reply.headers["X-Error-Message"] == json.loads(reply.body)["error"] == "Entry not found"
        assert reply.headers["X-Repo-Commit"] == hub.commit("org/model")


class TestCdn:
    def test_the_cdn_refuses_and_records_a_token(self, hub: HubServer) -> None:
        reply = request(link(hub), Authorization="Bearer hf_secret")
        assert reply.status == 400
        assert [(r.side, r.had_authorization) for r in hub.requests] == [("cdn", True)]
        assert hub.content_bytes() == 0

    def test_urls_expire(self) -> None:
        with HubServer(options=HubOptions(link_lifetime=0)) as hub:
            hub.add_repo("org/model", FILES)
            reply = request(link(hub))
        assert (reply.status, b"expired" in reply.body) == (403, True)

    def test_urls_need_a_valid_signature(self, hub: HubServer) -> None:
        url = link(hub)
        assert request(url.partition("?")[0]).status == 403
        assert request(url.replace("model.safetensors", "config.json")).status == 403
        expires = url.partition("Expires=")[2].partition("&")[0]
        assert request(url.replace(expires, str(int(expires) + 1))).status == 403
        assert request(url.replace("/repos/", "/other/")).status == 404

    def test_a_large_sparse_file(self, tmp_path: Path) -> None:
        (tmp_path / "org/model").mkdir(parents=True)
        with (tmp_path / "org/model/model.bin").open("wb") as file:
            file.seek(300 << 20)
            file.write(b"end")
        with HubServer(tmp_path) as hub:
            assert request(link(hub, "model.bin"), Range="bytes=-5").body == b"\0\0end"


class TestFaults:
    def test_status(self, hub: HubServer) -> None:
        hub.faults.add(Fault(status=429, method="HEAD", times=2, headers={"Retry-After": "7"}))
        url = f"{hub.url}{RESOLVE}config.json"
        assert request(url).status == 307
        reply = request(url, "HEAD")
        assert (reply.status, reply.headers["Retry-After"]) == (429, "7")
        assert [fault.times for fault in hub.faults.left] == [1]
        assert [request(url, "HEAD").status for _ in range(2)] == [429, 307]

    def test_without_limit_until_cleared(self, hub: HubServer) -> None:
        hub.faults.add(Fault(status=500, path_suffix=".json", times=None))
        url = f"{hub.url}{RESOLVE}config.json"
        assert [request(url).status for _ in range(3)] == [500] * 3
        hub.faults.clear()
        assert request(url).status == 307

    def test_cut_with_an_orderly_close(self, hub: HubServer) -> None:
        url = link(hub)
        hub.faults.add(Fault(cut_after=1_000))
        with pytest.raises(http.client.IncompleteRead) as caught:
            request(url)
        assert caught.value.partial == WEIGHTS[:1_000]
        assert hub.content_bytes() == 1_000
        assert request(url).body == WEIGHTS

    def test_cut_with_a_reset(self, hub: HubServer) -> None:
        parts = urlsplit(link(hub))
        hub.faults.add(Fault(cut_after=100_000, reset=True))
        connection = http.client.HTTPConnection(parts.netloc)
        connection.request("GET", f"{parts.path}?{parts.query}")
        response = connection.getresponse()
        assert response.read(100_000) == WEIGHTS[:100_000]
        with pytest.raises(ConnectionResetError):
            response.read()
        connection.close()
        response.close()

    def test_close_before_the_response(self, hub: HubServer) -> None:
        hub.faults.add(Fault(hang_up=True), Fault(hang_up=True, reset=True))
        url = f"{hub.url}{RESOLVE}config.json"
        with pytest.raises(http.client.RemoteDisconnected):
            request(url)
        with pytest.raises(ConnectionResetError):
            request(url)
        assert [r.status for r in hub.requests] == [0, 0]

    def test_silence_during_the_body(self, hub: HubServer) -> None:
        url = link(hub)
        hub.faults.add(Fault(silent_after=10))
        with pytest.raises(TimeoutError):
            request(url, timeout=0.2)
        assert hub.content_bytes() == 10

    def test_delayed_and_missing_responses(self, hub: HubServer) -> None:
        hub.faults.add(Fault(delay=0.2), Fault(delay=math.inf))
        url = f"{hub.url}{RESOLVE}config.json"
        began = time.monotonic()
        assert request(url).status == 307
        assert time.monotonic() - began >= 0.2
        with pytest.raises(TimeoutError):
            request(url, timeout=0.1)

    def test_damage_waits_for_a_response_with_its_byte(self, hub: HubServer) -> None:
        url = link(hub)
        hub.faults.add(Fault(corrupt_at=150_000))
        assert request(url, Range="bytes=0-99999").body == WEIGHTS[:100_000]
        damaged = bytearray(WEIGHTS)
        damaged[150_000] ^= 0xFF
        assert request(url, Range="bytes=100000-").body == bytes(damaged[100_000:])
        assert request(url).body == WEIGHTS

    def test_slow(self, hub: HubServer) -> None:
        url = link(hub)
        hub.faults.add(Fault(bytes_per_second=400_000))
        began = time.monotonic()
        assert request(url).body == WEIGHTS
        assert time.monotonic() - began > 0.4

    def test_ignored_range(self, hub: HubServer) -> None:
        url = link(hub)
        hub.faults.add(Fault(ignore_range=True))
        assert request(url).status == 200
        assert len(hub.faults.left) == 1
        reply = request(url, Range="bytes=10-19")
        assert (reply.status, reply.body) == (200, WEIGHTS)
        assert request(url, Range="bytes=10-19").status == 206

    def test_chunks(self, hub: HubServer) -> None:
        url = link(hub)
        hub.faults.add(Fault(chunked=True, times=None), Fault(corrupt_at=0), Fault(cut_after=1))
        with pytest.raises(http.client.IncompleteRead):
            request(url)
        reply = request(url)
        assert reply.body == WEIGHTS
        assert "Content-Length" not in reply.headers
        assert hub.content_bytes() == 200_001

    def test_several_faults_happen_together(self, hub: HubServer) -> None:
        url = link(hub)
        hub.faults.add(Fault(bytes_per_second=1e6, times=None), Fault(cut_after=500), Fault(silent_after=700))
        hub.faults.add(Fault(status=500), Fault(delay=0.1))
        began = time.monotonic()
        assert request(url).status == 500
        assert time.monotonic() - began >= 0.1
        with pytest.raises(http.client.IncompleteRead) as caught:
            request(url)
        assert len(caught.value.partial) == 500
        with pytest.raises(TimeoutError):
            request(url, timeout=0.1)
        assert hub.content_bytes() == 1_200
        assert [fault.bytes_per_second for fault in hub.faults.left] == [1e6]

    @pytest.mark.parametrize(
        "wrong", [{}, {"headers": {"a": "b"}}, {"status": 500, "times": 0}, {"bytes_per_second": 0}, {"reset": True}]
    )
    def test_invalid_faults(self, wrong: dict) -> None:  # type: ignore[type-arg]
        with pytest.raises(ValueError):
            Fault(**wrong)


class TestClose:
    def test_rate_of_a_connection(self) -> None:
        with HubServer(bytes_per_second_per_connection=400_000) as hub:
            hub.add_repo("org/model", FILES)
            began = time.monotonic()
            assert request(link(hub)).body == WEIGHTS
            assert time.monotonic() - began > 0.4

    def test_close_ends_threads_and_connections(self, hub: HubServer) -> None:
        before = set(threading.enumerate()) - {t for t in threading.enumerate() if t.name.startswith(("hub", "cdn"))}
        hub.add_repo("org/big", {"big.bin": bytes(30 << 20)})
        url, big = link(hub), request(f"{hub.url}/org/big/resolve/main/big.bin").headers["Location"]
        hub.reset()
        hub.faults.add(Fault(silent_after=5, path_suffix="model.safetensors", method="GET"))
        hub.faults.add(Fault(delay=math.inf, method="HEAD"))
        waiting = [threading.Thread(target=_request_until_closed, args=(url, method)) for method in ("GET", "HEAD")]
        for thread in waiting:
            thread.start()
        idle, deaf = (_connect(big) for _ in range(2))
        deaf.sendall(f"GET {big.removeprefix(hub.cdn_url)} HTTP/1.1\r\nHost: hub\r\n\r\n".encode())
        _wait_until(lambda: len(hub.requests) == 3 and hub.content_bytes("big.bin") > 0)
        began = time.monotonic()
        hub.close()
        hub.close()
        assert time.monotonic() - began < 5
        assert idle.recv(1) == b""
        for thread in waiting:
            thread.join(5)
        for connection in (idle, deaf):
            connection.close()
        assert set(threading.enumerate()) <= before
        for address in (hub.url, hub.cdn_url):
            with pytest.raises(ConnectionRefusedError):
                request(address)

    def test_a_port_in_use(self, hub: HubServer) -> None:
        port = urlsplit(hub.cdn_url).port or 0
        with pytest.raises(OSError, match="in use"):
            HubServer(options=HubOptions(cdn_port=port))

    def test_the_root_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(NotADirectoryError):
            HubServer(tmp_path / "missing")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_command(self, tmp_path: Path, number: signal.Signals) -> None:
        (tmp_path / "org/model").mkdir(parents=True)
        (tmp_path / "org/model/model.bin").write_bytes(WEIGHTS)
        command = [sys.executable, "-W", "error", "-m", "weightferry.testing.hub", str(tmp_path), "--token", "hf_a"]
        with subprocess.Popen([*command, "--private"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            url = process.stdout.readline().decode().strip()
            assert request(f"{url}{RESOLVE}model.bin").status == 401
            location = request(f"{url}{RESOLVE}model.bin", Authorization="Bearer hf_a").headers["Location"]
            assert request(location).body == WEIGHTS
            stats = json.loads(request(f"{url}/-/stats").body)
            assert stats == {
                "requests": {"metadata": 0, "redirect": 2, "content": 1, "other": 0},
                "statuses": {"200": 1, "302": 1, "401": 1},
                "content_bytes": 200_000,
                "content_bytes_by_file": {"org/model/model.bin": 200_000},
                "authorization_at_cdn": 0,
            }
            assert request(f"{url}/-/reset").status == 405
            assert request(f"{url}/-/reset", "POST").status == 200
            assert json.loads(request(f"{url}/-/stats").body)["content_bytes"] == 0
            process.send_signal(number)
            assert process.wait(10) == 0
            assert process.stderr.read() == b""


def _connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0))


def _request_until_closed(url: str, method: str) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        request(url, method)


def _wait_until(true: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
