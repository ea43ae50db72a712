"""`HttpClient` against servers that do one thing each: bodies, time limits, redirects, proxies, certificates."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.raw_server import Proxy, RawServer, create_authority, server_context
from weightferry.errors import BadRequest, OriginError
from weightferry.origins.base import Silent, TransientOriginError, Unreachable
from weightferry.origins.network import CERTIFICATE_VARIABLES
from weightferry.origins.transport import HttpClient, Response
from weightferry.settings import Settings

BODY = os.urandom(1_000_000)
PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


Make = Callable[..., RawServer]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXY_VARIABLES, *map(str.upper, PROXY_VARIABLES), *CERTIFICATE_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(servers: Make) -> RawServer:
    return servers()


@pytest.fixture
def servers() -> Iterator[Make]:
    opened: list[RawServer] = []

    def start(kind: type[RawServer] = RawServer, **options: Any) -> RawServer:
        opened.append(kind(**options))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[HttpClient]:
    created = HttpClient(Settings(cache_dir=tmp_path, connect_timeout=0.5, read_timeout=0.3))
    yield created
    created.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of an authority that no system trusts."""
    return create_authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls_server(servers: Make, certificate: Path) -> RawServer:
    created = servers(context=server_context(certificate))
    created.answer("/", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
    return created


def get(client: HttpClient, url: str, **options: Any) -> tuple[int, bytes]:
    with client.stream("GET", url, subject="the file", **options) as response:
        return response.status, b"".join(response.body)


def start(client: HttpClient, url: str, method: str = "GET") -> Response:
    with client.stream(method, url, subject="the file") as response:
        return response


class TestBody:
    def test_pieces_are_large(self, server: RawServer, client: HttpClient) -> None:
        server.answer("/", f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}", BODY)
        with client.stream("GET", f"{server.url}/", subject="") as response:
            pieces = list(response.body)
        assert b"".join(pieces) == BODY
        assert min(map(len, pieces[:-1])) >= 1 << 18

    def test_pieces_over_tls_are_large(
        self, tls_server: RawServer, client: HttpClient, certificate: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        tls_server.answer("/", f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}", BODY)
        with client.stream("GET", f"{tls_server.url}/", subject="") as response:
            pieces = list(response.body)
        assert b"".join(pieces) == BODY
        assert min(map(len, pieces[:-1])) >= 1 << 18

    def test_bytes_of_a_slow_server_are_handed_out(self, server: RawServer, client: HttpClient) -> None:
        seen = threading.Event()

        def trickle(connection: socket.socket) -> None:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not seen.wait(0.02):
                connection.sendall(b"x" * 100)

        server.answers["/"] = trickle
        began = time.monotonic()
        with client.stream("GET", f"{server.url}/", subject="") as response:
            first = next(response.body)
            seen.set()
        assert 0 < len(first) < 1 << 18
        assert time.monotonic() - began < 5

    def test_chunks(self, server: RawServer, client: HttpClient) -> None:
        chunks = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
        server.answer("/", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", chunks)
        assert get(client, f"{server.url}/") == get(client, f"{server.url}/") == (200, b"hello world")
        assert server.connections == 1

    def test_a_body_that_ends_with_its_connection(self, server: RawServer, client: HttpClient) -> None:
        server.answer("/", "HTTP/1.1 200 OK", BODY, keep=False)
        assert get(client, f"{server.url}/") == (200, BODY)

    @pytest.mark.parametrize("head", ["Content-Length: 9", "Transfer-Encoding: chunked"])
    def test_a_cut_body(self, server: RawServer, client: HttpClient, head: str) -> None:
        body = b"5\r\nhello\r\n9\r\n" if "chunked" in head else b"hello"
        server.answer("/", f"HTTP/1.1 200 OK\r\n{head}", body, keep=False)
        got = bytearray()

        def read() -> None:
            with client.stream("GET", f"{server.url}/", subject="the file") as response:
                for piece in response.body:
                    got.extend(piece)

        with pytest.raises(TransientOriginError, match=f"the connection to 127.0.0.1:{server.port} broke") as raised:
            read()
        assert got == b"hello"
        assert type(raised.value) is TransientOriginError
        assert raised.value.subject == "the file"

    def test_a_compressed_body_stays_compressed(self, server: RawServer, client: HttpClient) -> None:
        server.answer("/", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4", b"gzip")
        assert get(client, f"{server.url}/") == (200, b"gzip")


class TestConnections:
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_a_connection_is_used_again(self, server: RawServer, client: HttpClient, method: str) -> None:
        body = b"ok" if method == "GET" else b""
        server.answer("/", "HTTP/1.1 200 OK\r\nContent-Length: 2", body)
        for _ in range(3):
            with client.stream(method, f"{server.url}/", subject="") as response:
                assert b"".join(response.body) == body
        assert server.connections == 1

    def test_threads_share_connections(self, server: RawServer, client: HttpClient) -> None:
        server.answer("/", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")

        def work() -> None:
            for _ in range(20):
                assert get(client, f"{server.url}/") == (200, b"ok")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.requests) == 160
        assert server.connections <= 8

    def test_a_reader_that_stops_early_reads_no_more(self, server: RawServer, client: HttpClient) -> None:
        sent = threading.Event()

        def send(connection: socket.socket) -> None:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            with contextlib.suppress(OSError):
                while True:
                    connection.sendall(BODY)
            sent.set()

        server.answers["/"] = send
        assert start(client, f"{server.url}/").status == 200
        assert sent.wait(10), "the connection is closed"

    def test_a_connection_that_the_server_closed(self, server: RawServer, client: HttpClient) -> None:
        closed = threading.Event()

        def send(connection: socket.socket) -> None:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            connection.shutdown(socket.SHUT_RDWR)
            closed.set()

        server.answers["/"] = send
        for _ in range(3):
            assert get(client, f"{server.url}/") == (200, b"ok")
            assert closed.wait(10)
            closed.clear()
        assert server.connections == 3

    def test_an_idle_connection_is_not_used(
        self, server: RawServer, client: HttpClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("weightferry.origins.transport._IDLE_SECONDS", 0.0)
        server.answer("/", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        get(client, f"{server.url}/")
        get(client, f"{server.url}/")
        assert server.connections == 2

    def test_close(self, server: RawServer, client: HttpClient) -> None:
        server.answer("/", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        get(client, f"{server.url}/")
        client.close()
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            get(client, f"{server.url}/")


class TestFailures:
    def test_no_server(self, server: RawServer, client: HttpClient) -> None:
        server.close()
        with pytest.raises(Unreachable, match=rf"cannot connect to 127.0.0.1:{server.port}: .*Connection refused"):
            get(client, f"{server.url}/")

    def test_no_such_name(self, client: HttpClient) -> None:
        with pytest.raises(Unreachable, match=r"cannot connect to weights\.invalid: "):
            get(client, "http://weights.invalid/")

    def test_no_answer_to_the_connection(self, client: HttpClient) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
            for _ in range(4):  # the queue of the listener is full
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            with pytest.raises(Unreachable, match=r"no answer within 0\.5 s"):
                get(client, f"http://127.0.0.1:{full.getsockname()[1]}/")

    def test_no_answer_to_the_handshake(self, client: HttpClient) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            pytest.raises(Unreachable, match=r"no answer within 0\.5 s"),
        ):
            get(client, f"https://127.0.0.1:{silent.getsockname()[1]}/")

    def test_tls_with_a_plain_server(self, server: RawServer, client: HttpClient) -> None:
        server.answer("/", "HTTP/1.1 200 OK")
        with socket.create_server(("127.0.0.1", 0)) as plain:

            def answer() -> None:
                connection, _ = plain.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.recv(1000)

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(Unreachable, match="SSL"):
                get(client, f"https://127.0.0.1:{plain.getsockname()[1]}/")
            thread.join()

    def test_a_silent_server(self, server: RawServer, client: HttpClient) -> None:
        server.answers["/"] = lambda connection: None
        with pytest.raises(Silent, match=rf"127.0.0.1:{server.port} sent nothing for 0\.3 s"):
            get(client, f"{server.url}/")

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Le", b"nonsense\r\n\r\n"])
    def test_a_server_that_sends_nonsense(self, server: RawServer, client: HttpClient, answer: bytes) -> None:
        def send(connection: socket.socket) -> None:
            connection.sendall(answer)
            connection.close()

        server.answers["/"] = send
        with pytest.raises(TransientOriginError, match="broke") as raised:
            get(client, f"{server.url}/")
        assert type(raised.value) is TransientOriginError

    @pytest.mark.parametrize("url", ["ftp://x/", "http://", "http://x:y/", "http://[::1/", "", "http://x:0/"])
    def test_an_invalid_url(self, client: HttpClient, url: str) -> None:
        with pytest.raises(OriginError, match="not a valid http or https URL") as raised:
            get(client, url)
        assert type(raised.value) is OriginError


class TestRedirects:
    def redirect(self, server: RawServer, path: str, location: str, status: int = 302) -> None:
        server.answer(path, f"HTTP/1.1 {status} Found\r\nContent-Length: 2\r\nLocation: {location}", b"go")

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_on_the_same_server(self, server: RawServer, client: HttpClient, status: int) -> None:
        self.redirect(server, "/a/b", "../c?x=1", status)
        server.answer("/c?x=1", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        headers = {"Authorization": "Bearer t", "Range": "bytes=0-1"}
        assert get(client, f"{server.url}/a/b", headers=headers) == (200, b"ok")
        assert server.headers()["authorization"] == "Bearer t"
        assert server.headers()["range"] == "bytes=0-1"
        assert server.connections == 1, "the body of the redirect is read"

    @pytest.mark.parametrize("name", ["Authorization", "authorization"])
    def test_the_token_is_not_sent_to_another_server(self, servers: Make, client: HttpClient, name: str) -> None:
        hub, cdn = servers(), servers()
        self.redirect(hub, "/", f"{cdn.url}/x")
        self.redirect(cdn, "/x", f"{hub.url}/y")
        hub.answer("/y", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        assert get(client, f"{hub.url}/", headers={name: "Bearer t", "X-Y": "z"}) == (200, b"ok")
        assert hub.headers(0)["authorization"] == "Bearer t"
        assert "authorization" not in cdn.headers()
        assert "authorization" not in hub.headers(1), "the other server chose this URL"
        assert cdn.headers()["x-y"] == "z"

    def test_the_password_of_a_url_is_not_sent_to_another_server(self, servers: Make, client: HttpClient) -> None:
        one, two = servers(), servers()
        self.redirect(one, "/", f"{two.url}/x")
        two.answer("/x", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        assert get(client, one.url.replace("//", "//user:p%40ss@") + "/") == (200, b"ok")
        assert one.headers()["authorization"] == "Basic " + base64.b64encode(b"user:p@ss").decode()
        assert "user" not in one.requests[0]
        assert "authorization" not in two.headers()

    def test_not_followed(self, server: RawServer, client: HttpClient) -> None:
        self.redirect(server, "/a/b", "/c")
        with client.stream("GET", f"{server.url}/a/b", subject="", follow_redirects=False) as response:
            assert (response.status, response.redirect) == (302, f"{server.url}/c")

    def test_a_location_in_utf_8(self, server: RawServer, client: HttpClient) -> None:
        self.redirect(server, "/", "/grüße".encode().decode("latin-1"))
        server.answer("/gr%C3%BC%C3%9Fe", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        assert get(client, f"{server.url}/") == (200, b"ok")

    def test_a_circle(self, server: RawServer, client: HttpClient) -> None:
        self.redirect(server, "/", "/")
        with pytest.raises(OriginError, match="20 redirects") as raised:
            get(client, f"{server.url}/")
        assert not isinstance(raised.value, TransientOriginError)

    @pytest.mark.parametrize("location", ["ftp://x/y", "file:///etc/passwd", "http://[::1/", "http://x:y/"])
    def test_to_no_web_server(self, server: RawServer, client: HttpClient, location: str) -> None:
        self.redirect(server, "/", location)
        with pytest.raises(OriginError, match="not a valid http or https URL"):
            get(client, f"{server.url}/")


class TestProxies:
    def test_plain(self, servers: Make, client: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
        proxy = servers(Proxy)
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//user:pw@"))
        proxy.answer("http://weights.invalid/x", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        assert get(client, "http://weights.invalid/x") == (200, b"ok")
        assert proxy.headers()["proxy-authorization"] == "Basic " + base64.b64encode(b"user:pw").decode()

    @pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY", "https_proxy"])
    def test_tls(
        self,
        servers: Make,
        tls_server: RawServer,
        client: HttpClient,
        certificate: Path,
        variable: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        proxy = servers(Proxy)
        monkeypatch.setenv(variable, f"user:pw@127.0.0.1:{proxy.port}")  # without a scheme, as curl allows
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert get(client, f"{tls_server.url}/", headers={"Authorization": "Bearer t"}) == (200, b"ok")
        assert proxy.requests[0].startswith(f"CONNECT 127.0.0.1:{tls_server.port} ")
        assert proxy.headers()["proxy-authorization"].startswith("Basic ")
        assert "authorization" not in proxy.headers()
        assert "proxy-authorization" not in tls_server.headers()

    @pytest.mark.parametrize("exception", ["127.0.0.1", "*", "127.0.0.1:{port}", "example.org, 127.0.0.1"])
    def test_no_proxy(self, servers: Make, client: HttpClient, exception: str, monkeypatch: pytest.MonkeyPatch) -> None:
        server, proxy = servers(), servers(Proxy)
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", exception.format(port=server.port))
        server.answer("/", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        assert get(client, f"{server.url}/") == (200, b"ok")
        assert proxy.requests == []

    @pytest.mark.parametrize("fault", ["down", "refuses"])
    def test_a_proxy_that_does_not_work(
        self, servers: Make, client: HttpClient, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxy: Any = servers(Proxy)
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//user:pa55w0rd@"))
        proxy.refuses = True
        if fault == "down":
            proxy.close()
        text = rf"cannot connect to weights\.invalid through the proxy 127\.0\.0\.1:{proxy.port}: .*"
        with pytest.raises(Unreachable, match=text + ("407" if fault == "refuses" else "refused")) as raised:
            get(client, "https://weights.invalid/")
        assert "pa55w0rd" not in str(raised.value)

    def test_a_socks_proxy_needs_a_package(self, client: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
        monkeypatch.setitem(sys.modules, "socks", None)
        monkeypatch.delitem(sys.modules, "urllib3.contrib.socks", raising=False)
        with pytest.raises(BadRequest, match="PySocks"):
            get(client, "http://127.0.0.1:9/")


class TestCertificates:
    def test_an_unknown_authority(self, tls_server: RawServer, client: HttpClient) -> None:
        with pytest.raises(Unreachable, match=r"CERTIFICATE_VERIFY_FAILED.*set SSL_CERT_FILE"):
            get(client, f"{tls_server.url}/")

    @pytest.mark.parametrize("variable", CERTIFICATE_VARIABLES)
    def test_a_variable_that_names_it(
        self,
        tls_server: RawServer,
        client: HttpClient,
        certificate: Path,
        variable: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        value = certificate
        if variable in ("SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):  # folders with the names that OpenSSL looks for
            shutil.copy(certificate, tmp_path)
            subprocess.run(["openssl", "rehash", str(tmp_path)], check=True)
            value = tmp_path
        monkeypatch.setenv(variable, str(value))
        assert get(client, f"{tls_server.url}/") == (200, b"ok")

    def test_the_name_of_the_server_is_checked(
        self, tls_server: RawServer, client: HttpClient, certificate: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            get(client, f"https://localhost:{tls_server.port}/")

    @pytest.mark.parametrize("content", [None, "nonsense"])
    def test_a_variable_that_names_none(
        self, tls_server: RawServer, client: HttpClient, content: str | None, tmp_path: Path, monkeypatch
    ) -> None:
        path = tmp_path / "none.pem"
        if content:
            path.write_text(content)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(path))
        with pytest.raises(BadRequest, match=r"REQUESTS_CA_BUNDLE is .*none\.pem.*Correct it or unset it"):
            get(client, f"{tls_server.url}/")

    def test_plain_http_needs_none(self, server: RawServer, client: HttpClient, monkeypatch) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
        server.answer("/", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
        assert get(client, f"{server.url}/") == (200, b"ok")


def test_no_log_contains_a_secret(server: RawServer, client: HttpClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    server.answer("/x?X-Amz-Signature=planted", "HTTP/1.1 302 F\r\nContent-Length: 0\r\nLocation: /y?Signature=planted")
    server.answer("/y?Signature=planted", "HTTP/1.1 200 OK\r\nContent-Length: 2", b"ok")
    url = server.url.replace("//", "//user:planted@") + "/x?X-Amz-Signature=planted"
    assert get(client, url, headers={"Authorization": "Bearer planted-token"}) == (200, b"ok")
    assert "GET /y?Signature=<hidden>" in caplog.text, "urllib3 logs the request"
    assert "planted" not in caplog.text
