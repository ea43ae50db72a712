"""A rank is killed on four nodes with default settings: all other ranks end within 20 s and name the killed rank."""

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
    """The node of each rank, the killed rank, the phase, and the expected error on the other ranks."""

    nodes: tuple[int, ...]
    victim: int
    phase: str
    late: int = -1
    text: str = ""

    @property
    def ranks(self) -> int:
        return len(self.nodes)

    @property
    def hosts(self) -> list[str]:
        return [f"node{number}" for number in self.nodes]


CASES = {
    "leader": Case((1, 2, 3, 3, 4), 2, "transfer", text="on node3 (rank 2"),
    "follower": Case((1, 2, 3, 3, 4), 3, "transfer", text="on node3 (rank 3"),
    "rank 0": Case((1, 1, 2, 3, 4), 0, "transfer"),
    "follower before all ranks have called": Case((1, 2, 3, 4), 2, "agree", late=3, text="on node3 (rank 2"),
    "rank 0 during its request": Case((1, 2, 3, 4), 0, "resolve"),
}


class Job:
    """A job on all nodes; one of its ranks is killed in a given phase."""

    def __init__(self, testbed: Testbed, case: Case, endpoint: str, number: int) -> None:
        self.testbed, self.case, self.killed = testbed, case, 0.0
        self.folder = testbed.shared / f"lost{number}"
        self.folder.mkdir()
        environ = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "OMP_NUM_THREADS": "1"}
        environ["GLOO_SOCKET_IFNAME"] = "eth0"
        command = ["srun", f"-n{case.ranks}", "--distribution=arbitrary", f"--nodelist={','.join(case.hosts)}"]
        command += ["--overlap", "--kill-on-bad-exit=0"]
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
        return self.testbed.run(["sh", "-c", partial], self.case.hosts[self.case.victim], check=False).returncode == 0

    def kill(self) -> None:
        pid = (self.folder / f"pid{self.case.victim}").read_text()
        self.killed = time.time()
        self.testbed.run(["kill", f"-{signal.SIGKILL.value}", pid], self.case.hosts[self.case.victim])

    def ends(self) -> dict[int, dict[str, str]]:
        """The results of the surviving ranks that have ended."""
        survivors = set(range(self.case.ranks)) - {self.case.victim, self.case.late}
        files = {rank: self.folder / f"end{rank}" for rank in survivors}
        return {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}


@pytest.fixture
def origins(testbed: Testbed) -> Iterator[dict[str, str]]:
    """An origin that sends for minutes, and an origin that accepts a request and never answers."""
    command = [sys.executable, "-m", "weightferry.testing.hub", str(testbed.shared / "hub"), "--host", "0.0.0.0"]
    slow = testbed.start_origin([*command, "--port", "8190", "--cdn-port", "8191", "--rate", "20000"], 8190)
    listen = "import socket, time; s = socket.socket(); s.bind(('0.0.0.0', 8192)); s.listen(64); time.sleep(600)"
    silent = testbed.start_origin([sys.executable, "-c", listen], 8192)
    yield {"transfer": slow.url, "agree": slow.url, "resolve": silent.url}
    for origin in (slow, silent):
        origin.process.terminate()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("hub")  # `origins` serves its folder
def test_all_other_ranks_end_in_time_and_name_the_killed_rank(testbed: Testbed, origins: dict[str, str]) -> None:
    jobs = [Job(testbed, case, origins[case.phase], number) for number, case in enumerate(CASES.values())]
    deadline = time.monotonic() + 150
    while not all(job.has_begun() for job in jobs):
        assert time.monotonic() < deadline, [job.case for job in jobs if not job.has_begun()]
        time.sleep(0.5)
    time.sleep(3)  # wait until the ranks are inside the phase, which leaves no visible trace
    for job in jobs:
        job.kill()
    deadline = time.monotonic() + LIMIT + 10
    missing = {name: job.case.ranks - 1 - (job.case.late >= 0) for name, job in zip(CASES, jobs, strict=True)}
    while any(len(job.ends()) < missing[name] for name, job in zip(CASES, jobs, strict=True)):
        assert time.monotonic() < deadline, {name: job.ends() for name, job in zip(CASES, jobs, strict=True)}
        time.sleep(0.2)
    for name, job in zip(CASES, jobs, strict=True):
        job.process.terminate()
        for rank, result in job.ends().items():
            assert result["kind"] == "LeaderLost", (name, rank, result)
            assert float(result["at"]) - job.killed < LIMIT, (name, rank, result)
            assert f"stage failed in {job.case.phase} " in result["text"], (name, rank, result)
            assert job.case.text in result["text"], (name, rank, result)
