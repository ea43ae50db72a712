"""Ranks that are killed or stopped: the others say who, and nobody hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from torch import distributed

from tests.multiprocess import jobs
from tests.multiprocess.nodes import HOST, Nodes, check_cache, sha256s
from weightferry.cluster.connect import process_group_coordinator
from weightferry.errors import LeaderLost
from weightferry.settings import Settings
from weightferry.testing.hub import Fault, HubServer
from weightferry.testing.ranks import RankOutcome
from weightferry.transfer.relay.edge import Neighbour, connect

WEIGHTS = os.urandom(12_000_000)  # three pieces: both leaders read
BEAT_TIMEOUT = 4.0  # seconds; one look-up of a peer's name by torch (see nodes.py) must fit
ROOM = 10.0  # for a machine that is busy with other tests


@contextmanager
def slow_nodes(place: Path) -> Iterator[Nodes]:
    """Nodes whose transfer takes minutes."""
    with HubServer() as hub:
        hub.add_repo("org/model", {"w.bin": WEIGHTS})
        hub.faults.add(Fault(path_suffix="w.bin", bytes_per_second=10_000, times=None))
        nodes = Nodes(hub, place)
        nodes.variables["WEIGHTFERRY_BEAT_TIMEOUT"] = str(BEAT_TIMEOUT)
        yield nodes


@dataclass(frozen=True)
class Loss:
    """A job that lost one rank: its nodes, the other ranks, and the seconds until the last of them ended."""

    nodes: Nodes
    survivors: list[RankOutcome]
    seconds: float


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Loss]]:
    """Four jobs at the same time. Each loses another rank in the middle of its transfer; by the number of that rank."""
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        nodes = [stack.enter_context(slow_nodes(tmp_path_factory.mktemp("lost"))) for _ in range(4)]
        yield list(threads.map(lose, nodes, range(4)))


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.05)


def both_read(nodes: Nodes) -> bool:
    return sum(request.file_bytes > 0 for request in nodes.hub.requests) == 3


def lose(nodes: Nodes, rank: int) -> Loss:
    """Kill one rank in the middle of the transfer, and check that nothing half done is left."""
    with nodes.start(partial(jobs.stage, "org/model")) as ranks:
        wait_for(partial(both_read, nodes))
        ranks.signal(rank, signal.SIGKILL)
        began = time.monotonic()
        outcomes = ranks.outcomes(100.0)
        seconds = time.monotonic() - began
    assert outcomes[rank].exitcode == -signal.SIGKILL
    for leader in (0, 2):
        assert not list(nodes.cache(leader).glob("hub/*/blobs/*"))
        assert not list(nodes.cache(leader).glob("hub/*/snapshots/*/*"))
    return Loss(nodes, outcomes[:rank] + outcomes[rank + 1 :], seconds)


@pytest.mark.parametrize("rank", [2, 3, 1], ids=["leader", "its follower", "follower of rank 0"])
def test_a_rank_is_killed_during_the_transfer(losses: list[Loss], rank: int) -> None:
    survivors = losses[rank].survivors
    assert losses[rank].seconds < BEAT_TIMEOUT + ROOM
    for outcome in survivors:
        assert type(outcome.error) is LeaderLost, outcome
        assert {(f.rank, f.host, f.phase) for f in outcome.error.failures.values()} == {(rank, HOST, "transfer")}
    assert len({str(outcome.error) for outcome in survivors}) == 1
    assert f"failed in transfer on {HOST} (rank {rank}" in str(survivors[0].error)


def test_rank_0_is_killed_and_takes_the_store_with_it(losses: list[Loss]) -> None:
    assert losses[0].seconds < BEAT_TIMEOUT + ROOM
    assert [type(outcome.error) for outcome in losses[0].survivors] == [LeaderLost] * 3


def test_the_next_job_takes_over_from_a_killed_leader(losses: list[Loss]) -> None:
    nodes = losses[2].nodes
    nodes.hub.faults.clear()
    seen = nodes.run(jobs.stage, "org/model")
    assert [files for _, files in seen] == [sha256s({"w.bin": WEIGHTS})] * 4
    for rank in (0, 2):
        check_cache(nodes.cache(rank))


def test_a_rank_that_leaves_before_it_calls(nodes: Nodes) -> None:
    nodes.variables["WEIGHTFERRY_AGREE_TIMEOUT"] = "3"
    nodes.variables |= {"WEIGHTFERRY_BEAT_INTERVAL": "0.3", "WEIGHTFERRY_BEAT_TIMEOUT": str(BEAT_TIMEOUT)}
    call = partial(jobs.stage, __file__)
    (gots,) = nodes.tries(partial(jobs.by_rank, {3: partial(time.sleep, 6)}, call))
    for got in gots[:3]:
        assert type(got.error) is LeaderLost
        assert set(got.error.failures) == {3}
        assert "failed in agree on " in str(got.error)
        assert "did not call within" in str(got.error)
        assert got.seconds < 3 + BEAT_TIMEOUT + ROOM


def test_rank_0_never_calls(nodes: Nodes) -> None:
    nodes.variables["WEIGHTFERRY_AGREE_TIMEOUT"] = "3"
    nodes.variables |= {"WEIGHTFERRY_BEAT_INTERVAL": "0.3", "WEIGHTFERRY_BEAT_TIMEOUT": "2"}
    call = partial(jobs.stage, __file__)
    (gots,) = nodes.tries(partial(jobs.by_rank, {0: partial(time.sleep, 8)}, call))
    for got in gots[1:]:
        assert type(got.error) is LeaderLost
        assert set(got.error.failures) == {0}
        assert got.seconds < 5 + ROOM


def test_a_rank_that_ends_inside_the_call(nodes: Nodes) -> None:
    """Its process goes on; only this call was interrupted, as by Ctrl-C."""
    gots, after = nodes.tries(interrupted_on_rank_1, partial(jobs.stage, __file__))
    assert gots[1].value == "interrupted"
    for got in (gots[0], gots[2], gots[3]):
        assert got.error is not None
        assert set(getattr(got.error, "failures", ())) == {1}
        assert "KeyboardInterrupt" in str(got.error)
    assert [got.error for got in after] == [None] * 4


def interrupted_on_rank_1() -> object:
    import weightferry

    def condition() -> bool:
        if jobs.rank() == 1:
            raise KeyboardInterrupt
        return True

    pretrainer = weightferry.Pretrainer(None, {"x": None}, {"x": __file__}, conditions={"x": condition})
    try:
        return pretrainer.collect_files()
    except KeyboardInterrupt:
        return "interrupted"


def test_a_rank_that_is_late_to_load_is_waited_for(nodes: Nodes) -> None:
    """Building a big module takes its time, and differs from rank to rank."""
    nodes.variables |= {"WEIGHTFERRY_BEAT_INTERVAL": "0.2", "WEIGHTFERRY_BEAT_TIMEOUT": "2"}
    (gots,) = nodes.tries(late_on_rank_3)
    assert [got.error for got in gots] == [None] * 4


def late_on_rank_3() -> None:
    import weightferry

    pretrainer = weightferry.Pretrainer(None, {"x": object()}, {"x": __file__}, {"x": lambda *_: None})
    pretrainer.collect_files()
    time.sleep(4 if jobs.rank() == 3 else 0)
    pretrainer.load_collected()


def test_rank_0_dies_before_another_one_beats(nodes: Nodes) -> None:
    """The second client of the store is made at the first beat, and then there is no store any more."""
    nodes.variables |= {"WEIGHTFERRY_BEAT_INTERVAL": "1", "WEIGHTFERRY_BEAT_TIMEOUT": str(BEAT_TIMEOUT)}
    with nodes.start(works_while_rank_0_dies, world_size=2) as ranks:
        (outcome,) = ranks.outcomes_of([1], 50.0)
    assert type(outcome.error) is LeaderLost
    assert outcome.seconds < BEAT_TIMEOUT + ROOM


def works_while_rank_0_dies() -> None:
    with process_group_coordinator(Settings.from_environ(), "stage") as coordinator:
        if coordinator.rank == 0:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        coordinator.run_phase("survey", partial(time.sleep, 3), dict)


def test_rank_0_dies_before_another_one_calls(nodes: Nodes) -> None:
    nodes.variables |= {"WEIGHTFERRY_BEAT_INTERVAL": "1", "WEIGHTFERRY_BEAT_TIMEOUT": str(BEAT_TIMEOUT)}
    with nodes.start(calls_after_rank_0_died, world_size=2) as ranks:
        (outcome,) = ranks.outcomes_of([1], 50.0)
    assert type(outcome.error) is LeaderLost
    assert str(outcome.error).startswith("stage failed in agree")
    assert outcome.seconds < BEAT_TIMEOUT + ROOM


def calls_after_rank_0_died() -> None:
    distributed.barrier()  # both have connected
    if jobs.rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    jobs.stage("org/model")


def test_a_neighbour_dies_while_the_ring_is_made(nodes: Nodes) -> None:
    """Gloo waits for it, and cannot be interrupted; all others name the rank that died, and the same one."""
    nodes.variables |= {"WEIGHTFERRY_BEAT_INTERVAL": "0.5", "WEIGHTFERRY_BEAT_TIMEOUT": str(BEAT_TIMEOUT)}
    with nodes.start(meets_a_neighbour_that_dies, world_size=3) as ranks:
        outcomes = ranks.outcomes_of([0, 1], 50.0)
    assert {type(outcome.error) for outcome in outcomes} == {LeaderLost}
    assert len({str(outcome.error) for outcome in outcomes}) == 1
    assert all(f"failed in transfer on {HOST} (rank 2" in str(outcome.error) for outcome in outcomes)


def meets_a_neighbour_that_dies() -> None:
    settings = Settings.from_environ()
    with process_group_coordinator(settings, "stage") as coordinator:
        coordinator.run_phase("agree", lambda: None, dict)

        def work() -> None:
            if coordinator.rank == 0:
                return
            with coordinator.scoped_store("edge") as store:
                if coordinator.rank == 2:
                    store.set("here/1", "")
                    store.wait(["here/0"])
                    time.sleep(0.3)
                    os.kill(os.getpid(), signal.SIGKILL)
                connect(store, 0, Neighbour(2, "localhost"), settings, coordinator)

        try:
            coordinator.run_phase("transfer", work, dict)
        except LeaderLost:
            if coordinator.rank == 0:
                threading.Timer(1.0, os._exit, (0,)).start()  # as a job does, and the store goes with it
            raise


def test_the_heartbeat_of_a_rank_that_leaves_early_can_still_be_read(nodes: Nodes) -> None:
    """Rank 0 looks which heartbeats there are and then reads them; a key that vanished in between would block it."""
    (gots,) = nodes.tries(leave_between_look_and_read, world_size=2)
    assert [got.error for got in gots] == [None] * 2
    keys_before, seconds, keys_after = gots[0].value
    assert seconds < 5
    assert keys_after == keys_before  # the last rank removes what the first one left


def leave_between_look_and_read() -> tuple[int, float, int] | None:
    import torch.distributed as dist

    from weightferry.cluster.connect import process_group_coordinator
    from weightferry.cluster.distributed import DistributedCoordinator
    from weightferry.cluster.heartbeat import heartbeat_key
    from weightferry.settings import Settings

    store = dist.distributed_c10d._get_default_store()
    if jobs.rank() == 0:
        before = store.num_keys()
        store.set("counted", "")
    store.wait(["counted"])
    try:
        with process_group_coordinator(Settings.from_environ(), "test") as ranks:
            if jobs.rank() == 1:
                store.wait(["looked"])
                raise InterruptedError
            seen = cast(DistributedCoordinator, ranks)._barrier.store
            while not seen.check([heartbeat_key(1)]):
                time.sleep(0.01)
            store.set("looked", "")
            store.wait(["gone"])
            began = time.monotonic()
            assert seen.multi_get([heartbeat_key(1)]) == [b""]
            seconds = time.monotonic() - began
    except InterruptedError:
        store.set("gone", "")
        return None
    return before, seconds, store.num_keys() - len(("counted", "looked", "gone"))
