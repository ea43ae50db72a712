"""Sends bodies: from memory and from disk, at a rate, in chunks, damaged or cut, and counts what really went out."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from weightferry.testing.hub.commits import STEP, hole
from weightferry.testing.hub.records import OpenRecord
from weightferry.testing.hub.wire import FileSlice

# With a rate, steps are this many seconds apart: smooth to a client, and no burden for the machine.
_BEAT = 0.02
_LINGER_NONE = struct.pack("ii", 1, 0)


class _Source(Protocol):
    def send(self, connection: socket.socket, start: int, count: int) -> int:
        """Send some of the `count` bytes from `start` on and return how many it were."""

    def byte(self, position: int) -> int:
        """Return one byte."""


class _Memory:
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def send(self, connection: socket.socket, start: int, count: int) -> int:
        return connection.send(self._data[start : start + count])

    def byte(self, position: int) -> int:
        return self._data[position]


class _File:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, connection: socket.socket, start: int, count: int) -> int:
        if nothing := hole(self._descriptor, start, count):
            return connection.send(nothing)
        return os.sendfile(connection.fileno(), self._descriptor, start, count)

    def byte(self, position: int) -> int:
        return os.pread(self._descriptor, 1, position)[0]


@contextmanager
def _opened(source: bytes | Path) -> Iterator[_Source]:
    if isinstance(source, bytes):
        yield _Memory(source)
        return
    descriptor = os.open(source, os.O_RDONLY)
    try:
        yield _File(descriptor)
    finally:
        os.close(descriptor)


class Sender:
    """Sends one body and keeps `line` up to date.

    Parameters
    ----------
    closing
        Set when the server closes; a paced body ends then.
    rate
        Bytes per second; None: as fast as it goes.
    chunked
        Frame the body in chunks.
    """

    def __init__(
        self,
        connection: socket.socket,
        line: OpenRecord,
        closing: threading.Event,
        rate: float | None,
        *,
        chunked: bool,
    ) -> None:
        self._connection = connection
        self._line = line
        self._closing = closing
        self._rate = rate
        self._chunked = chunked

    def send(self, body: bytes | FileSlice, count: int, corrupt_at: int | None = None) -> None:
        """Send the first `count` bytes of the body, the byte at offset `corrupt_at` of its file inverted.

        Raises
        ------
        OSError
            If the client hangs up, the server closes, or the file has become shorter.
        """
        part = body if isinstance(body, FileSlice) else None
        start = part.start if part is not None else 0
        begun = time.monotonic()
        with _opened(part.blob.source if part is not None else body) as source:  # type: ignore[arg-type]
            for first, last in _steps(start, start + count, self._step(), corrupt_at):
                self._frame(b"%x\r\n" % (last - first))
                self._send_all(source, first, last, invert=first == corrupt_at)
                self._frame(b"\r\n")
                if self._rate:
                    self._wait_until(begun + (last - start) / self._rate)
        if count == len(body):
            self._frame(b"0\r\n\r\n")

    def _step(self) -> int:
        return STEP if self._rate is None else min(STEP, max(1, int(self._rate * _BEAT)))

    def _frame(self, framing: bytes) -> None:
        if self._chunked:
            self._connection.sendall(framing)

    def _send_all(self, source: _Source, start: int, stop: int, *, invert: bool) -> None:
        while start < stop:
            # Counted before: a client that has the last byte may look at the records before this thread runs again.
            self._line.body_bytes += stop - start
            sent = 0
            try:
                if invert:
                    sent = self._connection.send(bytes([source.byte(start) ^ 0xFF]))
                else:
                    sent = source.send(self._connection, start, stop - start)
            finally:
                self._line.body_bytes -= stop - start - sent
            if not sent:
                raise ConnectionAbortedError("the file has become shorter")
            start += sent

    def _wait_until(self, moment: float) -> None:
        if self._closing.wait(max(0.0, moment - time.monotonic())):
            raise ConnectionAbortedError("the server closes")


def _steps(start: int, stop: int, step: int, alone: int | None) -> Iterator[tuple[int, int]]:
    """Divide bytes into steps, with the byte `alone` in one of its own."""
    while start < stop:
        end = min(start + step, stop)
        if alone is not None and start <= alone < end:
            end = alone if start < alone else start + 1
        yield start, end
        start = end


def prepare_reset(connection: socket.socket) -> None:
    """Let the coming close send RST, after the client's kernel has taken what was sent before."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        waiting = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        if not int.from_bytes(waiting, "little"):
            break
        time.sleep(0.001)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)


def is_to_be_reset(connection: socket.socket) -> bool:
    """Whether `prepare_reset` was called."""
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == _LINGER_NONE
