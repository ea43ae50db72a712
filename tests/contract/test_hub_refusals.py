"""What the Hub refuses: our reading of its responses and huggingface_hub's give the same errors, over either route."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from tests.contract.backends import parse
from tests.contract.hub_library import close_hub_session
from tests.raw_server import RawServer, create_authority, server_context
from weightferry.errors import AccessDenied, CollectError, OriginError, SourceNotFound
from weightferry.origins.base import RateLimited, Silent, TransientOriginError, Unreachable
from weightferry.origins.hub_errors import CheckedClient, hub_errors
from weightferry.origins.hub_session import HubClient
from weightferry.origins.network import CERTIFICATE_VARIABLES
from weightferry.settings import Settings

PATH = "/org/model/resolve/main/x.bin"
SOURCE = parse("hf://org/model@v9")
JSON, PAGE = "application/json", "text/html; charset=utf-8"
# Status, X-Error-Code, X-Error-Message, type and body; and the error.
CASES: list[tuple[int, str, str, str, Any, type[CollectError], str]] = [
    (
        404,
        "RepoNotFound",
        "Repository not found",
        JSON,
        {"error": "Repository not found"},
        SourceNotFound,
        "no such model",
    ),
    (401, "RepoNotFound", "", JSON, {}, SourceNotFound, "if it is private: this rank has no token"),
    (403, "RepoNotFound", "", JSON, {}, AccessDenied, "HTTP 403: this rank has no token"),
    (
        401,
        "GatedRepo",
        "Access to model org/model is restricted.",
        PAGE,
        "<p>",
        AccessDenied,
        "HTTP 401: gated repository",
    ),
    (403, "GatedRepo", "", PAGE, "<p>", AccessDenied, "HTTP 403: gated repository, accept its terms on the Hub"),
    (404, "RevisionNotFound", "Invalid rev id: v9", JSON, {}, SourceNotFound, "no revision 'v9' in the repository"),
    (404, "EntryNotFound", "Entry not found", PAGE, "", SourceNotFound, "no such file at this commit"),
    (403, "", "Access to this resource is disabled.", JSON, {}, AccessDenied, "HTTP 403: this rank has no token"),
    (
        401,
        "",
        "Invalid credentials in Authorization header",
        JSON,
        {},
        AccessDenied,
        "HTTP 401: this rank has no token",
    ),
    (404, "", "", "text/plain", "nothing here", SourceNotFound, "HTTP 404: nothing here"),
    (404, "", "", PAGE, "<p>nothing here</p>", SourceNotFound, "HTTP 404"),
    (400, "", "", JSON, {"error": ["one", "two"]}, OriginError, "HTTP 400: one\ntwo"),
    (400, "", "one", JSON, {"error": "one", "errors": [{"message": "two"}, {}]}, OriginError, "HTTP 400: one\ntwo"),
    (418, "Unknown", "", "text/plain", "", OriginError, "HTTP 418"),
    (429, "", "", JSON, {"error": "slow down"}, RateLimited, "HTTP 429: slow down"),
    (500, "", "Internal Error - <hidden>", JSON, {}, TransientOriginError, "HTTP 500: Internal Error"),
]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def servers(authority: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RawServer]]:
    opened: list[RawServer] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in CERTIFICATE_VARIABLES:
        monkeypatch.setenv(name, str(authority))
    monkeypatch.delenv("SSL_CERT_DIR")
    close_hub_session()

    def start(scheme: str = "http", **options: Any) -> RawServer:
        opened.append(RawServer(server_context(authority) if scheme == "https" else None, **options))
        return opened[-1]

    yield start
    close_hub_session()
    for each in opened:
        each.close()


@pytest.fixture(params=["our own connections", "the session of huggingface_hub"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HubClient]:
    created = HubClient(Settings(cache_dir=tmp_path, connect_timeout=2, read_timeout=0.3))
    created._use_own = request.param == "our own connections"
    yield created
    created.close()


def read(client: Any, url: str) -> bytes:
    with client.stream("GET", url, headers={}, subject="x.bin") as response:
        return b"".join(response.body)


def as_huggingface_hub_reads_it(url: str) -> CollectError:
    with pytest.raises(CollectError) as raised, hub_errors(SOURCE, "x.bin"):
        hf_raise_for_status(get_session().get(url))  # type: ignore[arg-type, unused-ignore]
    return raised.value


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1] or case[2] or case[4]}")
def test_both_readings_agree(servers: Callable[..., RawServer], client: HubClient, scheme: str, case: Any) -> None:
    status, code, message, kind, content, error, text = case
    server = servers(scheme)
    body = (content if isinstance(content, str) else json.dumps(content)).encode()
    lines = [f"HTTP/1.1 {status} No", f"Content-Length: {len(body)}", f"Content-Type: {kind}", "Retry-After: 7"]
    lines += [f"X-Error-Code: {code}"] if code else []
    lines += [f"X-Error-Message: {message}"] if message else []
    server.answer(PATH, "\r\n".join(lines), body)
    with pytest.raises(error) as raised:
        read(CheckedClient(client, SOURCE), server.url + PATH)
    assert type(raised.value) is error
    assert text in str(raised.value)
    expected = as_huggingface_hub_reads_it(server.url + PATH)
    assert (type(expected), str(expected)) == (error, str(raised.value))
    assert getattr(expected, "retry_after", None) == getattr(raised.value, "retry_after", None)


@pytest.mark.parametrize(("scheme", "error"), [("https", SourceNotFound), ("http", AccessDenied)])
def test_a_bare_401(
    servers: Callable[..., RawServer], client: HubClient, scheme: str, error: type[CollectError]
) -> None:
    """From huggingface.co it means that the repository is private or missing."""
    server = servers(scheme)
    server.answer(PATH, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0")
    with pytest.raises(error) as raised:
        read(CheckedClient(client, SOURCE), server.url + PATH)
    assert str(as_huggingface_hub_reads_it(server.url + PATH)) == str(raised.value)


def test_a_body(servers: Callable[..., RawServer], client: HubClient) -> None:
    server = servers("https")
    server.answer(PATH, "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /y")
    server.answer("/y", "HTTP/1.1 200 OK\r\nContent-Length: 600000", bytes(600_000))
    assert read(client, server.url + PATH) == bytes(600_000)
    assert server.headers()["user-agent"].startswith("weightferry/")
    with client.stream("GET", server.url + PATH, headers={}, subject="", follow_redirects=False) as response:
        assert (response.status, response.redirect) == (302, f"{server.url}/y")


def test_no_server(servers: Callable[..., RawServer], client: HubClient) -> None:
    server = servers()
    server.close()
    with pytest.raises(Unreachable, match="cannot connect to"):
        read(client, server.url + PATH)


def test_a_wrong_certificate(
    servers: Callable[..., RawServer], client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = servers("https"), create_authority(tmp_path)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(other))
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        read(client, server.url + PATH)


def test_silence(servers: Callable[..., RawServer], client: HubClient) -> None:
    server = servers()
    server.answers[PATH] = lambda connection: None
    with pytest.raises(Silent):
        read(client, server.url + PATH)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello"])
def test_a_broken_connection(servers: Callable[..., RawServer], client: HubClient, sent: bytes) -> None:
    server = servers()

    def send(connection: socket.socket) -> None:
        with contextlib.closing(connection):
            connection.sendall(sent)

    server.answers[PATH] = send
    with pytest.raises(TransientOriginError) as raised:
        read(client, server.url + PATH)
    assert type(raised.value) is TransientOriginError


def test_offline(client: HubClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OriginError, match="HF_HUB_OFFLINE"):
        read(client, "http://127.0.0.1:9/")
