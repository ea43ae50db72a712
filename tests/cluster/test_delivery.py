"""What leaves the origin, on four nodes: nothing that any node has, once what none has, however few nodes reach it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from slurm.testbed import Testbed
from tests.cluster.origin import REPO, SIZES, Served
from tests.cluster.test_stage import check_every_node

HERE = Path(__file__).parent
SIZE = sum(SIZES.values())


@contextmanager
def cut_off(testbed: Testbed, nodes: Iterable[str], url: str) -> Iterator[None]:
    """Leave nodes without a way to the origin."""
    route = ["blackhole", f"{testbed.addresses['origin']}/32"]
    with ExitStack() as back:
        for node in nodes:
            testbed.run(["ip", "route", "add", *route], node)
            back.callback(testbed.run, ["ip", "route", "del", *route], node)
            asked = testbed.run(["curl", "-s", "-m", "5", f"{url}/-/stats"], node, check=False)
            assert asked.returncode != 0, "it is really cut off"
        yield


def test_one_gateway_is_enough(hub: Served, testbed: Testbed) -> None:
    cache = testbed.local / "cache-gateway"
    lost = [node for node in testbed.nodes if node != testbed.nodes[2]]
    with cut_off(testbed, lost, hub.url):
        report = hub.stage("--cache-dir", cache, tasks_per_node=1)
    assert {domain["host"]: domain["origin_bytes"] for domain in report["domains"]} == {
        node: 0 if node in lost else SIZE for node in testbed.nodes
    }
    check_every_node(hub, cache)


def test_a_lock_file_where_no_node_has_a_network(hub: Served, testbed: Testbed) -> None:
    """Warm, it works; cold, it is to fail in under 5 s, which is printed, and names each file."""
    cache, lock = testbed.local / "cache-locked", testbed.shared / "weights.lock"
    prefetch = [sys.executable, "-m", "weightferry.cli", "prefetch", REPO, "--lockfile", str(lock)]
    testbed.run([*prefetch, "--cache-dir", str(cache)], testbed.nodes[1], env=hub.environ)
    command = ["srun", "-N4", "--ntasks-per-node=1", "--kill-on-bad-exit=0", sys.executable, "-m", "weightferry.cli"]
    command += ["stage", REPO, "--lockfile", str(lock), "--cache-dir"]
    with cut_off(testbed, testbed.nodes, hub.url):
        testbed.run([*command, str(cache)], env=hub.environ, timeout=100)
        check_every_node(hub, cache)
        began = time.monotonic()
        done = testbed.run([*command, f"{cache}-cold"], env=hub.environ, check=False, timeout=100)
    print(f"four cold nodes without a network fail in {time.monotonic() - began:.1f} s, srun and imports included")
    assert done.returncode != 0
    assert done.stderr.count("no node has 3 files") == 4, done.stderr
    assert all(path in done.stderr for path in SIZES)


def test_what_any_node_has_is_not_read_again(hub: Served, testbed: Testbed) -> None:
    cache = testbed.local / "cache-parts"
    assert hub.stage("--cache-dir", cache, tasks_per_node=1)["total"]["origin_bytes"] == SIZE
    testbed.run(["rm", "-rf", str(cache)], testbed.nodes[1])
    assert hub.stage("--cache-dir", cache, tasks_per_node=1)["total"]["origin_bytes"] == 0, "three nodes have it"
    check_every_node(hub, cache)

    testbed.run(["rm", "-rf", str(cache)], testbed.nodes[0])
    for number, node in enumerate(testbed.nodes[1:]):
        for path in ("model.safetensors", "shards/part.bin"):
            digest = hub.sha256[path]
            testbed.run([sys.executable, str(HERE / "keep_part.py"), str(cache), digest, str(number), "3"], node)
    report = hub.stage("--cache-dir", cache, tasks_per_node=1)
    assert report["total"]["origin_bytes"] == 0, "three nodes have a third each"
    check_every_node(hub, cache)


def test_two_jobs_at_once_read_it_once(hub: Served, testbed: Testbed) -> None:
    cache, before = testbed.local / "cache-two-jobs", hub.content_bytes()
    nodes = testbed.nodes[:2]
    command = ["srun", "-w", ",".join(nodes), "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=1"]
    command += [sys.executable, "-m", "weightferry.cli", "stage", REPO, "--cache-dir", str(cache)]
    jobs = [testbed.popen(command, env=hub.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    for job in jobs:
        said, _ = job.communicate(timeout=100)
        assert job.returncode == 0, said
    assert hub.content_bytes() - before <= 1.1 * SIZE
    check_every_node(hub, cache, nodes)


@pytest.fixture(params=["size=4m", "size=1g,nr_inodes=9"])
def small_disk(request: pytest.FixtureRequest, testbed: Testbed) -> Iterator[Path]:
    """A folder on two nodes; on the second, a file system that is too small."""
    folder, nodes = testbed.local / "small", testbed.nodes[2:]
    node = nodes[1]
    for each in nodes:
        testbed.run(["mkdir", str(folder)], each)
    testbed.run(["mount", "-t", "tmpfs", "-o", request.param, "small", str(folder)], node)
    yield folder
    testbed.run(["umount", str(folder)], node)
    for each in nodes:
        testbed.run(["rm", "-rf", str(folder)], each)


def test_a_disk_that_is_too_small_is_named_before_a_byte_moves(hub: Served, testbed: Testbed, small_disk: Path) -> None:
    before = hub.content_bytes()
    command = ["srun", "-w", "node3,node4", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    command += [sys.executable, "-m", "weightferry.cli", "stage", REPO, "--cache-dir", str(small_disk / "cache")]
    done = testbed.run(command, env=hub.environ, check=False, timeout=100)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "survey on node4 (rank 1" in line]
    assert len(said) == 2, done.stderr
    assert "not enough" in said[0]
    assert hub.content_bytes() == before
