"""Send frames to the right neighbour."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import distributed as dist

from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.pieces import Piece
from weightferry.transfer.relay.edge import Edge
from weightferry.transfer.relay.frames import ACKNOWLEDGE_TAG, END, FRAMES_IN_FLIGHT, IDLE, KEEP_ALIVE, message_tag
from weightferry.transfer.relay.queue import RelayFrame, RelayQueue
from weightferry.transfer.transfer_session import TransferSession


class Sender:
    """Sends the frames of a relay queue until all are sent and the neighbour has confirmed them."""

    def __init__(
        self,
        edge: Edge,
        relay_queue: RelayQueue,
        piece_store: PieceStore,
        pieces: tuple[Piece, ...],
        session: TransferSession,
    ) -> None:
        self._edge, self._relay_queue, self._piece_store = edge, relay_queue, piece_store
        self._pieces, self._session = pieces, session
        self._sent = 0
        self._in_flight: deque[tuple[dist.Work, Any]] = deque()

    def run(self) -> None:
        """Send all frames; ends early when the session stops."""
        while not self._relay_queue.finished and not self._session.stop.is_set():
            relay_frame = self._relay_queue.take(IDLE)
            if relay_frame is None:
                self._send_header(KEEP_ALIVE)
                self._complete_sends(0)
            else:
                self._send_frame(relay_frame)
                self._complete_sends(FRAMES_IN_FLIGHT)
        if not self._session.stop.is_set():
            self._send_header(END)
            self._complete_sends(0)
            # The side that leaves first closes the connection, and drops the bytes that are still in it.
            self._edge.wait(self._edge.receive(torch.zeros(1, dtype=torch.int64), ACKNOWLEDGE_TAG))

    def _send_frame(self, relay_frame: RelayFrame) -> None:
        frame, piece = relay_frame.frame, self._pieces[relay_frame.frame.piece]
        self._send_header(frame.piece, frame.start, frame.stop, int(relay_frame.last))
        if frame.stop > frame.start:
            data = bytearray(self._piece_store.read_bundle(piece)) if piece.bundle else self._piece_store.window(frame)
            self._send(torch.frombuffer(data, dtype=torch.uint8))
            self._session.count_sent(frame.stop - frame.start)

    def _send_header(self, number: int, start: int = 0, stop: int = 0, last: int = 0) -> None:
        self._send(torch.tensor([number, start, stop, last], dtype=torch.int64))

    def _send(self, data: torch.Tensor) -> None:
        self._sent += 1
        self._in_flight.append((self._edge.send(data, message_tag(self._sent)), data))

    def _complete_sends(self, frames_left: int) -> None:
        while len(self._in_flight) > 2 * frames_left:  # a frame has a header and a body
            self._edge.wait(self._in_flight.popleft()[0])
