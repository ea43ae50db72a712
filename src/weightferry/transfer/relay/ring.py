"""Join the ring of leaders: frames travel from each leader to its right neighbour, over a gloo group of the two.

A group of two ranks has one connection; a gloo group of all leaders would be a full mesh. The bytes of a frame go
straight from one file's mapping into the other's. Each side keeps several frames in flight: one at a time reached half
of 2 Gbit/s (pieces of 8 MiB, torch 2.13).

A wait on gloo cannot be interrupted, and a wait that times out closes the connection. So a sender without frames sends
a keep-alive every second, and a receiver that is told to stop notices.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from weightferry.cluster.coordinator import Coordinator
from weightferry.settings import Settings
from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.plan import TransferTask
from weightferry.transfer.relay.edge import POLL, BrokenEdge, Neighbour, connect
from weightferry.transfer.relay.queue import RelayQueue
from weightferry.transfer.relay.receiver import Receiver
from weightferry.transfer.relay.sender import Sender
from weightferry.transfer.transfer_session import TransferSession


def join_ring(
    task: TransferTask,
    piece_store: PieceStore,
    relay_queue: RelayQueue,
    settings: Settings,
    coordinator: Coordinator,
    session: TransferSession,
) -> AbstractContextManager[object]:
    """Connect to the neighbours, and start to send and to receive.

    Returns
    -------
    context manager
        Leave it when the transfer is over: that removes the keys by which neighbours met.
    """
    plan, leader = task.plan, coordinator.rank
    with contextlib.ExitStack() as stores:
        for left, right in plan.edges_of(leader):
            peer = left if right == leader else right
            store = stores.enter_context(coordinator.scoped_store(f"edge/{task.attempt}/{left}-{right}"))
            with _await_cause(settings, session):
                neighbour = Neighbour(coordinator.job_ranks[peer], task.hosts[peer])
                edge = connect(store, int(right == leader), neighbour, settings, session)
            if left == leader:
                threads = {"send": Sender(edge, relay_queue, piece_store, plan.pieces, session).run}
            else:
                receiver = Receiver(edge, piece_store, plan.pieces, relay_queue.update, session)
                threads = {"headers": receiver.receive_headers, "bodies": receiver.receive_bodies}
            for name, work in threads.items():
                session.start(name, _await_cause(settings, session)(work))
        return stores.pop_all()


@contextlib.contextmanager
def _await_cause(settings: Settings, session: TransferSession) -> Iterator[None]:
    """Delay `BrokenEdge` until the operation may have failed with the cause: the neighbour that died, and why."""
    try:
        yield
    except BrokenEdge:
        until = time.monotonic() + 2 * settings.beat_timeout  # a dead neighbour is known after one
        while time.monotonic() < until:
            session.check()
            time.sleep(POLL[1])
        raise
