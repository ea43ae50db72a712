"""The Slurm cluster for the tests of this folder."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slurm.testbed import Spec, Testbed
from slurm.testbed.packages import reason_unavailable
from tests.cluster.origin import CDN_PORT, PORT, REPO, SIZES, Served
from tests.conftest import need

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)
            # With xdist's --dist loadgroup, one worker runs all these tests on one cluster. Otherwise each worker
            # starts its own cluster, which costs two seconds. With pytest 9.2 and xdist 3.8.0 the mark has no effect.
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture(scope="session")
def cluster_allowed() -> None:
    """Skip the test if no cluster can start here; in CI, fail instead, so that the skip is noticed."""
    reason = reason_unavailable()
    need(not reason, reason)


@pytest.fixture(scope="session")
def testbed(cluster_allowed: None) -> Iterator[Testbed]:
    """Four nodes at 2 Gbit/s and an origin at 500 Mbit/s; all tests share them and must not change them."""
    with Testbed(Spec(nodes=4, node_mbit=2000, origin_mbit=500)) as testbed:
        yield testbed


@pytest.fixture
def outside(testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    """The same, with its sbatch, srun, squeue... first in PATH, so that submitit works in the test process."""
    monkeypatch.setenv("PATH", f"{testbed.clients}{os.pathsep}{os.environ['PATH']}")
    return testbed


@pytest.fixture(scope="session")
def hub(testbed: Testbed) -> Served:
    """A Hub inside the testbed, with one repository of three files."""
    root = testbed.shared / "hub"
    sha256 = {}
    for path, size in SIZES.items():
        content = random.Random(path).randbytes(size)
        file = root / REPO / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        sha256[path] = hashlib.sha256(content).hexdigest()
    command = [sys.executable, "-m", "weightferry.testing.hub", str(root), "--host", "0.0.0.0"]
    command += ["--port", str(PORT), "--cdn-port", str(CDN_PORT)]
    return Served(testbed, testbed.start_origin(command, PORT).url, sha256)


@pytest.fixture(scope="session")
def first_stage(hub: Served, testbed: Testbed) -> tuple[Path, dict[str, Any]]:
    """Stage the repository on all nodes with two ranks each; return the cache folder on each node, and the report."""
    cache = testbed.local / "cache-first"
    return cache, hub.stage("--cache-dir", cache, tasks_per_node=2)
