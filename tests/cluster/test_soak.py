"""Many jobs at the same time on caches that are too small for all models; some jobs are killed.

A file that a running process staged neither changes nor disappears. No cache exceeds its limit. No job fails because of
another job or hangs, and no lock or temporary file remains.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from slurm.testbed import Testbed
from tests.cluster.origin import Served

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("WEIGHTFERRY_TEST_SOAK_SECONDS", "12"))
SEED = int(os.environ.get("WEIGHTFERRY_TEST_SEED", "20"))
MODELS, PARALLEL_JOBS, MODELS_PER_JOB = 20, 3, 2
JOB_TIMEOUT = 120.0  # seconds
PORT, CDN_PORT, FIRST_JOB_PORT = 8120, 8121, 9500


def make_model(folder: Path, number: int) -> dict[str, str]:
    """Write two or three big files and a small one; return their SHA-256."""
    rng = random.Random(number)
    # Three small models. The other models have similar sizes, so that those of all parallel jobs fit into a third.
    size = rng.randrange(3_000_000, 4_500_000) if number % 7 == 0 else rng.randrange(6_900_000, 7_200_000)
    cuts = [0, size // 3, size] if number % 2 else [0, size // 8, size // 2, size]
    content = rng.randbytes(size)
    files = {f"model-{start}.safetensors": content[start:stop] for start, stop in pairwise(cuts)}
    files["config.json"] = json.dumps({"model": number, "seed": rng.random()}).encode()
    folder.mkdir(parents=True)
    for path, part in files.items():
        (folder / path).write_bytes(part)
    return {path: hashlib.sha256(part).hexdigest() for path, part in files.items()}


@dataclass(frozen=True)
class SoakSetup:
    """The nodes, the Hub and the caches of the jobs.

    Attributes
    ----------
    checksums
        A file with the SHA-256 of each file of each model.
    sizes
        By model, its bytes.
    """

    testbed: Testbed
    hub: Served
    checksums: Path
    sizes: dict[str, int]
    cache: Path

    @property
    def max_size(self) -> int:
        """A third of the bytes of all models; the models of all parallel jobs always fit."""
        largest, limit = sorted(self.sizes.values())[-PARALLEL_JOBS * MODELS_PER_JOB :], sum(self.sizes.values()) // 3
        assert sum(largest) <= limit
        return limit

    @property
    def environ(self) -> dict[str, str]:
        own = {"CACHE_DIR": self.cache, "MAX_SIZE": self.max_size, "BEAT_TIMEOUT": 4, "BEAT_INTERVAL": 1}
        named = {f"WEIGHTFERRY_{name}": str(value) for name, value in own.items()}
        return {**self.hub.environ, **named, "GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def on_nodes(self, *command: str) -> Iterator[tuple[str, subprocess.CompletedProcess[str]]]:
        """Run a command on each node; ignore its exit code."""
        for node in self.testbed.nodes:
            yield node, self.testbed.run(command, node, check=False, env=self.environ)

    def cache_command(self, *arguments: str) -> Iterator[tuple[str, subprocess.CompletedProcess[str]]]:
        return self.on_nodes(sys.executable, "-m", "weightferry.cli", "cache", *arguments)

    def find(self, *arguments: str) -> Iterator[tuple[str, list[str]]]:
        """The output lines of ``find`` by node; a file that disappears during the walk is no error."""
        return ((node, found.stdout.splitlines()) for node, found in self.on_nodes("find", str(self.cache), *arguments))


@pytest.fixture
def setup(testbed: Testbed) -> Iterator[SoakSetup]:
    root, checksums = testbed.shared / "soak-hub", testbed.shared / "soak-checksums.json"
    models = {f"org/m{number}": make_model(root / f"org/m{number}", number) for number in range(MODELS)}
    checksums.write_text(json.dumps(models))
    sizes = {name: sum((root / name / path).stat().st_size for path in paths) for name, paths in models.items()}
    command = [sys.executable, "-m", "weightferry.testing.hub", str(root), "--host", "0.0.0.0"]
    origin = testbed.start_origin([*command, "--port", str(PORT), "--cdn-port", str(CDN_PORT)], PORT)
    setup = SoakSetup(testbed, Served(testbed, origin.url, {}), checksums, sizes, testbed.local / "cache-soak")
    yield setup
    testbed.run(["scancel", "--signal=KILL", "--user=root"], check=False)
    origin.process.terminate()
    list(setup.on_nodes("rm", "-rf", str(setup.cache)))


class Job:
    """A job with one rank on each of some nodes; it may kill one of them."""

    def __init__(self, setup: SoakSetup, number: int, rng: random.Random) -> None:
        self.setup, self.killed, self._due = setup, False, 0.0
        self.nodes = sorted(rng.sample(setup.testbed.nodes, rng.randint(2, len(setup.testbed.nodes))))
        self.models = rng.sample(sorted(setup.sizes), rng.randint(1, MODELS_PER_JOB))
        self.victim = rng.randrange(len(self.nodes)) if rng.random() < 1 / 3 else None
        self._delay = rng.uniform(0, 2.5)
        self.folder = setup.testbed.shared / f"soak{number}"
        self.folder.mkdir()
        command = ["srun", "--overlap", "--kill-on-bad-exit=0", "--ntasks-per-node=1", f"-N{len(self.nodes)}"]
        command += ["-w", ",".join(self.nodes), sys.executable, str(HERE / "soak_job.py"), str(self.folder)]
        command += [str(setup.checksums), f"{self.nodes[0]}:{FIRST_JOB_PORT + number % 400}", *self.models]
        with (self.folder / "log").open("wb") as log:
            self.process = setup.testbed.popen(command, env=setup.environ, stdout=log, stderr=log)
        self._began = time.monotonic()

    def __str__(self) -> str:
        killed = f", rank {self.victim} killed after {self._delay:.2f} s" if self.killed else ""
        log = (self.folder / "log").read_text(errors="replace")
        return f"{self.folder.name}: {self.models} on {self.nodes}{killed}\n{log}"

    def kill_when_due(self) -> None:
        """Kill the victim, if there is one, some time after its start."""
        pid = self.folder / f"pid{self.victim}"
        if self.victim is None or self.killed or not pid.exists():
            return
        self._due = self._due or time.monotonic() + self._delay
        if time.monotonic() > self._due:
            kill = self.setup.testbed.run(["kill", "-9", pid.read_text()], self.nodes[self.victim], check=False)
            self.killed = kill.returncode == 0
            self.victim = self.victim if self.killed else None  # it had ended

    def has_ended(self) -> bool:
        ended = self.process.poll() is not None
        assert ended or time.monotonic() - self._began < JOB_TIMEOUT, f"hangs: {self}"
        return ended

    def check_ranks(self) -> int:
        """Check the result of every rank; return the bytes that they staged."""
        results = [self._result(rank) for rank in range(len(self.nodes))]
        for rank, result in enumerate(results):
            is_allowed = result["why"] == "" or (
                self.killed and (rank == self.victim or result["lost"] == [self.victim])
            )
            assert is_allowed, f"rank {rank}: {result}\n{self}"
        assert self.killed or self.process.returncode == 0, str(self)
        return sum(result["bytes"] for result in results)

    def _result(self, rank: int) -> dict[str, Any]:
        file = self.folder / f"end{rank}"
        result: dict[str, Any] = {"why": "no result", "lost": [], "bytes": 0}
        return {**result, **(json.loads(file.read_text()) if file.exists() else {})}


class Soak:
    """Keeps some jobs running, and measures the largest size of the caches."""

    def __init__(self, setup: SoakSetup) -> None:
        self.setup = setup
        self.jobs = self.killed = self.requested_bytes = self.staged_bytes = self.largest = 0

    def run(self) -> None:
        """Start jobs until the time is over, then wait for their end."""
        rng, running, deadline = random.Random(SEED), list[Job](), time.monotonic() + SECONDS
        while (in_time := time.monotonic() < deadline) or running:
            while in_time and len(running) < PARALLEL_JOBS:
                running.append(Job(self.setup, self.jobs, rng))
                self.jobs += 1
            for job in running:
                job.kill_when_due()
            for job in [job for job in running if job.has_ended()]:
                running.remove(job)
                self.killed += job.killed
                self.requested_bytes += sum(self.setup.sizes[model] for model in job.models)
                self.staged_bytes += job.check_ranks()
            # One walk may count an evicted file and the file that replaces it, so take the smaller of two walks.
            self.largest = max(self.largest, *map(min, self._content(), self._content()))

    def _content(self) -> list[int]:
        found = self.setup.find("-path", "*/blobs/*", "-type", "f", "-printf", "%s\n")
        return [sum(map(int, sizes)) for _, sizes in found]


def leftovers(setup: SoakSetup) -> Iterator[str]:
    """Yield the traces of jobs after their end, and the files that an eviction of all sources leaves."""
    if jobs := setup.testbed.run(["squeue", "--noheader"]).stdout:
        yield f"still running: {jobs}"
    for node, done in setup.cache_command("ls", "--json"):
        yield from (f"{node}: in use: {row['source']}" for row in json.loads(done.stdout) if row["in_use"])
    for node, paths in setup.find("-name", "*.lock", "!", "-exec", "flock", "-n", "{}", "true", ";", "-print"):
        yield from (f"{node}: locked: {path}" for path in paths)
    for command in (["verify"], ["evict", "--to", "0"]):
        for node, done in setup.cache_command(*command):
            if done.returncode:
                yield f"{node}: {command[0]}: {done.stdout}{done.stderr}"
    for node, paths in setup.find("-path", "*/blobs/*"):
        yield from (f"{node}: not evicted: {path}" for path in paths)
    for node, paths in setup.find("-name", ".*", "!", "-name", ".locks", "!", "-path", "*/partial/*"):
        yield from (f"{node}: temporary file: {path}" for path in paths)


@pytest.mark.timeout(SECONDS + JOB_TIMEOUT + 120)
def test_many_jobs_on_small_caches(setup: SoakSetup) -> None:
    print(f"WEIGHTFERRY_TEST_SEED={SEED}")
    began, soak = time.monotonic(), Soak(setup)
    soak.run()
    full = soak.largest / setup.max_size
    print(
        f"{time.monotonic() - began:.0f} s, {soak.jobs} jobs, {soak.killed} killed, {soak.staged_bytes} bytes staged, "
        f"{setup.hub.content_bytes() / soak.requested_bytes:.2f} bytes from the origin per requested byte, "
        f"the fullest cache at {full:.2f} of its limit"
    )
    left = list(leftovers(setup))
    assert not left, "\n".join(left)
    assert full <= 1
