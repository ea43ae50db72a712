"""`stage()` before any process group, then a process group as a trainer makes it: under srun and submitit."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import submitit

from slurm.testbed import Testbed
from tests.cluster import jobs
from tests.cluster.origin import SIZES, Served
from tests.cluster.test_stage import check_every_node

REPOSITORY = Path(__file__).parents[2]
NODES = 2
IMPORTS = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}"
# What many sbatch scripts export, and what their wrapper of the command sets.
GIVEN = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
WRAPPER = "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "


def check(hub: Served, found: list[dict[str, Any]], cache: Path, before: int) -> None:
    """Check what the ranks found: each has the right files, and each byte left the origin once."""
    assert [one["rank"] for one in found] == [0, 1, 2, 3]
    assert [one["host"] for one in found] == ["node1", "node1", "node2", "node2"]
    for one in found:
        assert (one["sum"], one["same folder"], one["sha256"]) == (4.0, True, hub.sha256)
    assert hub.content_bytes() - before == sum(SIZES.values())
    check_every_node(hub, cache, hub.testbed.nodes[:NODES])


@pytest.mark.parametrize(
    ("join", "given", "wrapper"),
    [("set", GIVEN, WRAPPER), ("slurm", {}, "exec ")],
    ids=["variables before", "variables after"],
)
def test_under_srun(hub: Served, testbed: Testbed, join: str, given: dict[str, str], wrapper: str) -> None:
    cache, before = testbed.local / f"cache-before-{join}", hub.content_bytes()
    environ = {**hub.environ, **given, "PYTHONPATH": IMPORTS, "WEIGHTFERRY_CACHE_DIR": str(cache)}
    script = wrapper + shlex.join([sys.executable, "-m", "tests.cluster.jobs", join])
    command = ["srun", "--kill-on-bad-exit=1", f"-N{NODES}", "--ntasks-per-node=2", "sh", "-c", script]
    done = testbed.run(command, env=environ, timeout=120)
    found = sorted(map(json.loads, done.stdout.splitlines()), key=lambda one: int(one["rank"]))
    check(hub, found, cache, before)


def test_under_submitit(hub: Served, outside: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, before = outside.local / "cache-before-submitit", hub.content_bytes()
    for name, value in {**hub.environ, "PYTHONPATH": IMPORTS, "WEIGHTFERRY_CACHE_DIR": str(cache)}.items():
        monkeypatch.setenv(name, value)
    executor = submitit.AutoExecutor(folder=outside.shared / "jobs", cluster="slurm")
    executor.update_parameters(nodes=NODES, tasks_per_node=2, timeout_min=5)
    check(hub, executor.submit(jobs.stage_then_group, "submitit").results(), cache, before)
