"""Whatever nodes hold, whoever is killed, whatever comes in between: bytes leave the origin once, and are right."""

from __future__ import annotations

import os
import random
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess import jobs
from tests.multiprocess.nodes import PRELOAD, Nodes, check_cache, failed_alike, sha256s, values
from tests.multiprocess.test_lost_ranks import wait_for
from weightferry.errors import CollectError, IntegrityError, OriginUnreachable
from weightferry.testing.hub import Fault, HubOptions, HubServer
from weightferry.testing.ranks import run_ranks

MIB = 1 << 20
WEIGHTS = os.urandom(40 * MIB + 17)
FILES = {"w.bin": WEIGHTS, "second.bin": os.urandom(3 * MIB), "config.json": b"{}"}
TOTAL = sum(map(len, FILES.values()))
NOWHERE = "http://127.0.0.1:1"  # nobody listens on tcpmux


@pytest.fixture
def four(nodes: Nodes) -> Nodes:
    """Four nodes with a rank each."""
    nodes.ranks_a_node = 1
    nodes.hub.add_repo("org/model", FILES)
    return nodes


def right(four: Nodes, world_size: int = 4) -> int:
    """Stage on all, check all, and return how many bytes left the origin."""
    four.hub.reset()
    seen = four.run(jobs.stage, "org/model", world_size=world_size)
    assert [files for _, files in seen] == [sha256s(FILES)] * world_size
    for rank in range(world_size):
        check_cache(four.cache(rank))
    return four.hub.content_bytes()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_byte_leaves_the_origin_once(four: Nodes, world_size: int) -> None:
    assert right(four, world_size) == TOTAL


def test_one_cold_node_among_warm_ones(four: Nodes) -> None:
    assert right(four, 3) == TOTAL
    assert right(four) == 0


def test_thirds_make_a_whole(four: Nodes) -> None:
    """Three nodes were killed with different parts of a file; together they have it, and a fourth has nothing."""
    third = len(WEIGHTS) // 3
    assert right(four, 3) == TOTAL
    for rank in range(3):
        keep_a_part(four, rank, rank * third, (rank + 1) * third if rank < 2 else len(WEIGHTS))
    assert right(four) == 0


def keep_a_part(four: Nodes, rank: int, start: int, stop: int) -> None:
    """Let a node look as if it had been killed with these bytes of the big file."""
    import zlib

    from weightferry.cache.partial import PartialFile, WrittenRange

    (blob,) = (path for path in four.cache(rank).glob("hub/*/blobs/*") if path.stat().st_size == len(WEIGHTS))
    partial_data = four.cache(rank) / "partial" / "models--org--model" / blob.name
    there = PartialFile(partial_data, len(WEIGHTS), blob.name)
    there.write(start, WEIGHTS[start:stop])
    there.record(WrittenRange(start, stop, zlib.crc32(WEIGHTS[start:stop])))
    blob.unlink()


@pytest.mark.parametrize("gateway", [0, 2])
def test_one_gateway_is_enough(four: Nodes, gateway: int) -> None:
    four.variables |= {"HF_ENDPOINT": NOWHERE}
    four.by_rank[gateway] = {"HF_ENDPOINT": four.hub.url}
    assert right(four) == TOTAL


def test_no_way_to_the_origin(four: Nodes) -> None:
    four.variables |= {"HF_ENDPOINT": NOWHERE}
    (gots,) = four.tries(partial(jobs.stage, "org/model"))
    failed_alike(gots, OriginUnreachable, "resolve", {0}, "cannot connect to")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_next_job_goes_on_where_all_were_killed(four: Nodes, share: float) -> None:
    four.hub.faults.add(Fault(path_suffix="w.bin", bytes_per_second=6e6, times=None))
    with four.start(partial(jobs.stage, "org/model"), world_size=2) as ranks:
        wait_for(lambda: four.hub.content_bytes() > share * TOTAL)
        for rank in range(2):
            ranks.signal(rank, signal.SIGKILL)
        ranks.outcomes(60)
    before = four.hub.content_bytes()
    four.hub.faults.clear()
    again = right(four, 2)
    # Up to 4 pieces a leader; and what the server counts runs up to 1 MiB a connection ahead of the truth.
    assert again <= TOTAL - before + 2 * 4 * 4 * MIB
    assert again < TOTAL


@pytest.mark.parametrize("where", ["cache", "partial"])
def test_a_flipped_byte_on_one_node(four: Nodes, where: str) -> None:
    assert right(four, 2) == TOTAL
    if where == "cache":
        (blob,) = (path for path in four.cache(1).glob("hub/*/blobs/*") if path.stat().st_size == len(WEIGHTS))
        seen = blob.stat()
        flip(blob)
        os.utime(blob, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # so that nothing shows it
    else:
        keep_a_part(four, 1, 0, len(WEIGHTS))
        (path,) = (path for path in four.cache(1).glob("partial/*/*") if path.suffix != ".journal")
        flip(path)
    # A third node lacks all, and one of the two would pass it on.
    assert right(four, 3) <= 2 * 4 * MIB


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(17 * MIB)
        byte = file.read(1)[0]
        file.seek(17 * MIB)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_note_is_no_proof(four: Nodes) -> None:
    """All nodes are sure of a wrong file: the one that lacks it finds out, and everybody gets the right one."""
    assert right(four, 2) == TOTAL
    for rank in range(2):
        (blob,) = (path for path in four.cache(rank).glob("hub/*/blobs/*") if path.stat().st_size == len(WEIGHTS))
        seen = blob.stat()
        flip(blob)
        os.utime(blob, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert right(four, 3) <= len(WEIGHTS) + 4 * MIB


@pytest.mark.parametrize("times", [1, None])
def test_a_wrong_byte_in_the_origins_answer(four: Nodes, times: int | None) -> None:
    four.hub.faults.add(Fault(path_suffix="w.bin", kind="content", corrupt_at=21 * MIB, times=times))
    (gots,) = four.tries(partial(jobs.stage, "org/model"))
    if times is None:
        failed_alike(gots, IntegrityError, "transfer", {0}, "checksum mismatch after a second download")
        four.hub.faults.clear()
        right(four)
    elif four.hub.faults.left:
        values(gots)  # the fault spent itself on a range without that byte
    else:
        assert [files for _, files in values(gots)] == [sha256s(FILES)] * 4


def two_jobs(four: Nodes, first: Any, second: Any) -> list[list[Any]]:
    """Run two jobs at the same time on the same nodes and caches."""
    done: list[list[Any]] = [[], []]

    def run(number: int, work: Any) -> None:
        outcomes = run_ranks(work, 2, environ=four.environ, timeout=110, preload=PRELOAD)
        done[number] = [outcome.get() for outcome in outcomes]

    threads = [threading.Thread(target=run, args=job) for job in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def test_two_jobs_want_the_same_model(four: Nodes) -> None:
    for gots in two_jobs(four, partial(jobs.stage, "org/model"), partial(jobs.stage, "org/model")):
        assert [files for _, files in gots] == [sha256s(FILES)] * 2
    assert four.hub.content_bytes() <= 1.1 * TOTAL


def test_two_jobs_want_overlapping_sets_in_opposite_order(four: Nodes) -> None:
    for number in range(3):
        four.hub.add_repo(f"org/m{number}", {"w.bin": bytes([number]) * (6 * MIB)})
    forth, back = (partial(jobs.collect, {f"x{n}": f"org/m{n}/w.bin" for n in order}) for order in ((0, 1), (2, 1)))
    for gots in two_jobs(four, forth, back):
        assert len(gots) == 2
    assert four.hub.content_bytes() <= 1.1 * 3 * 6 * MIB


def faults(rng: random.Random) -> list[Fault]:
    """Some things that go wrong, and that a transfer survives."""
    kinds = [
        lambda: Fault(kind="content", cut_after=rng.randrange(3 * MIB), times=1),
        lambda: Fault(kind="content", cut_after=rng.randrange(3 * MIB), reset=True, times=1),
        lambda: Fault(status=503, kind="content", times=1),
        lambda: Fault(status=429, kind="content", headers={"Retry-After": "0"}, times=1),
        lambda: Fault(kind="content", bytes_per_second=20e6, times=2),
        lambda: Fault(kind="content", corrupt_at=rng.randrange(len(SOAK_FILES["w.bin"])), times=1),
        lambda: Fault(kind="content", ignore_range=True, times=1),
        lambda: Fault(hang_up=True, times=1),
    ]
    return [rng.choice(kinds)() for _ in range(rng.randrange(1, 5))]


TRIALS = int(os.environ.get("WEIGHTFERRY_TEST_TRIALS", "8"))
SOAK_FILES = {**FILES, "w.bin": WEIGHTS[: 18 * MIB + 17]}


@pytest.mark.timeout(120 + 15 * TRIALS)
def test_never_a_wrong_file(four: Nodes) -> None:
    """Faults at random, with fixed seeds; `make soak` runs more of them."""
    four.variables["WEIGHTFERRY_RETRIES"] = "4"
    four.hub.add_repo("org/soak", SOAK_FILES)
    expected, total = sha256s(SOAK_FILES), sum(map(len, SOAK_FILES.values()))
    for seed in range(TRIALS):
        rng = random.Random(seed)
        folder = four.place / f"seed{seed}"
        four.hub.faults.clear()
        four.hub.faults.add(*faults(rng))
        call = partial(jobs.each, partial(jobs.stage_below, folder, "org/soak"))
        with four.start(call, world_size=3) as ranks:
            if killed := rng.random() < 0.3:
                before = four.hub.content_bytes()
                wait_for(lambda b=before: four.hub.content_bytes() > b + total // 3)  # type: ignore[misc]
                for rank in range(3):
                    ranks.signal(rank, signal.SIGKILL)
            outcomes = ranks.outcomes(110)
        for rank in range(3):
            check_cache(folder / f"node{rank}", failed=True)
        if not killed:
            for outcome in outcomes:
                (got,) = outcome.get()
                assert isinstance(got.error, CollectError) if got.error else got.value[1] == expected, f"seed {seed}"
        four.hub.faults.clear()
        seen = four.run(partial(jobs.stage_below, folder, "org/soak"), world_size=3)
        assert [files for _, files in seen] == [expected] * 3, f"seed {seed}"


def test_the_hub_is_asked_once_for_a_file_however_many_pieces(four: Nodes) -> None:
    """It counts requests: 3,000 in five minutes without a token."""
    assert right(four, 1) == TOTAL
    asked = [request for request in four.hub.requests if request.kind == "redirect" and "w.bin" in request.path]
    pieces = [request for request in four.hub.requests if request.kind == "content" and "w.bin" in request.path]
    assert len(pieces) == 11
    assert len(asked) <= 4, "once for each connection at most"


def test_links_that_expire_are_asked_for_anew(tmp_path: Path) -> None:
    options = HubOptions(link_lifetime=1.5)
    with HubServer(options=options, bytes_per_second_per_connection=2.5e6) as hub:
        nodes = Nodes(hub, tmp_path, ranks_a_node=1)
        hub.add_repo("org/model", FILES)
        assert right(nodes, 1) == TOTAL
        asked = [request for request in hub.requests if request.kind == "redirect" and "w.bin" in request.path]
        assert len(asked) > 1, "a link that is about to end is not used"
