"""Receive frames from the left neighbour."""

from __future__ import annotations

import queue
from collections.abc import Callable

import torch
from torch import distributed as dist

from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.pieces import Frame, Piece
from weightferry.transfer.relay.edge import Edge
from weightferry.transfer.relay.frames import ACKNOWLEDGE_TAG, END, FRAMES_IN_FLIGHT, IDLE, KEEP_ALIVE, message_tag
from weightferry.transfer.relay.queue import RelayFrame
from weightferry.transfer.transfer_session import TransferSession


class Receiver:
    """Receives frames into the piece store until the neighbour has sent all.

    It runs in two threads: `receive_headers` prepares a buffer for each announced frame, `receive_bodies` records the
    frames that have arrived.

    Parameters
    ----------
    on_bytes
        Called with the index of a file after more of its bytes were recorded.
    """

    def __init__(
        self,
        edge: Edge,
        piece_store: PieceStore,
        pieces: tuple[Piece, ...],
        on_bytes: Callable[[int], None],
        session: TransferSession,
    ) -> None:
        self._edge, self._piece_store, self._pieces = edge, piece_store, pieces
        self._on_bytes, self._session = on_bytes, session
        self._received = 0
        self._in_flight: queue.Queue[tuple[RelayFrame, dist.Work | None, torch.Tensor] | None] = queue.Queue(
            FRAMES_IN_FLIGHT
        )

    def receive_headers(self) -> None:
        """Receive headers, and start to receive the frames that they announce."""
        header = torch.zeros(4, dtype=torch.int64)
        while not self._session.stop.is_set():
            self._edge.wait(self._receive(header))
            number, start, stop, last = header.tolist()
            if number == END:
                self._put(None)
                return
            if number != KEEP_ALIVE:
                relay_frame = RelayFrame(Frame(number, start, stop), bool(last))
                buffer = self._buffer(relay_frame.frame)
                self._put((relay_frame, self._receive(buffer) if len(buffer) else None, buffer))

    def receive_bodies(self) -> None:
        """Record the frames that have arrived, and confirm at the end that all have."""
        while not self._session.stop.is_set():
            try:
                entry = self._in_flight.get(timeout=IDLE)
            except queue.Empty:
                continue
            if entry is None:
                self._edge.wait(self._edge.send(torch.zeros(1, dtype=torch.int64), ACKNOWLEDGE_TAG))
                return
            relay_frame, work, buffer = entry
            if work is not None:
                self._edge.wait(work)
            self._record(relay_frame, buffer)
            self._session.count_received(len(buffer))
            for index in self._pieces[relay_frame.frame.piece].files:
                self._on_bytes(index)

    def _buffer(self, frame: Frame) -> torch.Tensor:
        if frame.stop == frame.start:
            return torch.zeros(0, dtype=torch.uint8)
        bundle = self._pieces[frame.piece].bundle
        memory = bytearray(frame.stop - frame.start) if bundle else self._piece_store.window(frame)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _record(self, relay_frame: RelayFrame, buffer: torch.Tensor) -> None:
        piece, content = self._pieces[relay_frame.frame.piece], memoryview(buffer.numpy().data)
        if piece.bundle:
            self._piece_store.publish_bundle(piece, content, str(self._edge.neighbour))
        else:
            self._piece_store.record_frame(relay_frame.frame, content, last=relay_frame.last)

    def _receive(self, buffer: torch.Tensor) -> dist.Work:
        self._received += 1
        return self._edge.receive(buffer, message_tag(self._received))

    def _put(self, entry: tuple[RelayFrame, dist.Work | None, torch.Tensor] | None) -> None:
        while not self._session.stop.is_set():
            try:
                self._in_flight.put(entry, timeout=IDLE)
            except queue.Full:
                continue
            return
