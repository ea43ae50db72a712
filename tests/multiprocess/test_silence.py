"""Ranks that are stopped and origins that fall silent: an error in bounded time, or the transfer goes on."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, check_cache, failed_alike, sha256s, values
from tests.multiprocess.test_lost_ranks import BEAT_TIMEOUT, ROOM, both_read, slow_nodes, wait_for
from weightferry.errors import LeaderLost, Stalled
from weightferry.testing.hub import Fault
from weightferry.testing.ranks import RankOutcome

FILES = {"w.bin": os.urandom(6_000_000)}


def stop(nodes: Nodes, rank: int) -> list[RankOutcome]:
    """Stop one rank in the middle of the transfer, and kill it when the others must have ended long ago."""
    with nodes.start(partial(jobs.stage, "org/model")) as ranks:
        wait_for(partial(both_read, nodes))
        ranks.signal(rank, signal.SIGSTOP)
        late = threading.Event()

        def kill() -> None:
            late.set()
            ranks.signal(rank, signal.SIGKILL)

        timer = threading.Timer(3 * BEAT_TIMEOUT + ROOM, kill)
        # Rank 0 holds the store, and would be waited for.
        timer.start()
        others = [one for one in range(4) if one != rank]
        try:
            outcomes = ranks.outcomes_of(others, 100.0)
        finally:
            timer.cancel()
        assert not late.is_set(), "they ended only when it was killed"
    return outcomes


def test_a_rank_that_is_stopped_counts_as_lost(tmp_path: Path) -> None:
    """In two jobs at the same time: a leader, and the rank that holds the store."""
    ranks = (2, 0)
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        for rank in ranks:
            (tmp_path / f"{rank}").mkdir()
        nodes = [stack.enter_context(slow_nodes(tmp_path / f"{rank}")) for rank in ranks]
        for rank, outcomes in zip(ranks, threads.map(stop, nodes, ranks), strict=True):
            for outcome in outcomes:
                assert type(outcome.error) is LeaderLost, outcome
                assert {(f.rank, f.phase) for f in outcome.error.failures.values()} == {(rank, "transfer")}
                assert "no heartbeat for " in str(outcome.error)


def test_an_origin_that_falls_silent_for_good(nodes: Nodes) -> None:
    nodes.hub.add_repo("org/model", FILES)
    for place, times in ((500_000, 1), (0, None)):
        nodes.hub.faults.add(Fault(path_suffix="w.bin", kind="content", silent_after=place, times=times))
    nodes.variables |= {"WEIGHTFERRY_STALL_TIMEOUT": "3", "WEIGHTFERRY_BEAT_INTERVAL": "0.3"}
    (gots,) = nodes.tries(partial(jobs.stage, "org/model"))
    failed_alike(gots, Stalled, "transfer", {0, 2}, "no byte for ", "w.bin")
    reads = [request for request in nodes.hub.requests if request.kind == "content"]
    assert len(reads) >= 4, "it was asked again before it was given up"
    nodes.hub.faults.clear()
    seen = nodes.run(jobs.stage, "org/model")
    assert [files for _, files in seen] == [sha256s(FILES)] * 4
    check_cache(nodes.cache(0))


def test_an_origin_that_falls_silent_once_is_asked_again(nodes: Nodes) -> None:
    nodes.hub.add_repo("org/model", FILES)
    nodes.hub.faults.add(Fault(path_suffix="w.bin", kind="content", silent_after=500_000, times=2))
    nodes.variables |= {"WEIGHTFERRY_STALL_TIMEOUT": "9"}
    (gots,) = nodes.tries(partial(jobs.stage, "org/model"))
    assert [files for _, files in values(gots)] == [sha256s(FILES)] * 4


def test_a_leader_that_cannot_give_up_itself(nodes: Nodes) -> None:
    """It is inside a call that does not return, and gives signs of life."""
    nodes.variables |= {"WEIGHTFERRY_STALL_TIMEOUT": "2", "WEIGHTFERRY_BEAT_INTERVAL": "0.3"}
    (gots,) = nodes.tries(stuck_on_rank_2)
    for got in (gots[0], gots[1], gots[3]):
        assert type(got.error) is Stalled
        assert str(got.error).startswith("stage failed in transfer on ")
        assert "(rank 2): 10 of 100 bytes came, and none for 2 s" in str(got.error)


def stuck_on_rank_2() -> None:
    from weightferry.cluster.connect import process_group_coordinator
    from weightferry.settings import Settings

    gone = threading.Event()

    def work() -> None:
        coordinator.expect_bytes(100)
        coordinator.count_bytes(10)
        with coordinator.waiting("not yet"):
            gone.wait(4)  # longer than a stall: there is a reason
        if coordinator.rank == 2:
            gone.wait(10)
        else:
            coordinator.count_bytes(90)

    with process_group_coordinator(Settings.from_environ(), "stage") as coordinator:
        coordinator.run_on_rank0("agree", lambda: None)
        coordinator.run_phase("transfer", work, lambda _: None)
