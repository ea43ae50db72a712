"""Servers that send exactly the bytes that a test chooses, over TLS if it wants."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from tests.conftest import need


class RawServer:
    """Answers each request with bytes that a test chooses; counts connections and keeps the requests.

    Attributes
    ----------
    answers
        By path, a function that gets the connection after the request was read.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Callable[[socket.socket], None]] = {}
        self.requests: list[str] = []
        self.connections = 0
        self._context = context
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        self._start(self._accept)

    def answer(self, path: str, head: str, body: bytes = b"", keep: bool = True) -> None:
        def send(connection: socket.socket) -> None:
            connection.sendall(head.encode("latin-1") + b"\r\n\r\n" + body)
            if not keep:
                connection.close()

        self.answers[path] = send

    def headers(self, number: int = -1) -> dict[str, str]:
        lines = self.requests[number].split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}

    def close(self) -> None:
        """End the threads; each closes its own socket, since the number of a closed one is used again."""
        for opened in (self._socket, *self._open):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._socket.close()

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                self._open.append(connection)
                self._start(self._handle, connection)

    def _handle(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            if self._context:
                connection = stack.enter_context(self._context.wrap_socket(connection, server_side=True))
                self._open.append(connection)
            self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        while request := self._read_head(connection):
            self.requests.append(request)
            self.answers[request.split()[1]](connection)

    def _read_head(self, connection: socket.socket) -> str:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            got = connection.recv(1)
            if not got:
                return ""
            head += got
        return head.decode("latin-1")


class Proxy(RawServer):
    """Connects CONNECT requests to their target; other requests are answered by `answers`, by the whole URL."""

    refuses = False

    def _serve(self, connection: socket.socket) -> None:
        request = self._read_head(connection)
        self.requests.append(request)
        method, target, _ = request.split(maxsplit=2)
        if self.refuses:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        elif method != "CONNECT":
            self.answers[target](connection)
            self._read_head(connection)
        else:
            host, _, port = target.partition(":")
            with socket.create_connection((host, int(port))) as other:
                self._open.append(other)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                self._start(self._copy, connection, other)
                self._copy(other, connection)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while got := source.recv(1 << 16):
                target.sendall(got)


def create_authority(folder: Path) -> Path:
    """Create a certificate authority, and a certificate of it for 127.0.0.1; return the authority's certificate."""
    need(shutil.which("openssl"), "openssl is not installed: apt-get install openssl")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    new, ca = "-newkey rsa:2048 -nodes -keyout", "-CA authority.pem -CAkey authority.key -CAcreateserial"
    use = "-addext keyUsage=critical,keyCertSign"  # Python 3.13 insists on it
    for command in (
        f"req -x509 {new} authority.key -subj /CN=authority {use} -days 2 -out authority.pem",
        f"req {new} server.key -subj /CN=127.0.0.1 -out server.csr",
        f"x509 -req -in server.csr {ca} -days 2 -extfile extensions -out server.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder / "authority.pem"


def server_context(authority: Path) -> ssl.SSLContext:
    """Return the context of a server with the certificate for 127.0.0.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.with_name("server.pem"), authority.with_name("server.key"))
    return context
