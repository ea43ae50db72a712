"""`weightferry submit` on this machine, with submitit's local executor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightferry import launch
from weightferry.launch.tasks import CommandTask, JobEndedEarly, RankTask

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_")


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weightferry.cli", "submit", "--cluster", "local", "--folder", str(folder)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    return subprocess.run([*command, *arguments], env=environ, capture_output=True, text=True, timeout=90, check=False)


def test_every_task_is_a_rank(tmp_path: Path) -> None:
    done = submit(tmp_path, "--tasks-per-node", "2", "--wait", "--", "sh", "-c", "echo rank $RANK of $WORLD_SIZE")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"[0] rank 0 of 2", "[1] rank 1 of 2"} <= set(done.stdout.splitlines())


def test_the_code_of_a_failed_command(tmp_path: Path) -> None:
    done = submit(tmp_path, "--wait", "--", "sh", "-c", "echo the reason >&2; exit 7")
    assert done.returncode == 7
    assert "the reason" in done.stdout


def test_without_wait_it_prints_the_paths_of_the_logs(tmp_path: Path) -> None:
    done = submit(tmp_path, "--", "true")
    assert done.returncode == 0
    assert done.stdout.startswith("job ")
    assert str(tmp_path) in done.stdout


def test_a_wrong_call(tmp_path: Path) -> None:
    assert submit(tmp_path).returncode == 2
    done = submit(tmp_path, "--tasks-per-node", "2", "--", "torchrun", "train.py")
    assert done.returncode == 1
    assert "one task a node" in done.stderr


def test_a_function_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        monkeypatch.delenv(name)
    job = launch.submit(sum, [1, 2, 3], cluster="local", folder=tmp_path)
    assert job.result() == 6


@pytest.mark.parametrize("task", [RankTask(sum, requeue=False), CommandTask(("true",), requeue=False)])
def test_a_job_that_ends_early_without_requeue_raises_an_error(task: RankTask | CommandTask) -> None:
    with pytest.raises(JobEndedEarly, match="requeue=False"):
        task.checkpoint()
