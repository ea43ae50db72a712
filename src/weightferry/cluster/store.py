"""Clients of a `torch.distributed` store, and what its type stubs (torch 2.13) leave out."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cached_property
from typing import Any, TypeVar

from torch import distributed as dist

T = TypeVar("T")

_LOOK_EVERY = 0.25  # seconds between two looks whether an answer is still to be expected


def put(store: dist.Store, key: str, value: bytes) -> None:
    """Set a key to bytes; the stub knows text alone."""
    store.set(key, value)  # type: ignore[arg-type]


def clone(store: dist.Store) -> dist.Store:
    """Make another client of the same store (torch >= 2.8): one that waits does not block the other."""
    other: dist.Store = store.clone()  # type: ignore[attr-defined]
    return other


def call_abandonable(work: Callable[[], T], check: Callable[[], None]) -> T:
    """Return what `work` returns, in a thread of its own, or raise what `check` raises while it has not returned.

    The thread is then left behind, inside a call that nothing ends.
    """
    answer: Future[T] = Future()
    threading.Thread(target=_answer, args=(work, answer), name="weightferry-call", daemon=True).start()
    return _await(answer, check)


def _answer(work: Callable[[], T], answer: Future[T]) -> None:
    try:
        answer.set_result(work())
    except BaseException as error:  # noqa: BLE001 -- raised where the answer is waited for
        answer.set_exception(error)


def _await(answer: Future[T], check: Callable[[], None]) -> T:
    while not wait([answer], _LOOK_EVERY).done:
        check()
    return answer.result()


class StoreCaller:
    """Makes calls in a thread of its own, so that whoever wants the answer can stop waiting for it.

    A call on a store whose process is stopped returns when that process goes on, or never: no client has a time limit
    for `add`, `check` and `set` (torch 2.13).
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="weightferry-store", daemon=True).start()

    def call(self, work: Callable[[], T], check: Callable[[], None]) -> T:
        """Return what `work` returns, or raise what `check` raises while it has not returned."""
        answer: Future[T] = Future()
        self._calls.put((work, answer))
        return _await(answer, check)

    def _run(self) -> None:
        while True:
            work, answer = self._calls.get()
            _answer(work, answer)
            del work, answer  # not kept until the next call


class StoreClients:
    """The two clients that a process needs of one store, made once and kept.

    A client that waits blocks every other call on it, hence two, and neither is the caller's own. They are kept from
    one operation to the next because torch looks up the peer's name for each connection: where reverse DNS does not
    answer, that costs 5 s each time (seen with torch 2.13).

    Parameters
    ----------
    store
        The store to be another client of.

    Attributes
    ----------
    lost : bool
        Set when a call was given up: its client is no longer of use.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store, self.lost = store, False

    @cached_property
    def waiting(self) -> dist.Store:
        """For the thread that works and waits."""
        return clone(self.store)

    @cached_property
    def side(self) -> dist.Store:
        """For everything beside it; nothing on this one may wait."""
        return clone(self.store)

    @cached_property
    def caller(self) -> StoreCaller:
        """Makes the calls on `waiting`."""
        return StoreCaller()


class RecordingStore(dist.Store):
    """A store that remembers which keys were set through it, so that they can be removed.

    Parameters
    ----------
    store
        Where they go.

    Attributes
    ----------
    busy : bool
        Whether somebody may be inside a call on `store` that nothing ends.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store = store
        self._keys: set[str] = set()
        self.busy = False

    def lend(self, work: Callable[[], T], check: Callable[[], None]) -> T:
        """Let `work` wait on this store inside a call that cannot be ended; see `call_abandonable`."""

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
        """Whether all keys are there."""
        return self._store.check(keys)

    def wait(self, keys: list[str], *limit: Any) -> None:
        """Wait for keys."""
        self._store.wait(keys, *limit)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read keys."""
        return self._store.multi_get(keys)

    def remove_all(self, store: dist.Store) -> None:
        """Remove what was set, by a client that is free."""
        with contextlib.suppress(dist.DistError):
            for key in list(self._keys):
                store.delete_key(key)
