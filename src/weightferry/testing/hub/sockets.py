"""The sockets of a Hub server: reads requests, lets faults have their way with the answers, and closes everything."""

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

from weightferry.testing.hub.faults import Exchange, Fault, Faults
from weightferry.testing.hub.records import OpenRecord, RequestLog, RequestRecord, Side, summary
from weightferry.testing.hub.routes import Route, Routes
from weightferry.testing.hub.sending import Sender, is_to_be_reset, prepare_reset
from weightferry.testing.hub.wire import Answer, Request, error, json_answer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What both addresses of a server share.

    Attributes
    ----------
    rate
        Bytes per second of every body; None: as fast as it goes.
    closing
        Set when the server closes.
    """

    routes: Routes
    rate: float | None
    ledger: RequestLog = field(default_factory=RequestLog)
    faults: Faults = field(default_factory=Faults)
    closing: threading.Event = field(default_factory=threading.Event)


class Listener(ThreadingHTTPServer):
    """One address of a server: bound when it is made, served from `start` to `close`.

    After `close` none of its threads runs and none of its sockets is open, whatever its clients do.
    """

    request_queue_size = 1024  # thousands of ranks may connect at once; the default is 5

    service: Service

    def __init__(self, address: tuple[str, int], side: Side) -> None:
        self.side: Side = side
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        # The interval (seconds) is how long a close waits for the acceptor.
        self._acceptor = threading.Thread(target=self.serve_forever, args=(0.05,), name=f"{side}-accept", daemon=True)
        super().__init__(address, _Handler)

    def start(self, service: Service) -> None:
        """Answer, the connections first that came since the address was bound."""
        self.service = service
        self._acceptor.start()

    def server_bind(self) -> None:
        """Bind without asking DNS for the name of the host, as the base class does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread of its own, which `close` can find."""
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
        """Log what is a bug; that a client goes away, or `close` takes a connection from its thread, is none."""
        if not isinstance(sys.exc_info()[1], OSError):
            _log.exception("a connection of the test server failed")

    def shutdown_request(self, request: Any) -> None:
        """End a connection; one that is to be reset must not say goodbye first."""
        with suppress(OSError):
            if is_to_be_reset(request):
                self.close_request(request)
        super().shutdown_request(request)

    def close(self) -> None:
        """Stop listening, end every connection and wait for all threads."""
        if self._acceptor.is_alive():
            self.service.closing.set()
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
    # A head and a short body are two writes; the second would wait 40 ms for the client's delayed ACK.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 the name is the base class's
        """Say nothing: the ledger has it all."""

    def version_string(self) -> str:
        """Name the server in each answer."""
        return "weightferry-testing-hub"

    def _serve(self) -> None:
        listener = cast("Listener", self.server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(listener.side, self.command, self.path, cast("Any", self.headers), body)
        route = _control(request, listener.service.ledger)
        if route is not None:
            self._deliver(route.answer(request), OpenRecord(_record(request, route)), listener.service, None)
            return
        route = listener.service.routes.find(request)
        line = listener.service.ledger.begin(_record(request, route))
        answer = route.answer(request)
        fault = listener.service.faults.take(_exchange(request, route, answer))
        if fault and fault.status is not None:
            answer = error(fault.status, "a fault of the test server").with_headers(fault.headers)
        elif fault and fault.ignore_range and answer.ranged:
            whole = replace(request, ranges=False)
            answer = listener.service.routes.find(whole).answer(whole)
        self._deliver(answer, line, listener.service, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _serve  # noqa: N815 the names are the base class's

    def _deliver(self, answer: Answer, line: OpenRecord, service: Service, fault: Fault | None) -> None:
        if fault and fault.delay is not None:
            self._pause(fault.delay, service.closing)
        if fault and fault.hang_up:
            self._end(reset=fault.reset)
            return
        chunked = answer.chunked or bool(fault and fault.chunked)
        line.status = answer.status
        self._send_head(answer, chunked=chunked)
        if self.command == "HEAD" or answer.status == 304:
            return
        rate = (fault and fault.bytes_per_second) or service.rate
        sender = Sender(self.connection, line, service.closing, rate, chunked=chunked)
        stop = _stop(answer, fault)
        sender.send(answer.body, len(answer.body) if stop is None else stop, fault.corrupt_at if fault else None)
        if fault and stop is not None:
            if stop == fault.silent_after:
                self._stay_silent()
            self._end(reset=fault.reset and stop == fault.cut_after)

    def _send_head(self, answer: Answer, *, chunked: bool) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif answer.status != 304:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()

    def _pause(self, seconds: float, closing: threading.Event) -> None:
        if math.isinf(seconds):
            self._stay_silent()
        if math.isinf(seconds) or closing.wait(seconds):
            raise ConnectionAbortedError("nobody waits for the answer any more")

    def _stay_silent(self) -> None:
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


def _exchange(request: Request, route: Route, answer: Answer) -> Exchange:
    length = 0 if request.method == "HEAD" else len(answer.body)
    span = range(0) if request.method == "HEAD" else answer.span
    return Exchange(request.method, request.path, route.kind, length, span, answer.ranged)


def _stop(answer: Answer, fault: Fault | None) -> int | None:
    """Return after how many bytes of the body a fault ends it; None where it goes out whole."""
    stops = [] if fault is None else [stop for stop in (fault.cut_after, fault.silent_after) if stop is not None]
    return min((stop for stop in stops if stop < len(answer.body)), default=None)


def _control(request: Request, ledger: RequestLog) -> Route | None:
    """Serve the counters to other processes; these requests are not in the ledger."""

    def reset() -> Answer:
        ledger.clear()
        return json_answer({})

    if request.path == "/-/stats":
        return Route("other", lambda: json_answer(summary(ledger.records())))
    if request.path == "/-/reset":
        return Route("other", reset, methods=("POST",))
    return None
