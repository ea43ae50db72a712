"""Sends response bodies from memory or disk, with a rate limit and faults, and counts the sent bytes."""

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

from weightferry.testing.hub.commits import BLOCK_SIZE, read_hole
from weightferry.testing.hub.messages import FileSlice
from weightferry.testing.hub.request_log import OpenRecord

# Seconds between two sends with a rate limit: the client sees a smooth rate, and the CPU load stays low.
_SEND_INTERVAL = 0.02
_NO_LINGER = struct.pack("ii", 1, 0)


class _ByteSource(Protocol):
    def send(self, connection: socket.socket, start: int, count: int) -> int:
        """Send at most `count` bytes from `start` on, and return the number sent."""

    def byte(self, position: int) -> int:
        """Return the byte at an offset."""


class _MemorySource:
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def send(self, connection: socket.socket, start: int, count: int) -> int:
        return connection.send(self._data[start : start + count])

    def byte(self, position: int) -> int:
        return self._data[position]


class _FileSource:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, connection: socket.socket, start: int, count: int) -> int:
        if zeros := read_hole(self._descriptor, start, count):
            return connection.send(zeros)
        return os.sendfile(connection.fileno(), self._descriptor, start, count)

    def byte(self, position: int) -> int:
        return os.pread(self._descriptor, 1, position)[0]


@contextmanager
def _open_source(source: bytes | Path) -> Iterator[_ByteSource]:
    if isinstance(source, bytes):
        yield _MemorySource(source)
        return
    descriptor = os.open(source, os.O_RDONLY)
    try:
        yield _FileSource(descriptor)
    finally:
        os.close(descriptor)


class BodySender:
    """Sends one body, and counts the sent bytes in the request's record.

    Parameters
    ----------
    closing
        Set when the server closes; a body with a rate limit then ends.
    rate
        Bytes per second; None: no limit.
    chunked
        Send the body in chunks.
    """

    def __init__(
        self,
        connection: socket.socket,
        record: OpenRecord,
        closing: threading.Event,
        rate: float | None,
        *,
        chunked: bool,
    ) -> None:
        self._connection = connection
        self._record = record
        self._closing = closing
        self._rate = rate
        self._chunked = chunked

    def send(self, body: bytes | FileSlice, count: int, corrupt_at: int | None = None) -> None:
        """Send the first `count` bytes of the body; invert the byte at offset `corrupt_at` of its file.

        Raises
        ------
        OSError
            The client closed the connection, the server closes, or the file became shorter.
        """
        slice_ = body if isinstance(body, FileSlice) else None
        start = slice_.start if slice_ is not None else 0
        began = time.monotonic()
        with _open_source(slice_.blob.source if slice_ is not None else body) as source:  # type: ignore[arg-type]
            for first, last in _split(start, start + count, self._block_size(), corrupt_at):
                self._frame(b"%x\r\n" % (last - first))
                self._send_all(source, first, last, invert=first == corrupt_at)
                self._frame(b"\r\n")
                if self._rate:
                    self._wait_until(began + (last - start) / self._rate)
        if count == len(body):
            self._frame(b"0\r\n\r\n")

    def _block_size(self) -> int:
        return BLOCK_SIZE if self._rate is None else min(BLOCK_SIZE, max(1, int(self._rate * _SEND_INTERVAL)))

    def _frame(self, framing: bytes) -> None:
        if self._chunked:
            self._connection.sendall(framing)

    def _send_all(self, source: _ByteSource, start: int, stop: int, *, invert: bool) -> None:
        while start < stop:
            # Count before the send: a client that has the last byte may read the log before this thread runs again.
            self._record.body_bytes += stop - start
            sent = 0
            try:
                if invert:
                    sent = self._connection.send(bytes([source.byte(start) ^ 0xFF]))
                else:
                    sent = source.send(self._connection, start, stop - start)
            finally:
                self._record.body_bytes -= stop - start - sent
            if not sent:
                raise ConnectionAbortedError("the file became shorter")
            start += sent

    def _wait_until(self, deadline: float) -> None:
        if self._closing.wait(max(0.0, deadline - time.monotonic())):
            raise ConnectionAbortedError("the server closes")


def _split(start: int, stop: int, block_size: int, separate: int | None) -> Iterator[tuple[int, int]]:
    """Divide a range into blocks, with the byte at `separate` in its own block."""
    while start < stop:
        end = min(start + block_size, stop)
        if separate is not None and start <= separate < end:
            end = separate if start < separate else start + 1
        yield start, end
        start = end


def prepare_reset(connection: socket.socket) -> None:
    """Make the next close send RST, after the client's kernel has received all sent bytes."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        unsent = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        if not int.from_bytes(unsent, "little"):
            break
        time.sleep(0.001)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


def will_reset(connection: socket.socket) -> bool:
    """Whether `prepare_reset` was called."""
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == _NO_LINGER
