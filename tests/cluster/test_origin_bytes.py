"""The bytes from the origin, on four nodes: 0 for files that any node has, else once, even if one node reaches it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from slurm.testbed import Testbed
from tests.cluster.origin import REPO, SIZES, Served
from tests.cluster.test_stage import check_every_node

HERE = Path(__file__).parent
SIZE = sum(SIZES.values())


@contextmanager
def cut_off(testbed: Testbed, nodes: Iterable[str], url: str) -> Iterator[None]:
    """Cut the route from nodes to the origin."""
    route = ["blackhole", f"{testbed.addresses['origin']}/32"]
    with ExitStack() as routes:
        for node in nodes:
            testbed.run(["ip", "route", "add", *route], node)
            routes.callback(testbed.run, ["ip", "route", "del", *route], node)
            curl = testbed.run(["curl", "-s", "-m", "5", f"{url}/-/stats"], node, check=False)
            assert curl.returncode != 0, "the node still reaches the origin"
        yield


def test_one_gateway_is_enough(hub: Served, testbed: Testbed) -> None:
    cache = testbed.local / "cache-gateway"
    without_route = [node for node in testbed.nodes if node != testbed.nodes[2]]
    with cut_off(testbed, without_route, hub.url):
        report = hub.stage("--cache-dir", cache)
    assert {domain["host"]: domain["origin_bytes"] for domain in report["domains"]} == {
        node: 0 if node in without_route else SIZE for node in testbed.nodes
    }
    check_every_node(hub, cache)


def test_a_lock_file_without_a_network(hub: Served, testbed: Testbed) -> None:
    """With the files in a cache, it works. Without, it fails within seconds (printed) and names each file."""
    cache, lock, nodes = testbed.local / "cache-locked", testbed.shared / "weights.lock", testbed.nodes[:2]
    prefetch = [sys.executable, "-m", "weightferry.cli", "prefetch", REPO, "--lockfile", str(lock)]
    testbed.run([*prefetch, "--cache-dir", str(cache)], nodes[1], env=hub.environ)
    command = ["srun", "-w", ",".join(nodes), "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    command += [sys.executable, "-m", "weightferry.cli", "stage", REPO, "--lockfile", str(lock), "--cache-dir"]
    with cut_off(testbed, nodes, hub.url):
        testbed.run([*command, str(cache)], env=hub.environ, timeout=100)
        check_every_node(hub, cache, nodes)
        began = time.monotonic()
        done = testbed.run([*command, f"{cache}-cold"], env=hub.environ, check=False, timeout=100)
    print(f"two nodes with empty caches fail in {time.monotonic() - began:.1f} s, with srun and imports")
    assert done.returncode != 0
    assert done.stderr.count("no node has 3 files") == 2, done.stderr
    assert all(path in done.stderr for path in SIZES)


def test_files_of_any_node_are_not_downloaded_again(
    hub: Served, testbed: Testbed, first_stage: tuple[Path, dict[str, Any]]
) -> None:
    cache, _ = first_stage
    testbed.run(["rm", "-rf", str(cache)], testbed.nodes[1])
    assert hub.stage("--cache-dir", cache)["total"]["origin_bytes"] == 0, "three nodes have it"
    check_every_node(hub, cache)

    testbed.run(["rm", "-rf", str(cache)], testbed.nodes[0])
    for number, node in enumerate(testbed.nodes[1:]):
        for path in ("model.safetensors", "shards/part.bin"):
            digest = hub.sha256[path]
            testbed.run([sys.executable, str(HERE / "keep_part.py"), str(cache), digest, str(number), "3"], node)
    assert hub.stage("--cache-dir", cache)["total"]["origin_bytes"] == 0, "three nodes have a third each"
    check_every_node(hub, cache)


def test_two_parallel_jobs_download_once(hub: Served, testbed: Testbed) -> None:
    cache, before = testbed.local / "cache-two-jobs", hub.content_bytes()
    nodes = testbed.nodes[:2]
    command = ["srun", "-w", ",".join(nodes), "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=1"]
    command += [sys.executable, "-m", "weightferry.cli", "stage", REPO, "--cache-dir", str(cache)]
    jobs = [testbed.popen(command, env=hub.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    for job in jobs:
        output, _ = job.communicate(timeout=100)
        assert job.returncode == 0, output
    assert hub.content_bytes() - before <= 1.1 * SIZE
    check_every_node(hub, cache, nodes)


@pytest.fixture(params=["size=4m", "size=1g,nr_inodes=9"])
def small_disk(request: pytest.FixtureRequest, testbed: Testbed) -> Iterator[Path]:
    """A folder on two nodes; on the second, a file system that is too small."""
    folder, nodes = testbed.local / "small", testbed.nodes[2:]
    node = nodes[1]
    for name in nodes:
        testbed.run(["mkdir", str(folder)], name)
    testbed.run(["mount", "-t", "tmpfs", "-o", request.param, "small", str(folder)], node)
    yield folder
    testbed.run(["umount", str(folder)], node)
    for name in nodes:
        testbed.run(["rm", "-rf", str(folder)], name)


def test_the_error_of_a_small_disk_comes_before_the_download(hub: Served, testbed: Testbed, small_disk: Path) -> None:
    before = hub.content_bytes()
    command = ["srun", "-w", "node3,node4", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    command += [sys.executable, "-m", "weightferry.cli", "stage", REPO, "--cache-dir", str(small_disk / "cache")]
    done = testbed.run(command, env=hub.environ, check=False, timeout=100)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "survey on node4 (rank 1" in line]
    assert len(lines) == 2, done.stderr
    assert "not enough" in lines[0]
    assert hub.content_bytes() == before
