"""run_on_leader, run_on_main, groups of ranks, and jobs that restart with the same store."""

from __future__ import annotations

import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import weightferry
from tests.conftest import need
from tests.multiprocess import jobs
from tests.multiprocess.launched import clean_environ, meeting_point, together
from tests.multiprocess.nodes import HOST, Nodes, check_cache, failed_alike, sha256s, values
from tests.store_answers import answer, known
from weightferry.errors import BadRequest, CollectError, SourceNotFound

FILES = {"config.json": b"{}", "w.bin": os.urandom(3_000_000)}


def where(note: Path, factor: int) -> int:
    with note.open("a") as file:
        file.write(f"{jobs.rank()}\n")
    return factor * jobs.rank()


def fails(*_: Any) -> None:
    raise ValueError(f"rank {jobs.rank()} cannot")


def test_once_for_each_storage_domain(nodes: Nodes) -> None:
    note = nodes.place / "note"
    (gots,) = nodes.tries(partial(weightferry.run_on_leader, where, note, factor=10))
    assert values(gots) == [0, 0, 20, 20]
    assert sorted(note.read_text().split()) == ["0", "2"]


def test_once_for_the_job(nodes: Nodes) -> None:
    note = nodes.place / "note"
    (gots,) = nodes.tries(partial(weightferry.run_on_main, where, note, factor=10))
    assert values(gots) == [0, 0, 0, 0]
    assert note.read_text() == "0\n"


def test_in_a_folder_that_all_ranks_share(nodes: Nodes) -> None:
    (gots,) = nodes.tries(partial(weightferry.run_on_leader, jobs.rank, folder=nodes.place))
    assert values(gots) == [0, 0, 0, 0]


def test_an_error_is_raised_on_every_rank(nodes: Nodes) -> None:
    main, leaders, after = nodes.tries(
        partial(weightferry.run_on_main, fails),
        partial(weightferry.run_on_leader, fails),
        partial(weightferry.run_on_main, jobs.rank),
    )
    text = failed_alike(main, CollectError, "run", {0}, "ValueError: rank 0 cannot")
    assert text.startswith(f"run_on_main failed in run on {HOST} (rank 0): ")
    failed_alike(leaders, CollectError, "run", {0, 2}, "cannot")
    assert values(after) == [0, 0, 0, 0]


def by_pairs(place: Path) -> Any:
    """Stage twice in two groups at the same time: ranks 0 and 2, and ranks 1 and 3."""
    from torch import distributed as dist

    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    number = jobs.rank() % 2
    staged = [jobs.stage(f"org/m{number}", group=groups[number])[1] for _ in range(2)]
    pretrainer = weightferry.Pretrainer(
        place / f"links{number}", {"w": object()}, {"w": f"org/m{number}/w.bin"}, {"w": lambda *_: None}
    )
    path = pretrainer.collect_files(group=groups[number])["w"]
    pretrainer.load_collected()
    assert path.read_bytes()[0] == number
    return staged, weightferry.run_on_main(jobs.rank, group=groups[number])


def test_a_group_of_ranks(nodes: Nodes) -> None:
    for number in (0, 1):
        nodes.hub.add_repo(f"org/m{number}", {"w.bin": bytes([number]) * 100})
    pairs, after = nodes.tries(partial(by_pairs, nodes.place), partial(jobs.stage, "org/m0"))
    for rank, (staged, first) in enumerate(values(pairs)):
        assert staged == [sha256s({"w.bin": bytes([rank % 2]) * 100})] * 2
        assert first == rank % 2
    assert [files for _, files in values(after)] == [sha256s({"w.bin": bytes(100)})] * 4


def test_errors_in_a_group_name_the_ranks_of_the_job(nodes: Nodes) -> None:
    (gots,) = nodes.tries(in_the_upper_half)
    for got in gots[:2]:
        assert type(got.error) is BadRequest, got
        assert "is not in the process group" in str(got.error)
    for got in gots[2:]:
        assert type(got.error) is SourceNotFound, got
        assert set(got.error.failures) == {2}
        assert "(rank 2)" in str(got.error)


def in_the_upper_half() -> Any:
    from torch import distributed as dist

    return weightferry.stage("org/nothing", group=dist.new_group([2, 3]))


AGAIN = """
import os, sys
from weightferry.cli import main
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
main(["stage", "org/model"], standalone_mode=False)
if first and os.environ["RANK"] == "1":
    os._exit(3)  # during the next call of the other rank
main(["stage", "org/model"], standalone_mode=False)
# One write per line: the ranks share a log.
sys.stdout.write(f"rank {os.environ['RANK']} ends in life {os.environ['TORCHELASTIC_RESTART_COUNT']}\\n")
"""


def test_an_elastic_restart_finds_nothing_of_the_attempt_before(nodes: Nodes) -> None:
    """The agent's store stays when the ranks restart."""
    nodes.hub.add_repo("org/model", FILES)
    script = nodes.place / "again.py"
    script.write_text(AGAIN)
    with meeting_point() as port:
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=1"]
        run += ["--rdzv-backend=c10d", "--rdzv-id=again", f"--rdzv-endpoint=127.0.0.1:{port}"]
        run += ["--rdzv-conf=is_host=0", "--local-addr=127.0.0.1", str(script)]
        (done,) = together([(run, clean_environ(nodes))], nodes.place / "agent")
    assert done.code == 0, done.err
    assert {f"rank {rank} ends in life 1" for rank in (0, 1)} <= set(done.out.splitlines())


def mixed(places: list[list[Path]]) -> list[Any]:
    """Stage once for each pair of cache folders, in one job."""
    node = jobs.rank() // 2
    return jobs.each(*(partial(jobs.stage, "org/model", cache_dir=folders[node]) for folders in places))


def spoil(folder: Path, state: str, rng: random.Random) -> None:
    """Bring a complete cache into another state."""
    blobs = [path for path in folder.glob("hub/*/blobs/*") if path.is_file()]
    for blob in blobs:
        if state == "absent" or (state == "half" and rng.random() < 0.5):
            blob.unlink()
        elif state == "corrupt":
            content = bytearray(blob.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            blob.write_bytes(content)
        elif state == "torn":
            blob.write_bytes(blob.read_bytes()[: rng.randrange(blob.stat().st_size)])
    if state == "read-only":
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o555)


def test_every_state_of_every_node(nodes: Nodes) -> None:
    nodes.hub.add_repo("org/model", FILES)
    caches = []
    for seed in range(20):
        rng = random.Random(seed)
        folders = [nodes.place / f"seed{seed}" / f"node{node}" for node in range(2)]
        caches.append(folders)
    nodes.run(mixed, caches)
    for seed, folders in enumerate(caches):
        rng = random.Random(seed)
        for folder in folders:
            spoil(folder, rng.choice(["whole", "half", "absent", "corrupt", "torn", "read-only"]), rng)
    by_rank = nodes.run(mixed, caches)
    for seed, gots in enumerate(zip(*by_rank, strict=True)):
        assert [files for _, files in values(list(gots))] == [sha256s(FILES)] * 4, f"seed {seed}"
        for folder in caches[seed]:
            check_cache(folder)


def on_lustre(delay: float, cache: Path) -> Any:
    """Simulate ranks 0-1 and 2-3 on two machines, and the folder on a file system that both may share."""
    import time

    from weightferry.cluster import domains

    began = time.time()
    setattr(domains, "boot_id", lambda: f"machine{jobs.rank() // 2}")  # noqa: B010 -- the name is imported there
    setattr(domains, "is_local", lambda *_: False)  # noqa: B010
    read, opens = Path.read_text, Path.open

    def hidden(path: Path) -> bool:
        # New files of the other machine.
        return jobs.rank() >= 2 and cache in path.parents and time.time() < began + delay

    def read_text(path: Path, *args: Any, **options: Any) -> str:
        if hidden(path):
            raise FileNotFoundError(2, "hidden", str(path))
        return read(path, *args, **options)

    Path.read_text = read_text  # type: ignore[assignment, method-assign]
    try:
        return jobs.report("org/model")
    finally:
        Path.read_text, Path.open = read, opens  # type: ignore[method-assign]


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_that_two_machines_may_share(nodes: Nodes, shared: bool) -> None:
    nodes.hub.add_repo("org/model", FILES)
    nodes.shared = shared
    (gots,) = nodes.tries(partial(on_lustre, 5.0 if shared else 0.0, nodes.cache(0)))
    report, *_ = values(gots)
    assert [domain["ranks"] for domain in report["domains"]] == ([[0, 1, 2, 3]] if shared else [[0, 1], [2, 3]])
    assert report["total"]["origin_bytes"] == sum(map(len, FILES.values()))
    assert not list(nodes.cache(0).glob(".weightferry-*"))
    check_cache(nodes.cache(0))


def on_localflock(cache: Path) -> Any:
    """Simulate a file system on which locks exclude only processes of one machine."""
    from weightferry.cache import lock_support

    setattr(lock_support, "is_local", lambda *_: False)  # noqa: B010
    if jobs.rank() >= 2:
        answer("flock", 0)
    return on_lustre(0.0, cache)


def test_locks_that_two_machines_hold_at_once(nodes: Nodes) -> None:
    need(known(), "the system call numbers of this machine are unknown")
    nodes.hub.add_repo("org/model", FILES)
    nodes.shared = True
    (gots,) = nodes.tries(partial(on_localflock, nodes.cache(0)))
    (domain,) = values(gots)[0]["domains"]
    assert domain["locks"] == "files (flock succeeds on two machines at once)"
    check_cache(nodes.cache(0))
