"""Many jobs at once on caches that are too small for all they use, some of them killed, for as long as one likes.

Nothing that a living process has staged changes or goes, no cache grows beyond its limit, no job fails for another
one's sake, none hangs, and nothing stays behind.
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
MODELS, AT_A_TIME, MODELS_A_JOB = 20, 3, 2
PATIENCE = 120.0  # seconds that a job may take
PORT, CDN_PORT, FIRST_JOB_PORT = 8120, 8121, 9500


def make_model(folder: Path, number: int) -> dict[str, str]:
    """Write two or three big files and a small one; return their SHA-256."""
    rng = random.Random(number)
    # Three small models; the others differ so little that the largest of all jobs at a time fit into a third of all.
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
class Place:
    """Where jobs run, and what they find there.

    Attributes
    ----------
    wanted
        A file with the SHA-256 of each file of each model.
    sizes
        By model, its bytes.
    """

    testbed: Testbed
    hub: Served
    wanted: Path
    sizes: dict[str, int]
    cache: Path

    @property
    def max_size(self) -> int:
        """A third of all models; those of all jobs at a time fit, whichever they are."""
        largest, limit = sorted(self.sizes.values())[-AT_A_TIME * MODELS_A_JOB :], sum(self.sizes.values()) // 3
        assert sum(largest) <= limit
        return limit

    @property
    def environ(self) -> dict[str, str]:
        own = {"CACHE_DIR": self.cache, "MAX_SIZE": self.max_size, "BEAT_TIMEOUT": 4, "BEAT_INTERVAL": 1}
        named = {f"WEIGHTFERRY_{name}": str(value) for name, value in own.items()}
        return {**self.hub.environ, **named, "GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def on_nodes(self, *command: str) -> Iterator[tuple[str, subprocess.CompletedProcess[str]]]:
        """Run a command on each node, whatever its exit code."""
        for node in self.testbed.nodes:
            yield node, self.testbed.run(command, node, check=False, env=self.environ)

    def cache_command(self, *arguments: str) -> Iterator[tuple[str, subprocess.CompletedProcess[str]]]:
        return self.on_nodes(sys.executable, "-m", "weightferry.cli", "cache", *arguments)

    def find(self, *arguments: str) -> Iterator[tuple[str, list[str]]]:
        """By node, the lines that ``find`` prints; what goes while it walks is no error."""
        return ((node, found.stdout.splitlines()) for node, found in self.on_nodes("find", str(self.cache), *arguments))


@pytest.fixture
def place(testbed: Testbed) -> Iterator[Place]:
    root, wanted = testbed.shared / "soak-hub", testbed.shared / "soak-wanted.json"
    models = {f"org/m{number}": make_model(root / f"org/m{number}", number) for number in range(MODELS)}
    wanted.write_text(json.dumps(models))
    sizes = {name: sum((root / name / path).stat().st_size for path in paths) for name, paths in models.items()}
    command = [sys.executable, "-m", "weightferry.testing.hub", str(root), "--host", "0.0.0.0"]
    origin = testbed.start_origin([*command, "--port", str(PORT), "--cdn-port", str(CDN_PORT)], PORT)
    place = Place(testbed, Served(testbed, origin.url, {}), wanted, sizes, testbed.local / "cache-soak")
    yield place
    testbed.run(["scancel", "--signal=KILL", "--user=root"], check=False)
    origin.process.terminate()
    list(place.on_nodes("rm", "-rf", str(place.cache)))


class Job:
    """A job with one rank on each of some nodes, of which one may be killed."""

    def __init__(self, place: Place, number: int, rng: random.Random) -> None:
        self.place, self.killed, self._due = place, False, 0.0
        self.nodes = sorted(rng.sample(place.testbed.nodes, rng.randint(2, len(place.testbed.nodes))))
        self.models = rng.sample(sorted(place.sizes), rng.randint(1, MODELS_A_JOB))
        self.victim = rng.randrange(len(self.nodes)) if rng.random() < 1 / 3 else None
        self._delay = rng.uniform(0, 2.5)
        self.folder = place.testbed.shared / f"soak{number}"
        self.folder.mkdir()
        command = ["srun", "--overlap", "--kill-on-bad-exit=0", "--ntasks-per-node=1", f"-N{len(self.nodes)}"]
        command += ["-w", ",".join(self.nodes), sys.executable, str(HERE / "soak_job.py"), str(self.folder)]
        command += [str(place.wanted), f"{self.nodes[0]}:{FIRST_JOB_PORT + number % 400}", *self.models]
        with (self.folder / "log").open("wb") as log:
            self.process = place.testbed.popen(command, env=place.environ, stdout=log, stderr=log)
        self._began = time.monotonic()

    def __str__(self) -> str:
        killed = f", rank {self.victim} killed after {self._delay:.2f} s" if self.killed else ""
        said = (self.folder / "log").read_text(errors="replace")
        return f"{self.folder.name}: {self.models} on {self.nodes}{killed}\n{said}"

    def kill_when_due(self) -> None:
        """Kill the victim, if there is one, some time after it could be killed first."""
        pid = self.folder / f"pid{self.victim}"
        if self.victim is None or self.killed or not pid.exists():
            return
        self._due = self._due or time.monotonic() + self._delay
        if time.monotonic() > self._due:
            kill = self.place.testbed.run(["kill", "-9", pid.read_text()], self.nodes[self.victim], check=False)
            self.killed = kill.returncode == 0
            self.victim = self.victim if self.killed else None  # it had ended

    def is_over(self) -> bool:
        over = self.process.poll() is not None
        assert over or time.monotonic() - self._began < PATIENCE, f"hangs: {self}"
        return over

    def staged(self) -> int:
        """Bytes that its ranks staged; fails unless each of them ended as it may."""
        ends = [self._end(rank) for rank in range(len(self.nodes))]
        for rank, end in enumerate(ends):
            is_right = end["why"] == "" or (self.killed and (rank == self.victim or end["lost"] == [self.victim]))
            assert is_right, f"rank {rank}: {end}\n{self}"
        assert self.killed or self.process.returncode == 0, str(self)
        return sum(end["bytes"] for end in ends)

    def _end(self, rank: int) -> dict[str, Any]:
        file = self.folder / f"end{rank}"
        end: dict[str, Any] = {"why": "says nothing", "lost": [], "bytes": 0}
        return {**end, **(json.loads(file.read_text()) if file.exists() else {})}


class Soak:
    """Keeps some jobs running, and watches how large the content of the caches gets."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.jobs = self.killed = self.wanted = self.staged = self.largest = 0

    def run(self) -> None:
        """Start jobs until the time is over, then let them end."""
        rng, running, until = random.Random(SEED), list[Job](), time.monotonic() + SECONDS
        while (goes_on := time.monotonic() < until) or running:
            while goes_on and len(running) < AT_A_TIME:
                running.append(Job(self.place, self.jobs, rng))
                self.jobs += 1
            for job in running:
                job.kill_when_due()
            for job in [job for job in running if job.is_over()]:
                running.remove(job)
                self.killed += job.killed
                self.wanted += sum(self.place.sizes[model] for model in job.models)
                self.staged += job.staged()
            # A walk over what changes may count both what goes after it and what takes its place: hence the smaller.
            self.largest = max(self.largest, *map(min, self._content(), self._content()))

    def _content(self) -> list[int]:
        found = self.place.find("-path", "*/blobs/*", "-type", "f", "-printf", "%s\n")
        return [sum(map(int, sizes)) for _, sizes in found]


def what_stays(place: Place) -> Iterator[str]:
    """Yield what should not be once no job runs any more, then what is left when all was to go."""
    if jobs := place.testbed.run(["squeue", "--noheader"]).stdout:
        yield f"still there: {jobs}"
    for node, done in place.cache_command("ls", "--json"):
        yield from (f"{node}: in use: {row['source']}" for row in json.loads(done.stdout) if row["in_use"])
    for node, paths in place.find("-name", "*.lock", "!", "-exec", "flock", "-n", "{}", "true", ";", "-print"):
        yield from (f"{node}: held: {path}" for path in paths)
    for command in (["verify"], ["evict", "--to", "0"]):
        for node, done in place.cache_command(*command):
            if done.returncode:
                yield f"{node}: {command[0]}: {done.stdout}{done.stderr}"
    for node, paths in place.find("-path", "*/blobs/*"):
        yield from (f"{node}: not evicted: {path}" for path in paths)
    for node, paths in place.find("-name", ".*", "!", "-name", ".locks", "!", "-path", "*/partial/*"):
        yield from (f"{node}: half made: {path}" for path in paths)


@pytest.mark.timeout(SECONDS + PATIENCE + 120)
def test_many_jobs_on_small_caches(place: Place) -> None:
    print(f"WEIGHTFERRY_TEST_SEED={SEED}")
    began, soak = time.monotonic(), Soak(place)
    soak.run()
    full = soak.largest / place.max_size
    print(
        f"{time.monotonic() - began:.0f} s, {soak.jobs} jobs, {soak.killed} killed, {soak.staged} bytes staged, "
        f"{place.hub.content_bytes() / soak.wanted:.2f} bytes from the origin for each that a job wanted, "
        f"the fullest cache at {full:.2f} of its limit"
    )
    stays = list(what_stays(place))
    assert not stays, "\n".join(stays)
    assert full <= 1
