"""Run one leader's part of the plan: read its pieces, relay them, publish each file when its checksum matches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from weightferry.cache.survey import CacheSurveyor
from weightferry.cluster.coordinator import Coordinator
from weightferry.origins.base import Origin
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.transfer.incoming_file import ChecksumMismatch
from weightferry.transfer.origin_reader import OriginReader
from weightferry.transfer.piece_store import PieceStore
from weightferry.transfer.plan import TransferTask
from weightferry.transfer.relay.queue import RelayQueue
from weightferry.transfer.transfer_session import Stopped, TransferSession

# Files hashed at a time. SHA-256 runs at 1.8 GB/s a core (measured), so four keep up with 50 Gbit/s.
_HASH_THREADS = 4


@dataclass(frozen=True)
class TransferResult:
    """What one leader transferred.

    Attributes
    ----------
    origin_bytes : int
        Bytes from the origin, those of broken attempts included.
    peer_bytes_in, peer_bytes_out : int
        Bytes from the left neighbour, and to the right one.
    copied_bytes : int
        Bytes from the user's Hugging Face cache.
    sha256 : mapping of int to str
        Of the published files, by their index in `Manifest.staged()`.
    mismatches : mapping of int to ChecksumMismatch
        The files with wrong bytes, by index; they are not published.
    """

    origin_bytes: int = 0
    peer_bytes_in: int = 0
    peer_bytes_out: int = 0
    sha256: Mapping[int, str] = field(default_factory=dict)
    mismatches: Mapping[int, ChecksumMismatch] = field(default_factory=dict)
    copied_bytes: int = 0

    def __add__(self, later: TransferResult) -> TransferResult:
        return TransferResult(
            self.origin_bytes + later.origin_bytes,
            self.peer_bytes_in + later.peer_bytes_in,
            self.peer_bytes_out + later.peer_bytes_out,
            {**self.sha256, **later.sha256},
            later.mismatches,
            self.copied_bytes + later.copied_bytes,
        )


def run_transfer(
    task: TransferTask,
    surveyor: CacheSurveyor,
    settings: Settings,
    coordinator: Coordinator,
    origins: Callable[[str, Settings], Origin] = origin_for,
    user_cache: Path | None = None,
) -> TransferResult:
    """Do this leader's part of the plan.

    Parameters
    ----------
    surveyor
        Of this domain's cache; holds the locks of the missing files.
    origins
        Creates the origin of a scheme.
    user_cache
        The Hugging Face cache of the user. None: ``HF_HUB_CACHE``.

    Raises
    ------
    CollectError, OSError
        The first error. Published files stay. The next run continues from the bytes that arrived of other files. No
        incomplete file has a final name.
    """
    plan, leader = task.plan, coordinator.rank
    session = TransferSession(coordinator, task.missing)
    with ExitStack() as stack:
        stack.callback(session.stop.set)
        hash_pool = ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="weightferry-hash")
        # The exit waits for this pool: no thread may publish a file after its lock is released.
        stack.callback(hash_pool.shutdown, cancel_futures=True)
        piece_store = PieceStore(surveyor, task.missing, plan.pieces, hash_pool, session.finish_file)
        stack.callback(piece_store.close)
        relay_queue = RelayQueue(plan.pieces, plan.relayed_by(leader), piece_store)
        coordinator.expect_bytes(plan.bytes_for(leader))
        piece_store.begin()
        relay_queue.update()
        reader = OriginReader(piece_store, relay_queue.update, settings, session, origins, user_cache)
        stack.callback(reader.close)
        reader.start(plan.reads[leader], plan.pieces)
        if plan.edges_of(leader):
            from weightferry.transfer.relay.ring import join_ring  # torch is only needed where there are neighbours

            with suppress(Stopped):  # a read failed meanwhile: the session has its error
                stack.enter_context(join_ring(task, piece_store, relay_queue, settings, coordinator, session))
        session.wait()
    counts = (session.origin_bytes, session.peer_bytes_in, session.peer_bytes_out)
    return TransferResult(*counts, session.sha256, session.mismatches, session.copied_bytes)
