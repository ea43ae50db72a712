"""`weightferry.launch` on real Slurm: ranks, process groups, staged sources, errors that name rank and host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

from slurm.testbed import Testbed
from tests.cluster import jobs
from tests.cluster.origin import REPO, SIZES, Served
from weightferry import launch
from weightferry.errors import BadRequest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(hub: Served, outside: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of a user who submits jobs; jobs inherit them."""
    for name, value in hub.environ.items():
        monkeypatch.setenv(name, value)
    # Tasks import the jobs of this folder by name.
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}")
    monkeypatch.setenv("WEIGHTFERRY_CACHE_DIR", str(outside.local / "cache-launch"))
    monkeypatch.setenv("WEIGHTFERRY_BEAT_INTERVAL", "0.5")
    monkeypatch.setenv("WEIGHTFERRY_BEAT_TIMEOUT", "4")
    # A login node is not a rank of a job.
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)


def test_a_function_on_every_rank_with_its_sources(hub: Served, testbed: Testbed) -> None:
    before = hub.content_bytes()
    job = launch.submit(
        jobs.add_up, nodes=2, tasks_per_node=2, folder=testbed.shared / "jobs", timeout_min=5, stage=[REPO]
    )
    assert job.results() == [(rank, 4.0, f"node{rank // 2 + 1}") for rank in range(4)]
    assert hub.content_bytes() - before == sum(SIZES.values())


def test_a_rank_that_raises_is_named_on_all(testbed: Testbed) -> None:
    """In two jobs at the same time: rank 0 is in a collective, or in a call that does not return."""
    in_collective, asleep = (
        launch.submit(jobs.raise_on, 1, others_sleep=asleep, nodes=2, folder=testbed.shared / "jobs", timeout_min=5)
        for asleep in (False, True)
    )
    assert "failed in run on node2 (rank 1): ValueError: planted on purpose" in str(in_collective.exception())
    assert "planted on purpose" in str(asleep.exception())


def test_killed_tasks_name_their_node(testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each killed task has no result. submitit waits 15 s for it, since a network file system may show it late.
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)
    ready = testbed.shared / "ready"
    job = launch.submit(
        jobs.wait_for_ever,
        str(ready),
        nodes=2,
        tasks_per_node=1,
        folder=testbed.shared / "jobs",
        timeout_min=5,
    )
    until = time.monotonic() + 60
    while not all(Path(f"{ready}-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < until, job.stderr()
        time.sleep(0.2)
    # This is the pid of the task, in the pid namespace of its node.
    pid = Path(f"{ready}-1").read_text()
    testbed.run(["kill", f"-{signal.SIGKILL.value}", pid], "node2")
    while not job.watcher.is_done(job.job_id, mode="force"):  # by itself, submitit asks Slurm less and less often
        assert time.monotonic() < until, job.stderr()
        time.sleep(0.2)
    assert "node2" in str(job.exception())


def test_torchrun_gets_its_rendezvous(hub: Served, testbed: Testbed) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--no-python"]
    command += [sys.executable, "-m", "weightferry.cli", "stage", REPO]
    job = launch.submit_command(command, nodes=2, folder=testbed.shared / "jobs", timeout_min=5)
    assert job.exception() is None, job.stderr()
    assert "for 2 ranks on 2 nodes" in str(job.stdout())


def test_torchrun_and_tasks_are_not_mixed() -> None:
    with pytest.raises(BadRequest, match="one task a node"):
        launch.submit_command(["torchrun", "train.py"], nodes=2, tasks_per_node=4)


def submit(testbed: Testbed, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weightferry.cli", "submit", "--folder", str(testbed.shared / "jobs")]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=110, check=False)


def test_submit_follows_and_returns_the_code(testbed: Testbed) -> None:
    script = "import os, sys; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE']); sys.exit(0)"
    done = submit(testbed, "--nodes", "2", "--stage", REPO, "--wait", "--", sys.executable, "-c", script)
    assert done.returncode == 0, done.stdout
    assert {f"[{rank}] rank {rank} of 2" for rank in range(2)} <= set(done.stdout.splitlines())


def test_submit_says_why_a_command_failed(testbed: Testbed) -> None:
    done = submit(testbed, "--nodes", "2", "--wait", "--", "sh", "-c", "echo the reason >&2; exit 7")
    assert done.returncode == 7
    assert "the reason" in done.stdout
    assert "sh: exit code 7" in done.stdout
