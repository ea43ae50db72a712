"""The coordinator of several ranks, on a `torch.distributed` store.

Keys below one prefix an operation: those of `StoreBarrier`; ``heartbeat/R`` holds the latest heartbeat of rank R with
its progress; ``informed`` and ``left`` count ranks that know of a failure and ranks that have left the operation. The
requests of a rank do not grow with the number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

from torch import distributed as dist

from weightferry.cluster.barrier import StoreBarrier
from weightferry.cluster.call_site import find_call_site
from weightferry.cluster.coordinator import Aborted, Coordinator
from weightferry.cluster.heartbeat import Heartbeat, HeartbeatSender, describe_calls, heartbeat_key
from weightferry.cluster.interfaces import local_address
from weightferry.cluster.launchers import Topology
from weightferry.cluster.phase_results import PhaseResult, RankResult
from weightferry.cluster.result_collector import JobState, ResultCollector
from weightferry.cluster.store import RecordingStore, StoreClients, clone, put, store_host
from weightferry.errors import CollectError, Failure, LeaderLost, from_failures
from weightferry.report.rank_progress import Progress
from weightferry.settings import Settings

logger = logging.getLogger(__name__)

# By operation, the function that users call.
_FUNCTIONS = {"collect": "collect_files", "load": "load_collected"}
_REMIND_EVERY = 60.0  # seconds between two warnings that rank 0 has not called
_POLL = 0.02  # seconds between two looks whether all ranks know of a failure

T = TypeVar("T")
R = TypeVar("R")


def _address_towards(store: dist.Store) -> str:
    host = store_host(store)
    return local_address(host) if host else ""


class DistributedCoordinator(Coordinator):
    """Runs an operation of several ranks.

    Guaranteed: no wait outlives the rank that it waits for by more than `beat_timeout` and two `beat_interval`, even
    when the process that holds the store is stopped and not dead.

    Parameters
    ----------
    clients
        Of the job's store.
    prefix
        All keys of this operation are below it. All ranks pass the same prefix, and no two operations share one.
    rank
        Of this process, among the ranks of the operation.
    job_ranks
        By rank of the operation, the rank in the job.
    operation
        Name of the operation, for errors.
    caller
        The frame of the user's code that made the call, for warnings about ranks that do not make it.
    """

    def __init__(
        self,
        clients: StoreClients,
        prefix: str,
        rank: int,
        job_ranks: Sequence[int],
        topology: Topology,
        settings: Settings,
        operation: str = "",
        caller: FrameType | None = None,
    ) -> None:
        address = _address_towards(clients.store)
        # Nodes may have one host name, and no number.
        node = f"{topology.host}/{topology.node_rank}/{address}"
        super().__init__(rank, len(job_ranks), topology.host, node, job_ranks)
        self._clients, self._settings, self._prefix, self._address = clients, settings, prefix, address
        self.operation = operation
        self._function, self._caller = _FUNCTIONS.get(operation, operation), caller
        self._began = self._reminded = time.monotonic()
        self._leaves_early = False
        self._phases: list[str] = []  # all phases so far, by their names in the store
        self._failed_phases: list[str] = []
        self._job = JobState(job_ranks)
        self._rank0_barrier: StoreBarrier | None = None
        self._heartbeats = self._new_heartbeats(None)
        with self._store_errors("agree"):
            # A connection to a store that is gone lasts for as long as the store's own timeout, twice.
            self._barrier = StoreBarrier(dist.PrefixStore(prefix, self._call(lambda: clients.waiting, "agree")))
            if rank == 0:
                side = self._call(lambda: clients.side, "agree")
                self._rank0_barrier = StoreBarrier(dist.PrefixStore(prefix, side))
                self._heartbeats = self._new_heartbeats(self._rank0_barrier)
            first = Heartbeat(0, call=find_call_site(self._function, caller, with_guard=False)).dumps()
            self._call(lambda: put(self._barrier.store, heartbeat_key(rank), first), "agree")
        self._heartbeats.start()

    def _new_heartbeats(self, barrier: StoreBarrier | None) -> HeartbeatSender:
        return HeartbeatSender(
            self.rank,
            self._settings,
            open_store=lambda: dist.PrefixStore(self._prefix, self._clients.side),
            barrier=barrier,
            current_phase=lambda: self._phases[-1] if self._phases else "",
            progress=self.progress,
            describe=lambda result: str(result.error(self) or ""),
            call_site=lambda: find_call_site(self._function, self._caller),
            job_ranks=self.job_ranks,
        )

    def check(self) -> None:
        """See `Coordinator.check`."""
        reason = self._heartbeats.failed_elsewhere(self._phases[-1] if self._phases else "")
        if self._heartbeats.is_cut_off() or reason is not None:
            raise Aborted(reason or "lost the connection to the job's store or to rank 0")

    def job_progress(self) -> Mapping[int, Progress]:
        """See `Coordinator.job_progress`."""
        return {**self._job.progress, **super().job_progress()}

    def address(self) -> str:
        """See `Coordinator.address`: the address that this machine uses towards the job's store.

        On the machine of the store it may be a loopback address.
        """
        return self._address

    @contextlib.contextmanager
    def scoped_store(self, name: str) -> Iterator[dist.Store]:
        """See `Coordinator.scoped_store`."""
        recording = RecordingStore(dist.PrefixStore(name, self._barrier.store))
        try:
            yield recording
        finally:
            with contextlib.suppress(CollectError, dist.DistError):
                if recording.busy:
                    # A thread still waits on that client, so the operation goes on with another one.
                    self._clients.lost = True
                    self._barrier.store = self._call(
                        lambda: dist.PrefixStore(self._prefix, clone(self._clients.store)), name
                    )
                if not self._heartbeats.is_cut_off():
                    self._call(lambda: recording.remove_all(dist.PrefixStore(name, self._barrier.store)), name)

    def _call(self, call: Callable[[], T], phase: str) -> T:
        """Make a call on the store that may block, for as long as rank 0 and the store answer."""

        def check() -> None:
            if self._heartbeats.is_cut_off():
                self._clients.lost = True
                silence = f"no heartbeat for {self._settings.beat_timeout:.0f} s, from rank 0 or from the job's store"
                raise self._rank0_lost(phase, silence)

        return self._clients.caller.call(call, check)

    def _run_phase(
        self,
        phase: str,
        work: Callable[[], T],
        combine: Callable[[Mapping[int, T]], R],
        ranks: Collection[int],
        role: str,
    ) -> R:
        # With the function: ranks that made different calls must never take a result of each other.
        key = f"{len(self._phases)}-{self._function}-{phase}"
        self._phases.append(key)
        cause: BaseException | None = None
        with self._store_errors(phase), self._collecting(key, phase, ranks, combine):
            if self.rank in ranks:
                published, cause = RankResult.of(self, phase, role, work)
                if not isinstance(cause, Aborted):
                    self._call(lambda: self._barrier.arrive(key, published), phase)
                if cause is not None and not isinstance(cause, Exception):
                    raise cause  # KeyboardInterrupt and SystemExit end the process
            result = self._call(lambda: self._wait(key, phase), phase)
            if result.failures:
                self._call(lambda: self._acknowledge_failure(key, result), phase)
        value: R = result.value_or_raise(self, None if isinstance(cause, Aborted) else cause)
        return value

    def _wait(self, key: str, phase: str) -> PhaseResult:
        # While rank 0 sends heartbeats, no wait may run into its timeout: torch logs a warning each time.
        check_every = max(2 * self._settings.beat_interval, self._settings.agree_timeout / 4)
        timeout = min(self._settings.beat_timeout, check_every)
        return self._barrier.wait(key, timeout, lambda: self._check_rank0_called(phase))

    def _check_rank0_called(self, phase: str) -> None:
        now = time.monotonic()
        waited = now - self._began
        if waited > self._settings.agree_timeout:
            calls = describe_calls(self._barrier.store, self.job_ranks)
            raise self._rank0_lost(phase, f"no call in {waited:.0f} s: {calls}")
        if now - self._reminded > _REMIND_EVERY:
            self._reminded = now
            logger.warning("waiting for %.0f s for rank %d, which has not called yet", waited, self.job_ranks[0])

    def _acknowledge_failure(self, key: str, result: PhaseResult) -> None:
        """Record that this rank knows of a failure. Rank 0 waits for the other ranks: the store may end with it."""
        self._failed_phases.append(key)
        informed = self._barrier.count_informed(key, 1)
        if self.rank == 0:
            lost = {failure.rank for failure in result.failures if failure.kind == LeaderLost.__name__}
            alive = sum(self.job_ranks[rank] not in lost for rank in self._job.hosts)  # of the ranks that have called
            # A rank that still works in the phase notices with its next heartbeat.
            until = time.monotonic() + 2 * self._settings.beat_interval
            while informed < alive and time.monotonic() < until:
                time.sleep(_POLL)
                informed = self._barrier.count_informed(key, 0)

    @contextlib.contextmanager
    def _store_errors(self, phase: str) -> Iterator[None]:
        """Raise `LeaderLost` when the store is gone: it lives in a process of the job, mostly that of rank 0."""
        try:
            yield
        except dist.DistError as error:
            self._heartbeats.cut_off()
            self._clients.lost = True
            text = f"the job's store is gone, so the rank or agent that held it has ended: {error}"
            raise self._rank0_lost(phase, text) from error

    def _rank0_lost(self, phase: str, text: str) -> CollectError:
        host = os.environ.get("MASTER_ADDR", "its host")
        rank = self.job_ranks[0]
        return from_failures({rank: Failure(rank, host, phase, LeaderLost.__name__, text)}, self.operation)

    @contextlib.contextmanager
    def _collecting(
        self, key: str, phase: str, ranks: Collection[int], combine: Callable[[Mapping[int, Any]], Any]
    ) -> Iterator[None]:
        """On rank 0, collect the results in a thread while this rank does its own part of the work."""
        if self._rank0_barrier is None:
            yield
            return
        collector = ResultCollector(
            self, self._rank0_barrier, self._job, self._function, key, phase, ranks, self._settings
        )
        thread = threading.Thread(target=collector.run, args=(combine,), name="weightferry-collect", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            collector.cancel()
            raise
        finally:
            thread.join()

    def wait_until_all_informed(self, seconds: float) -> None:
        """See `Coordinator.wait_until_all_informed`."""
        until = time.monotonic() + seconds
        with contextlib.suppress(dist.DistError, CollectError):
            informed = self._call(lambda: self._barrier.store.add("informed", 1), "close")
            while informed < self.world_size and time.monotonic() < until:
                time.sleep(0.1)
                informed = self._call(lambda: self._barrier.store.add("informed", 0), "close")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # With an error this rank may leave before the other ranks do, while rank 0 reads the heartbeats.
        self._leaves_early = kind is not None
        self.close()

    def close(self) -> None:
        """See `Coordinator.close`; the last rank to leave removes the keys of the operation."""
        self._heartbeats.stop()
        self._caller = None  # a frame keeps its local variables alive
        if self._heartbeats.is_cut_off():
            return  # the thread may be inside a call that does not return
        while not self._heartbeats.join(_POLL):
            if self._heartbeats.is_cut_off():
                return
        with contextlib.suppress(dist.DistError, CollectError):
            self._call(self._remove_keys, "close")

    def _remove_keys(self) -> None:
        store = self._barrier.store
        if self._leaves_early:
            # A read of a key that vanishes at this moment would block for as long as the store's timeout.
            put(store, heartbeat_key(self.rank), b"")
            store.add("left early", 1)
        else:
            store.delete_key(heartbeat_key(self.rank))
        if store.add("left", 1) == self.world_size:
            if store.check(["left early"]):
                for rank in range(self.world_size):
                    store.delete_key(heartbeat_key(rank))
                store.delete_key("left early")
            self._barrier.remove_keys(self._phases, self._failed_phases)
            self._barrier.remove_text("calls")
            store.delete_key("informed")
            store.delete_key("left")
