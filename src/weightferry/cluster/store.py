"""Clients of a `torch.distributed` store, and functions that its type stubs (torch 2.13) lack."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cached_property
from typing import Any, TypeVar

from torch import distributed as dist

T = TypeVar("T")

_LOOK_EVERY = 0.25  # seconds between two checks whether an answer can still come
_EXIT_WAIT = 2.0  # seconds that the end of the process waits for a thread that was left behind


def put(store: dist.Store, key: str, value: bytes) -> None:
    """Set a key to bytes; the stub allows only text."""
    store.set(key, value)  # type: ignore[arg-type]


def clone(store: dist.Store) -> dist.Store:
    """Return another client of the same store (torch >= 2.8): a blocked client does not block the other one."""
    other: dist.Store = store.clone()  # type: ignore[attr-defined]
    return other


def store_host(store: dist.Store) -> str:
    """Return the name or address of the machine that holds a store; empty for a store without a server."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return str(store.host) if isinstance(store, dist.TCPStore) else ""


def call_abandonable(work: Callable[[], T], check: Callable[[], None]) -> T:
    """Run `work` in a thread of its own and return its value; `check` may raise to give up the wait.

    The thread then stays behind, inside a call that nothing can interrupt.
    """
    answer: Future[T] = Future()
    thread = threading.Thread(target=_answer, args=(work, answer), name="weightferry-call", daemon=True)
    thread.start()
    try:
        return _await(answer, check)
    except BaseException:
        # A thread that comes back from C++ while the interpreter ends would abort the process.
        atexit.register(thread.join, _EXIT_WAIT)
        raise


def _answer(work: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(work())
    except BaseException as error:  # noqa: BLE001 -- raised in the thread that waits
        answer.set_exception(error)


def _await(answer: Future[T], check: Callable[[], None]) -> T:
    while not wait([answer], _LOOK_EVERY).done:
        check()
    return answer.result()


class StoreCaller:
    """Makes calls in a thread of its own, so that the caller can stop waiting for the answer.

    When the process of the store is stopped, a call returns when that process continues, or never: `add`, `check` and
    `set` have no timeout (torch 2.13).
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="weightferry-store", daemon=True).start()

    def call(self, work: Callable[[], T], check: Callable[[], None]) -> T:
        """Run `work` and return its value; `check` may raise to give up the wait."""
        answer: Future[T] = Future()
        self._calls.put((work, answer))
        return _await(answer, check)

    def _run(self) -> None:
        while True:
            work, answer = self._calls.get()
            _answer(work, answer)
            del work, answer  # do not keep them until the next call


class StoreClients:
    """The two clients that a process needs of one store, made once and kept.

    A client whose thread waits blocks every other call on it. So there are two, and neither is the client of the
    process group. They are kept between operations because torch looks up the peer's name for each connection: where
    reverse DNS does not answer, that costs 5 s each time (seen with torch 2.13).

    Parameters
    ----------
    store
        A client of the store; the two clients are clones of it.

    Attributes
    ----------
    lost : bool
        Whether a call was given up. Its client is then blocked and unusable.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store, self.lost = store, False

    @cached_property
    def waiting(self) -> dist.Store:
        """The client of the thread that works and waits."""
        return clone(self.store)

    @cached_property
    def side(self) -> dist.Store:
        """The client of all other threads; no call on it may wait."""
        return clone(self.store)

    @cached_property
    def caller(self) -> StoreCaller:
        """Makes the calls on `waiting`."""
        return StoreCaller()


class RecordingStore(dist.Store):
    """A store that records which keys were set through it, so that they can be removed.

    Parameters
    ----------
    store
        The store that holds the keys.

    Attributes
    ----------
    busy : bool
        Whether a thread may be inside a call on `store` that nothing can interrupt.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store = store
        self._keys: set[str] = set()
        self.busy = False

    def run_blocking(self, work: Callable[[], T], check: Callable[[], None]) -> T:
        """Run `work`, which waits on this store and cannot be interrupted; see `call_abandonable`."""

        def inside() -> T:
            try:
                return work()
            finally:
                self.busy = False

        self.busy = True
        return call_abandonable(inside, check)

    def set(self, key: str, value: Any) -> None:
        """Set a key."""
        self._keys.add(key)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """Wait for a key and read it."""
        return self._store.get(key)

    def add(self, key: str, value: int) -> int:
        """Add to a counter."""
        self._keys.add(key)
        return self._store.add(key, value)

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys exist."""
        return self._store.check(keys)

    def wait(self, keys: list[str], *limit: Any) -> None:
        """Wait for keys."""
        self._store.wait(keys, *limit)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read keys."""
        return self._store.multi_get(keys)

    def remove_all(self, store: dist.Store) -> None:
        """Remove the recorded keys, through a client that is not blocked."""
        with contextlib.suppress(dist.DistError):
            for key in list(self._keys):
                store.delete_key(key)
