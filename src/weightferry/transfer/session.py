"""The course of one leader's transfer: its threads, what has moved, which files have come, what went wrong first."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterable

from weightferry.cluster.coordinator import Coordinator
from weightferry.transfer.incoming_file import ChecksumMismatch

_LOOK_EVERY = 0.2  # seconds between two looks whether the operation still goes on
# The interpreter must not end while one of these is inside gloo: it is then ended in the middle of C++, and takes the
# process with it (SIGABRT, torch 2.13).
_left_behind: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_UNTIL_OUT = 5.0  # seconds; neighbours that are alive close their connections within two


@atexit.register
def _await_left_behind() -> None:
    until = time.monotonic() + _UNTIL_OUT
    for thread in list(_left_behind):
        thread.join(max(0.0, until - time.monotonic()))


class Stopped(Exception):
    """Another thread of the same leader failed: this one gives up."""


class TransferSession:
    """Runs the threads of a transfer and waits for them.

    Threads that are told to stop may be inside a call that ends later: they are left behind, touch nothing any more
    once it returns, and keep the process alive for some seconds at most.

    Parameters
    ----------
    control
        Of the operation: bytes are told to it, and it says when there is no point in going on.
    lacking
        The files that must come, by place.

    Attributes
    ----------
    origin_bytes, copied_bytes, peer_bytes_in, peer_bytes_out : int
        What has moved so far.
    sha256, wrong : dict
        What became of the files that have come.
    stop : threading.Event
        Set when there is no point in going on.
    """

    def __init__(self, coordinator: Coordinator, lacking: Iterable[int]) -> None:
        self._coordinator, self._awaited = coordinator, set(lacking)
        self.origin_bytes = self.copied_bytes = self.peer_bytes_in = self.peer_bytes_out = 0
        self.sha256: dict[int, str] = {}
        self.wrong: dict[int, ChecksumMismatch] = {}
        self.stop = threading.Event()
        self._running = 0
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"TransferSession({self._running} threads, {len(self._awaited)} files to come, error={self._error!r})"

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread; what it raises ends the transfer."""
        thread = threading.Thread(target=self._run, args=(work,), name=f"weightferry-{name}", daemon=True)
        with self._changed:
            self._running += 1
            self._threads.append(thread)
        thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 -- raised again where the transfer is waited for
            self.fail(error)
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End the transfer; the first failure in time is the cause, others may only have been told to stop."""
        with self._changed:
            self._error = self._error or error
            self.stop.set()
            self._changed.notify_all()

    def ended(self, index: int, end: str | ChecksumMismatch | Exception) -> None:
        """Note what became of a file."""
        if isinstance(end, Exception):
            self.fail(end)
            return
        with self._changed:
            if isinstance(end, ChecksumMismatch):
                self.wrong[index] = end
            else:
                self.sha256[index] = end
            self._awaited.discard(index)
            self._changed.notify_all()

    def moved(self, count: int) -> None:
        """Count bytes from the origin."""
        with self._changed:
            self.origin_bytes += count
        self._coordinator.moved(count)

    def copied(self, count: int) -> None:
        """Count bytes from the user's Hugging Face cache."""
        with self._changed:
            self.copied_bytes += count
        self._coordinator.moved(count)

    def received(self, count: int) -> None:
        """Count bytes from a peer."""
        with self._changed:
            self.peer_bytes_in += count
        self._coordinator.moved(count, peer=True)

    def sent(self, count: int) -> None:
        """Count bytes to a peer."""
        with self._changed:
            self.peer_bytes_out += count

    def check(self) -> None:
        """Raise when there is no point in going on."""
        if self.stop.is_set():
            raise Stopped
        self._coordinator.check()

    def wait(self) -> None:
        """Wait until all threads are done and all files have come.

        Raises
        ------
        BaseException
            The first thing that went wrong.
        """
        try:
            with self._changed:
                while self._error is None and (self._running or self._awaited):
                    self._changed.wait(_LOOK_EVERY)
                    self._coordinator.check()
            if self._error is not None:
                raise self._error
        except BaseException:
            self.stop.set()
            _left_behind.update(self._threads)
            raise
        for thread in self._threads:
            thread.join()  # what it held of gloo is gone too then
