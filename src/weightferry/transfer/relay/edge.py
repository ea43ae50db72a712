"""A connection between two neighbours in the ring: a gloo group of two ranks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from weightferry.cluster.interfaces import interface_of, interface_towards, is_loopback
from weightferry.cluster.store import RecordingStore
from weightferry.errors import CollectError
from weightferry.origins.retry import Monitor
from weightferry.settings import Settings

POLL = (0.002, 0.05)
"""Seconds between two looks whether the neighbour has arrived: the first, the longest."""


class BrokenEdge(CollectError):
    """The connection to a neighbour closed; the result of that neighbour says why."""


@dataclass(frozen=True)
class Neighbour:
    """The leader at the other end of an edge.

    Attributes
    ----------
    rank : int
        In the job.
    host : str
    """

    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


class Edge:
    """A connection between two neighbours.

    Parameters
    ----------
    group
        Of two ranks; rank 0 in it sends frames, rank 1 receives them.
    settings
        `stall_timeout` limits every wait.
    neighbour
        For errors.
    """

    def __init__(self, group: dist.ProcessGroup, settings: Settings, neighbour: Neighbour) -> None:
        self._group, self._settings, self.neighbour = group, settings, neighbour
        self._peer = 1 - group.rank()

    def send(self, data: torch.Tensor, tag: int) -> dist.Work:
        """Start to send."""
        with _gloo_errors(self.neighbour):
            return self._group.send([data], self._peer, tag)

    def receive(self, data: torch.Tensor, tag: int) -> dist.Work:
        """Start to receive."""
        with _gloo_errors(self.neighbour):
            return self._group.recv([data], self._peer, tag)

    def wait(self, work: dist.Work) -> None:
        """Wait until a send or receive is complete.

        Raises
        ------
        BrokenEdge
            The neighbour has closed the connection, or nothing arrived for `stall_timeout`.
        """
        with _gloo_errors(self.neighbour):
            work.wait(timedelta(seconds=self._settings.stall_timeout))


@contextlib.contextmanager
def _gloo_errors(neighbour: Neighbour) -> Iterator[None]:
    """Turn the errors of gloo, a RuntimeError for any cause, into `BrokenEdge`."""
    try:
        yield
    except RuntimeError as error:
        raise BrokenEdge(f"the connection to {neighbour} broke: {error}") from error


def connect(
    store: RecordingStore, side: int, neighbour: Neighbour, settings: Settings, monitor: Monitor, address: str = ""
) -> Edge:
    """Connect to a neighbour; side 0 sends, side 1 receives.

    No leader waits inside gloo for a neighbour that may never come: both announce themselves on the store first, with
    the address by which they are reached. So no host name has to resolve.

    Parameters
    ----------
    address
        The address of this rank, as `Coordinator.address` gives it.
    """
    store.set(f"here/{side}", address)
    pause, longest = POLL
    while not store.check([f"here/{1 - side}"]):
        monitor.check()
        time.sleep(pause)
        pause = min(2 * pause, longest)
    peer_address = store.get(f"here/{1 - side}").decode()
    timeout = timedelta(seconds=2 * settings.beat_timeout)
    gloo_store = dist.PrefixStore("gloo", store)
    # The type stubs (torch 2.13) know only that this class exists.
    gloo: Any = dist.ProcessGroupGloo
    options: Any = timeout
    interface = "" if os.environ.get("GLOO_SOCKET_IFNAME") else _interface(address, peer_address, neighbour)
    with _gloo_errors(neighbour):
        if interface:
            options = gloo._Options()  # noqa: SLF001 -- the only way to choose a device
            options._timeout, options._devices = timeout, [gloo.create_device(interface=interface)]  # noqa: SLF001
        # The neighbour may die while gloo connects, and this leader must still learn the result of the operation.
        group = store.run_blocking(lambda: gloo(gloo_store, side, 2, options), monitor.check)
        return Edge(group, settings, neighbour)


def _interface(address: str, peer_address: str, neighbour: Neighbour) -> str:
    """Choose the interface of an edge: the one that leads to the job's store, or else to the neighbour."""
    if address and not is_loopback(address):
        return interface_of(address)
    # The store is on this machine. The address of the neighbour shows the interface that other machines reach.
    if peer_address and not is_loopback(peer_address):
        return interface_towards(peer_address)
    return interface_of(address) if address and peer_address else interface_towards(neighbour.host)
