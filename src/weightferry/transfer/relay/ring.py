"""The ring of leaders: frames travel from one to its right neighbour, over a gloo group of the two.

A group of two has one connection; a gloo group of all leaders would be a full mesh. Each frame is a header of four
numbers and then its bytes, straight from one file's mapping into the other's. Both sides have several frames under way:
one at a time reached half of 2 Gbit/s (pieces of 8 MiB, torch 2.13).

A wait on gloo cannot be interrupted, and one that times out closes the connection. So a sender that has nothing to send
says so every second, and a receiver that is told to stop notices.
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from weightferry.cluster.coordinator import Coordinator
from weightferry.cluster.interfaces import interface_towards
from weightferry.cluster.store import RecordingStore
from weightferry.errors import CollectError
from weightferry.origins.retry import Monitor
from weightferry.settings import Settings
from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.pieces import Frame, Piece
from weightferry.transfer.plan import TransferTask
from weightferry.transfer.relay.queue import RelayFrame, RelayQueue
from weightferry.transfer.session import TransferSession

_UNDER_WAY = 3
"""Frames between their first and their last byte, on each side of a connection."""
_IDLE = 1.0  # seconds without a frame after which the sender says that it is still there
_LOOK = (0.002, 0.05)  # seconds between two looks whether the neighbour has come: the first, the longest
_NOTHING, _END = -1, -2


class BrokenEdge(CollectError):
    """A neighbour's connection closed: why, its own outcome tells."""


@dataclass(frozen=True)
class Neighbour:
    """The leader at the other end.

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
        Of two; rank 0 in it sends frames, rank 1 receives them.
    settings
        `stall_timeout` limits every wait.
    neighbour
        For errors.
    """

    def __init__(self, group: dist.ProcessGroup, settings: Settings, neighbour: Neighbour) -> None:
        self._group, self._settings, self.neighbour = group, settings, neighbour
        self._peer = 1 - group.rank()

    def send(self, data: torch.Tensor, tag: int) -> dist.Work:
        """Begin to send."""
        with _named(self.neighbour):
            return self._group.send([data], self._peer, tag)

    def receive(self, data: torch.Tensor, tag: int) -> dist.Work:
        """Begin to receive."""
        with _named(self.neighbour):
            return self._group.recv([data], self._peer, tag)

    def wait(self, work: dist.Work) -> None:
        """Wait until it is done.

        Raises
        ------
        BrokenEdge
            The neighbour is gone, or nothing came for `stall_timeout`.
        """
        with _named(self.neighbour):
            work.wait(timedelta(seconds=self._settings.stall_timeout))


@contextlib.contextmanager
def _named(neighbour: Neighbour) -> Iterator[None]:
    """Turn what gloo raises, a RuntimeError whatever happened, into the one thing that it means."""
    try:
        yield
    except RuntimeError as error:
        raise BrokenEdge(f"the connection to {neighbour} broke: {error}") from error


def connect(store: RecordingStore, side: int, neighbour: Neighbour, settings: Settings, monitor: Monitor) -> Edge:
    """Meet a neighbour; side 0 sends, side 1 receives.

    Nobody waits inside gloo for a neighbour that may never come: both say that they are there first.
    """
    store.set(f"here/{side}", "")
    pause, longest = _LOOK
    while not store.check([f"here/{1 - side}"]):
        monitor.check()
        time.sleep(pause)
        pause = min(2 * pause, longest)
    limit = timedelta(seconds=2 * settings.beat_timeout)
    met = dist.PrefixStore("gloo", store)
    # Of the class, the type stubs (torch 2.13) know only that it exists.
    gloo: Any = dist.ProcessGroupGloo
    options: Any = limit
    interface = "" if os.environ.get("GLOO_SOCKET_IFNAME") else interface_towards(neighbour.host)
    with _named(neighbour):
        if interface:
            options = gloo._Options()  # noqa: SLF001 -- the only way to name a device
            options._timeout, options._devices = limit, [gloo.create_device(interface=interface)]  # noqa: SLF001
        # The neighbour may die inside, and what becomes of the operation must be heard all the same.
        return Edge(store.lend(lambda: gloo(met, side, 2, options), monitor.check), settings, neighbour)


class Sender:
    """Sends what `relay_queue` hands out until all is sent and the neighbour has it."""

    def __init__(
        self,
        edge: Edge,
        relay_queue: RelayQueue,
        piece_store: PieceStore,
        pieces: tuple[Piece, ...],
        session: TransferSession,
    ) -> None:
        self._edge, self._relay_queue, self._piece_store, self._pieces, self._session = (
            edge,
            relay_queue,
            piece_store,
            pieces,
            session,
        )
        self._sent = 0
        self._under_way: deque[tuple[dist.Work, Any]] = deque()

    def run(self) -> None:
        """Send; ends early when told to stop."""
        while not self._relay_queue.finished and not self._session.stop.is_set():
            relay_frame = self._relay_queue.take(_IDLE)
            if relay_frame is None:
                self._header(_NOTHING)
                self._settle(0)
            else:
                self._relay_frame(relay_frame)
                self._settle(_UNDER_WAY)
        if not self._session.stop.is_set():
            self._header(_END)
            self._settle(0)
            # Whoever leaves first closes the connection, with what is still in it.
            self._edge.wait(self._edge.receive(torch.zeros(1, dtype=torch.int64), 1))

    def _relay_frame(self, relay_frame: RelayFrame) -> None:
        frame, piece = relay_frame.frame, self._pieces[relay_frame.frame.piece]
        self._header(frame.piece, frame.start, frame.stop, int(relay_frame.last))
        if frame.stop > frame.start:
            data = bytearray(self._piece_store.bundle(piece)) if piece.bundle else self._piece_store.window(frame)
            self._begin(torch.frombuffer(data, dtype=torch.uint8))
            self._session.sent(frame.stop - frame.start)

    def _header(self, number: int, start: int = 0, stop: int = 0, last: int = 0) -> None:
        self._begin(torch.tensor([number, start, stop, last], dtype=torch.int64))

    def _begin(self, data: torch.Tensor) -> None:
        # Every message has a tag of its own: none is taken for another.
        self._sent += 1
        self._under_way.append((self._edge.send(data, 2 * self._sent), data))

    def _settle(self, left: int) -> None:
        while len(self._under_way) > 2 * left:
            self._edge.wait(self._under_way.popleft()[0])


class Receiver:
    """Receives frames into their places until the neighbour has sent all.

    Two threads: `headers` makes room for each frame that is announced, `bodies` takes note of those that have come.
    """

    def __init__(
        self,
        edge: Edge,
        piece_store: PieceStore,
        pieces: tuple[Piece, ...],
        came: Callable[[int], None],
        session: TransferSession,
    ) -> None:
        self._edge, self._piece_store, self._pieces, self._came, self._session = (
            edge,
            piece_store,
            pieces,
            came,
            session,
        )
        self._received = 0
        self._under_way: queue.Queue[tuple[RelayFrame, dist.Work | None, torch.Tensor] | None] = queue.Queue(_UNDER_WAY)

    def headers(self) -> None:
        """Take what is announced."""
        header = torch.zeros(4, dtype=torch.int64)
        while not self._session.stop.is_set():
            self._edge.wait(self._next(header))
            number, start, stop, last = header.tolist()
            if number == _END:
                self._put(None)
                return
            if number != _NOTHING:
                relay_frame = RelayFrame(Frame(number, start, stop), bool(last))
                room = self._room(relay_frame.frame)
                self._put((relay_frame, self._next(room) if len(room) else None, room))

    def bodies(self) -> None:
        """Note what has come, and say at the end that all has."""
        while not self._session.stop.is_set():
            try:
                entry = self._under_way.get(timeout=_IDLE)
            except queue.Empty:
                continue
            if entry is None:
                self._edge.wait(self._edge.send(torch.zeros(1, dtype=torch.int64), 1))
                return
            relay_frame, work, room = entry
            if work is not None:
                self._edge.wait(work)
            self._keep(relay_frame, room)
            self._session.received(len(room))
            for index in self._pieces[relay_frame.frame.piece].files:
                self._came(index)

    def _room(self, frame: Frame) -> torch.Tensor:
        if frame.stop == frame.start:
            return torch.zeros(0, dtype=torch.uint8)
        bundle = self._pieces[frame.piece].bundle
        buffer = bytearray(frame.stop - frame.start) if bundle else self._piece_store.window(frame)
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def _keep(self, relay_frame: RelayFrame, room: torch.Tensor) -> None:
        piece, content = self._pieces[relay_frame.frame.piece], memoryview(room.numpy().data)
        if piece.bundle:
            self._piece_store.unbundle(piece, content, str(self._edge.neighbour))
        else:
            self._piece_store.came(relay_frame.frame, content, last=relay_frame.last)

    def _next(self, room: torch.Tensor) -> dist.Work:
        self._received += 1
        return self._edge.receive(room, 2 * self._received)

    def _put(self, entry: tuple[RelayFrame, dist.Work | None, torch.Tensor] | None) -> None:
        while not self._session.stop.is_set():
            try:
                self._under_way.put(entry, timeout=_IDLE)
            except queue.Full:
                continue
            return


def join(
    task: TransferTask,
    piece_store: PieceStore,
    relay_queue: RelayQueue,
    settings: Settings,
    coordinator: Coordinator,
    session: TransferSession,
) -> AbstractContextManager[object]:
    """Connect to the neighbours, and begin to send and to receive.

    Returns
    -------
    context manager
        To be left when the transfer is over: it removes what neighbours met by.
    """
    plan, me = task.plan, coordinator.rank
    with contextlib.ExitStack() as met:
        for left, right in plan.edges_of(me):
            other = left if right == me else right
            store = met.enter_context(coordinator.meeting(f"edge/{task.attempt}/{left}-{right}"))
            with _patience(settings, session):
                neighbour = Neighbour(coordinator.names[other], task.hosts[other])
                edge = connect(store, int(right == me), neighbour, settings, session)
            if left == me:
                works = {"send": Sender(edge, relay_queue, piece_store, plan.pieces, session).run}
            else:
                receiver = Receiver(edge, piece_store, plan.pieces, relay_queue.look, session)
                works = {"headers": receiver.headers, "bodies": receiver.bodies}
            for name, work in works.items():
                session.start(name, _patience(settings, session)(work))
        return met.pop_all()


@contextlib.contextmanager
def _patience(settings: Settings, session: TransferSession) -> Iterator[None]:
    """Let a broken connection not be the cause while it may still be heard who broke it, and why."""
    try:
        yield
    except BrokenEdge:
        until = time.monotonic() + 2 * settings.beat_timeout  # a dead neighbour is known after one
        while time.monotonic() < until:
            session.check()
            time.sleep(_LOOK[1])
        raise
