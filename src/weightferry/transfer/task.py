"""What a leader does for its domain: read its pieces, pass them round, publish each file when it is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from weightferry.cache.survey import CacheSurveyor
from weightferry.cluster.coordinator import Coordinator
from weightferry.origins.base import Origin, origin_for
from weightferry.settings import Settings
from weightferry.transfer.incoming_file import ChecksumMismatch
from weightferry.transfer.origin_reader import OriginReader
from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.plan import TransferTask
from weightferry.transfer.relay.queue import RelayQueue
from weightferry.transfer.session import TransferSession

# Files hashed at a time: SHA-256 runs at 1.8 GB/s a core (measured), so four keep up with 50 Gbit/s.
_HASHERS = 4


@dataclass(frozen=True)
class TransferResult:
    """What one leader did.

    Attributes
    ----------
    origin_bytes : int
        Bytes that came from the origin, those of broken attempts included.
    peer_bytes_in, peer_bytes_out : int
        Bytes that came from the left neighbour, and that went to the right one.
    copied_bytes : int
        Bytes that came from the user's Hugging Face cache.
    sha256 : mapping of int to str
        Of the files that were published, by their place in `Manifest.staged()`.
    wrong : mapping of int to Wrong
        Files that came with other bytes than promised; they are not published.
    """

    origin_bytes: int = 0
    peer_bytes_in: int = 0
    peer_bytes_out: int = 0
    sha256: Mapping[int, str] = field(default_factory=dict)
    wrong: Mapping[int, ChecksumMismatch] = field(default_factory=dict)
    copied_bytes: int = 0

    def __add__(self, later: TransferResult) -> TransferResult:
        return TransferResult(
            self.origin_bytes + later.origin_bytes,
            self.peer_bytes_in + later.peer_bytes_in,
            self.peer_bytes_out + later.peer_bytes_out,
            {**self.sha256, **later.sha256},
            later.wrong,
            self.copied_bytes + later.copied_bytes,
        )


def bring(
    task: TransferTask,
    surveyor: CacheSurveyor,
    settings: Settings,
    coordinator: Coordinator,
    origins: Callable[[str, Settings], Origin] = origin_for,
) -> TransferResult:
    """Do this leader's part of the plan.

    Parameters
    ----------
    surveyor
        Of this domain's cache; its locks are held.

    Raises
    ------
    CollectError, OSError
        The first thing that went wrong. What was published before stays; what had come of other files is found by the
        next run. Nothing half-written has a final name.
    """
    plan, me = task.plan, coordinator.rank
    session = TransferSession(coordinator, task.lacking)
    with ExitStack() as left:
        left.callback(session.stop.set)
        hashers = ThreadPoolExecutor(_HASHERS, thread_name_prefix="weightferry-hash")
        # Waited for: nobody publishes once the locks are given back.
        left.callback(hashers.shutdown, cancel_futures=True)
        piece_store = PieceStore(surveyor, task.lacking, plan.pieces, hashers, session.ended)
        left.callback(piece_store.close)
        relay_queue = RelayQueue(plan.pieces, plan.passed_by(me), piece_store)
        coordinator.expect(plan.bytes_for(me))
        piece_store.begin()
        relay_queue.look()
        reading = OriginReader(piece_store, relay_queue.look, settings, session, origins)
        left.callback(reading.close)
        reading.start(plan.reads[me], plan.pieces)
        if plan.edges_of(me):
            from weightferry.transfer.relay.ring import join  # torch is only needed where there are neighbours

            left.enter_context(join(task, piece_store, relay_queue, settings, coordinator, session))
        session.wait()
    moved = (session.origin_bytes, session.peer_bytes_in, session.peer_bytes_out)
    return TransferResult(*moved, session.sha256, session.wrong, session.copied_bytes)
