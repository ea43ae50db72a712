"""Clients of a `torch.distributed` store, and the two calls that its type stubs (torch 2.13) leave out."""

from __future__ import annotations

from functools import cached_property

from torch import distributed as dist


def put(store: dist.Store, key: str, value: bytes) -> None:
    """Set a key to bytes; the stub knows text alone."""
    store.set(key, value)  # type: ignore[arg-type]


def clone(store: dist.Store) -> dist.Store:
    """Make another client of the same store (torch >= 2.8): one that waits does not block the other."""
    other: dist.Store = store.clone()  # type: ignore[attr-defined]
    return other


class Clients:
    """The two clients that a process needs of one store, made once and kept.

    A client that waits blocks every other call on it, hence two, and neither is the caller's own. They are kept from
    one operation to the next because torch looks up the peer's name for each connection: where reverse DNS does not
    answer, that costs 5 s each time (seen with torch 2.13).

    Parameters
    ----------
    store
        The store to be another client of.
    """

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    @cached_property
    def waiting(self) -> dist.Store:
        """For the thread that works and waits."""
        return clone(self.store)

    @cached_property
    def side(self) -> dist.Store:
        """For everything beside it; nothing on this one may wait."""
        return clone(self.store)
