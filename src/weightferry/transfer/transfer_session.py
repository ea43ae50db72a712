"""Run one leader's transfer: its threads, its byte counts, its finished files, its first error."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterable

from weightferry.cluster.coordinator import Coordinator
from weightferry.transfer.incoming_file import ChecksumMismatch

_CHECK_EVERY = 0.2  # seconds between two checks whether the operation still runs
# The interpreter must not exit while one of these threads is inside gloo: the thread would end in the middle of C++
# code and abort the process (SIGABRT, torch 2.13).
_abandoned: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_JOIN_TIMEOUT = 5.0  # seconds; a neighbour that is alive closes its connection within two


@atexit.register
def _join_abandoned() -> None:
    until = time.monotonic() + _JOIN_TIMEOUT
    for thread in list(_abandoned):
        thread.join(max(0.0, until - time.monotonic()))


class Stopped(Exception):
    """Raised in a thread when another thread of the same leader has failed."""


class TransferSession:
    """Runs the threads of one leader's transfer and waits for them.

    A thread that is told to stop may be inside a call that ends later. It is abandoned: it changes nothing once that
    call returns, and delays the exit of the process for some seconds at most.

    Parameters
    ----------
    control
        Of the operation. Counts bytes, and raises when the operation has failed on another rank.
    missing
        The files that must arrive, by index.

    Attributes
    ----------
    origin_bytes, copied_bytes, peer_bytes_in, peer_bytes_out : int
        Bytes transferred so far.
    sha256, mismatches : dict
        The result of each file that has arrived.
    stop : threading.Event
        Set when the threads must stop.
    """

    def __init__(self, coordinator: Coordinator, missing: Iterable[int]) -> None:
        self._coordinator, self._awaited = coordinator, set(missing)
        self.origin_bytes = self.copied_bytes = self.peer_bytes_in = self.peer_bytes_out = 0
        self.sha256: dict[int, str] = {}
        self.mismatches: dict[int, ChecksumMismatch] = {}
        self.stop = threading.Event()
        self._running = 0
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"TransferSession({self._running} threads, {len(self._awaited)} files missing, error={self._error!r})"

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread; an error that it raises ends the transfer."""
        thread = threading.Thread(target=self._run, args=(work,), name=f"weightferry-{name}", daemon=True)
        with self._changed:
            self._running += 1
            self._threads.append(thread)
        thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 -- raised again in `wait`
            self.fail(error)
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End the transfer. The first error is the cause; later ones may only be threads that were told to stop."""
        with self._changed:
            self._error = self._error or error
            self.stop.set()
            self._changed.notify_all()

    def finish_file(self, index: int, end: str | ChecksumMismatch | Exception) -> None:
        """Record the result of a file: its SHA-256, a checksum mismatch, or an error, which ends the transfer."""
        if isinstance(end, Exception):
            self.fail(end)
            return
        with self._changed:
            if isinstance(end, ChecksumMismatch):
                self.mismatches[index] = end
            else:
                self.sha256[index] = end
            self._awaited.discard(index)
            self._changed.notify_all()

    def count_bytes(self, count: int) -> None:
        """Count bytes that came from the origin."""
        with self._changed:
            self.origin_bytes += count
        self._coordinator.count_bytes(count)

    def count_copied(self, count: int) -> None:
        """Count bytes that came from the user's Hugging Face cache."""
        with self._changed:
            self.copied_bytes += count
        self._coordinator.count_bytes(count)

    def count_received(self, count: int) -> None:
        """Count bytes that came from a peer."""
        with self._changed:
            self.peer_bytes_in += count
        self._coordinator.count_bytes(count, peer=True)

    def count_sent(self, count: int) -> None:
        """Count bytes that went to a peer."""
        with self._changed:
            self.peer_bytes_out += count

    def check(self) -> None:
        """Raise when this transfer has failed here or on another rank."""
        if self.stop.is_set():
            raise Stopped
        self._coordinator.check()

    def wait(self) -> None:
        """Wait until all threads have ended and all files have arrived.

        Raises
        ------
        BaseException
            The first error of the transfer.
        """
        try:
            with self._changed:
                while self._error is None and (self._running or self._awaited):
                    self._changed.wait(_CHECK_EVERY)
                    self._coordinator.check()
            if self._error is not None:
                raise self._error
        except BaseException:
            self.stop.set()
            _abandoned.update(self._threads)
            raise
        for thread in self._threads:
            thread.join()  # its gloo objects are freed then too
