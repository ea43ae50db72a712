"""Ranks killed on four nodes, with the limits that users have: all others end within 20 seconds, and say who."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm.testbed import Testbed
from tests.cluster.origin import REPO

HERE = Path(__file__).parent
LIMIT = 20.0  # seconds


@dataclass(frozen=True)
class Case:
    """Who is killed, in which phase, and what the others must say."""

    victim: int
    phase: str
    tasks_per_node: int = 2
    late: int = -1
    text: str = ""

    @property
    def ranks(self) -> int:
        return 4 * self.tasks_per_node

    @property
    def node(self) -> str:
        return f"node{self.victim // self.tasks_per_node + 1}"


CASES = {
    "leader": Case(4, "transfer", text="on node3 (rank 4"),
    "follower": Case(3, "transfer", text="on node2 (rank 3"),
    "rank 0": Case(0, "transfer"),
    "follower while others are missing": Case(2, "agree", 1, late=3, text="on node3 (rank 2"),
    "rank 0 while it asks": Case(0, "resolve", 1),
}


class Job:
    """A job on all nodes that has come into the phase in which a rank is killed."""

    def __init__(self, testbed: Testbed, case: Case, endpoint: str, number: int) -> None:
        self.testbed, self.case, self.killed = testbed, case, 0.0
        self.folder = testbed.shared / f"lost{number}"
        self.folder.mkdir()
        environ = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "OMP_NUM_THREADS": "1"}
        environ["GLOO_SOCKET_IFNAME"] = "eth0"
        command = ["srun", "-N4", f"--ntasks-per-node={case.tasks_per_node}", "--overlap", "--kill-on-bad-exit=0"]
        command += [sys.executable, str(HERE / "lost_rank.py"), REPO, f"/local/lost{number}", str(self.folder)]
        self.process = testbed.popen(
            [*command, str(9300 + number), str(case.late)],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def has_begun(self) -> bool:
        if not all((self.folder / f"pid{rank}").exists() for rank in range(self.case.ranks)):
            return False
        if self.case.phase != "transfer":
            return True
        partial = f"ls /local/lost{self.folder.name[4:]}/partial/*/* 2>/dev/null | grep -q journal"
        return self.testbed.run(["sh", "-c", partial], self.case.node, check=False).returncode == 0

    def kill(self) -> None:
        pid = (self.folder / f"pid{self.case.victim}").read_text()
        self.killed = time.time()
        self.testbed.run(["kill", f"-{signal.SIGKILL.value}", pid], self.case.node)

    def ends(self) -> dict[int, dict[str, str]]:
        """By rank, what the survivors said; those that are still at it are missing."""
        survivors = set(range(self.case.ranks)) - {self.case.victim, self.case.late}
        files = {rank: self.folder / f"end{rank}" for rank in survivors}
        return {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}


@pytest.fixture
def origins(testbed: Testbed) -> Iterator[dict[str, str]]:
    """One that sends for minutes, and one that takes a question and never answers."""
    command = [sys.executable, "-m", "weightferry.testing.hub", str(testbed.shared / "hub"), "--host", "0.0.0.0"]
    slow = testbed.start_origin([*command, "--port", "8190", "--cdn-port", "8191", "--rate", "20000"], 8190)
    listen = "import socket, time; s = socket.socket(); s.bind(('0.0.0.0', 8192)); s.listen(64); time.sleep(600)"
    silent = testbed.start_origin([sys.executable, "-c", listen], 8192)
    yield {"transfer": slow.url, "agree": slow.url, "resolve": silent.url}
    for origin in (slow, silent):
        origin.process.terminate()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("hub")  # its folder is served
def test_all_others_end_in_time_and_say_who_is_gone(testbed: Testbed, origins: dict[str, str]) -> None:
    jobs = [Job(testbed, case, origins[case.phase], number) for number, case in enumerate(CASES.values())]
    until = time.monotonic() + 150
    while not all(job.has_begun() for job in jobs):
        assert time.monotonic() < until, [job.case for job in jobs if not job.has_begun()]
        time.sleep(0.5)
    time.sleep(3)  # into the phase: nothing can be seen of the waiting
    for job in jobs:
        job.kill()
    until = time.monotonic() + LIMIT + 10
    missing = {name: job.case.ranks - 1 - (job.case.late >= 0) for name, job in zip(CASES, jobs, strict=True)}
    while any(len(job.ends()) < missing[name] for name, job in zip(CASES, jobs, strict=True)):
        assert time.monotonic() < until, {name: job.ends() for name, job in zip(CASES, jobs, strict=True)}
        time.sleep(0.2)
    for name, job in zip(CASES, jobs, strict=True):
        job.process.terminate()
        for rank, told in job.ends().items():
            assert told["kind"] == "LeaderLost", (name, rank, told)
            assert float(told["at"]) - job.killed < LIMIT, (name, rank, told)
            assert f"stage failed in {job.case.phase} " in told["text"], (name, rank, told)
            assert job.case.text in told["text"], (name, rank, told)
