"""Listens, reads requests, sends responses with the faults of the test, and closes all connections."""

from __future__ import annotations

import logging
import math
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, cast

from weightferry.testing.hub.body_sender import BodySender, prepare_reset, will_reset
from weightferry.testing.hub.faults import Exchange, Fault, Faults
from weightferry.testing.hub.messages import Request, Response, error_response, json_response
from weightferry.testing.hub.request_log import OpenRecord, RequestLog, RequestRecord, Side, summary
from weightferry.testing.hub.routes import Route, Routes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerState:
    """State that both addresses of a server share.

    Attributes
    ----------
    rate
        Bytes per second of every body; None: no limit.
    closing
        Is set when the server closes.
    """

    routes: Routes
    rate: float | None
    request_log: RequestLog = field(default_factory=RequestLog)
    faults: Faults = field(default_factory=Faults)
    closing: threading.Event = field(default_factory=threading.Event)


class Listener(ThreadingHTTPServer):
    """One address of a server: bound by the constructor, served from `start` to `close`.

    After `close`, no thread of it runs and no socket of it is open, also if clients keep their connections open.
    """

    request_queue_size = 1024  # thousands of ranks may connect at once; the default is 5

    state: ServerState

    def __init__(self, address: tuple[str, int], side: Side) -> None:
        self.side: Side = side
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        # The interval in seconds is the longest wait of `close` for this thread.
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.05,), name=f"{side}-accept", daemon=True)
        super().__init__(address, _Handler)

    def start(self, state: ServerState) -> None:
        """Accept connections, first those that arrived since the constructor."""
        self.state = state
        self._acceptor.start()

    def server_bind(self) -> None:
        """Bind without the DNS lookup of the host's name in the base class."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve the connection in a new thread that `close` can find."""
        thread = threading.Thread(target=self._serve, args=(request, client_address), name=self.side, daemon=True)
        with self._lock:
            self._connections[thread] = request
        thread.start()

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._connections[threading.current_thread()]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log unexpected errors; an `OSError` means that the client or `close` closed the connection."""
        if not isinstance(sys.exc_info()[1], OSError):
            _log.exception("a connection of the test server failed")

    def shutdown_request(self, request: Any) -> None:
        """Close a connection; without an orderly shutdown if it must be reset."""
        with suppress(OSError):
            if will_reset(request):
                self.close_request(request)
        super().shutdown_request(request)

    def close(self) -> None:
        """Stop listening, close every connection and wait for all threads."""
        if self._acceptor.is_alive():
            self.state.closing.set()
            self.shutdown()
            self._acceptor.join()
        self.server_close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections:
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and a short body are two writes; the second would wait 40 ms for the client's delayed ACK.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class's name
        """Log nothing: the request log has every request."""

    def version_string(self) -> str:
        """Return the Server header."""
        return "weightferry-testing-hub"

    def _serve(self) -> None:
        listener = cast("Listener", self.server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(listener.side, self.command, self.path, cast("Any", self.headers), body)
        route = _control_route(request, listener.state.request_log)
        if route is not None:
            self._send(route.respond(request), OpenRecord(_record(request, route)), listener.state, None)
            return
        route = listener.state.routes.find(request)
        record = listener.state.request_log.begin(_record(request, route))
        response = route.respond(request)
        fault = listener.state.faults.take(_exchange(request, route, response))
        if fault and fault.status is not None:
            response = error_response(fault.status, "a fault injected by the test").with_headers(fault.headers)
        elif fault and fault.ignore_range and response.used_range:
            without_range = replace(request, ranges=False)
            response = listener.state.routes.find(without_range).respond(without_range)
        self._send(response, record, listener.state, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _serve  # noqa: N815 -- the base class's names

    def _send(self, response: Response, record: OpenRecord, state: ServerState, fault: Fault | None) -> None:
        if fault and fault.delay is not None:
            self._pause(fault.delay, state.closing)
        if fault and fault.hang_up:
            self._end(reset=fault.reset)
            return
        chunked = response.chunked or bool(fault and fault.chunked)
        record.status = response.status
        self._send_headers(response, chunked=chunked)
        if self.command == "HEAD" or response.status == 304:
            return
        rate = (fault and fault.bytes_per_second) or state.rate
        sender = BodySender(self.connection, record, state.closing, rate, chunked=chunked)
        stop = _stop_offset(response, fault)
        sender.send(response.body, len(response.body) if stop is None else stop, fault.corrupt_at if fault else None)
        if fault and stop is not None:
            if stop == fault.silent_after:
                self._wait_for_close()
            self._end(reset=fault.reset and stop == fault.cut_after)

    def _send_headers(self, response: Response, *, chunked: bool) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif response.status != 304:
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()

    def _pause(self, seconds: float, closing: threading.Event) -> None:
        if math.isinf(seconds):
            self._wait_for_close()
        if math.isinf(seconds) or closing.wait(seconds):
            raise ConnectionAbortedError("the client or the server closed the connection")

    def _wait_for_close(self) -> None:
        while self.connection.recv(1 << 16):
            pass

    def _end(self, *, reset: bool) -> None:
        self.close_connection = True
        if reset:
            prepare_reset(self.connection)


def _record(request: Request, route: Route) -> RequestRecord:
    return RequestRecord(
        side=request.side,
        method=request.method,
        path=request.path,
        kind=route.kind,
        file=route.file,
        range=request.range,
        had_authorization="Authorization" in request.headers,
        user_agent=request.headers.get("User-Agent", ""),
    )


def _exchange(request: Request, route: Route, response: Response) -> Exchange:
    body_size = 0 if request.method == "HEAD" else len(response.body)
    file_range = range(0) if request.method == "HEAD" else response.file_range
    return Exchange(request.method, request.path, route.kind, body_size, file_range, response.used_range)


def _stop_offset(response: Response, fault: Fault | None) -> int | None:
    """Return the number of body bytes after which a fault stops; None if the whole body is sent."""
    stops = [] if fault is None else [stop for stop in (fault.cut_after, fault.silent_after) if stop is not None]
    return min((stop for stop in stops if stop < len(response.body)), default=None)


def _control_route(request: Request, request_log: RequestLog) -> Route | None:
    """Return the route to read or reset the counters, for other processes; the log has no record of it."""

    def reset() -> Response:
        request_log.clear()
        return json_response({})

    if request.path == "/-/stats":
        return Route("other", lambda: json_response(summary(request_log.records())))
    if request.path == "/-/reset":
        return Route("other", reset, methods=("POST",))
    return None
