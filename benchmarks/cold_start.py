"""A cold start on a real Slurm cluster of this machine's own, side by side with the other ways, in one run.

    python -m benchmarks.cold_start [--nodes 1,2,4,8] [--only one,twelve,connections] [--json FILE]

Needs root on Debian (slurm/testbed). Origin 500 Mbit/s and nodes 2,000 Mbit/s each way, two ranks a node; seconds count
from the moment when all ranks have met until the last one has loaded. The limit is the slower of "one copy from the
origin" and "one copy into a node", and the load time of one node alone. `connections`: an origin that gives 80 Mbit/s
to each connection, 2,000 in all.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from slurm.testbed import Spec, Testbed

HERE = Path(__file__).parent
SIZE = 268_435_456  # bytes of the checkpoint
ORIGIN_MBIT, NODE_MBIT, TASKS = 500, 2000, 2
PEERS = ("local rank first", "rank 0 broadcasts", "every rank downloads")


@dataclass(frozen=True)
class Row:
    """One way at one size."""

    what: str
    nodes: int
    way: str
    copies: float
    seconds: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{self.what:12} {self.nodes:2} nodes  {self.way:20}  {self.copies:5.2f} x the bytes  {self.seconds:6.2f} s"
            f"  limit {self.limit:5.2f} s  {self.seconds / self.limit:5.2f} x"
        )


class Bench:
    """A testbed with an origin that serves the models.

    Parameters
    ----------
    rate
        Bytes a second of each connection; None: as fast as the link.
    """

    def __init__(self, testbed: Testbed, models: Path, rate: float | None = None) -> None:
        self._testbed, self._port = testbed, 8600
        command = [sys.executable, "-m", "weightferry.testing.hub", str(models), "--port", "8500"]
        command += ["--host", testbed.addresses["origin"]]
        limit = ["--rate", str(rate)] if rate else []
        self._hub = testbed.start_origin([*command, "--cdn-port", "8501", *limit], 8500, timeout=120)

    def _served(self) -> int:
        stats = self._testbed.run(["curl", "-s", f"{self._hub.url}/-/stats"], "origin").stdout
        return int(json.loads(stats)["content_bytes"])

    def run(self, way: str, model: str, nodes: int, cache: str | None = None) -> tuple[int, list[dict[str, float]]]:
        """Run one way on some nodes; bytes that left the origin, and what each rank measured."""
        out = self._testbed.shared / secrets.token_hex(4)
        out.mkdir()
        cache = cache or f"/local/{out.name}"
        self._port += 1
        environ = {
            "HF_ENDPOINT": self._hub.url,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        before = self._served()
        command = [sys.executable, str(HERE / "cold_rank.py"), way, f"bench/{model}", cache, str(out), str(self._port)]
        self._testbed.srun(
            f"-N{nodes}", f"--ntasks-per-node={TASKS}", "--kill-on-bad-exit=1", *command, env=environ, timeout=300
        )
        return self._served() - before, [json.loads(file.read_text()) for file in out.iterdir()]

    def forget(self, nodes: int) -> None:
        """Remove all caches: the nodes' disks are the machine's memory."""
        self._testbed.srun(f"-N{nodes}", "--ntasks-per-node=1", "sh", "-c", "rm -rf /local/*")


def last(ranks: list[dict[str, float]], what: str = "seconds") -> float:
    """The slowest rank's figure."""
    return max(rank[what] for rank in ranks)


def cold(bench: Bench, model: str, nodes: int, load: float, ways: tuple[str, ...]) -> list[Row]:
    """Run ways one after the other, each from nothing."""
    limit = max(SIZE / ORIGIN_MBIT, SIZE / NODE_MBIT) * 8e-6 + load
    rows = []
    for way in ways:
        served, ranks = bench.run(way, model, nodes)
        rows.append(Row(model, nodes, way, served / SIZE, last(ranks), limit))
        print(rows[-1], flush=True)  # noqa: T201 -- the result
        bench.forget(nodes)
    return rows


def side_by_side(models: Path, counts: list[int], wanted: list[str]) -> list[Row]:
    """Cold starts at every number of nodes, with the other ways."""
    rows: list[Row] = []
    for nodes in counts:
        with Testbed(Spec(nodes=nodes, node_mbit=NODE_MBIT, origin_mbit=ORIGIN_MBIT)) as testbed:
            bench = Bench(testbed, models)
            for model in wanted:
                bench.run("weightferry", model, 1, "/local/warm")
                _, ranks = bench.run("weightferry", model, 1, "/local/warm")
                load = last(ranks, "load")
                bench.forget(nodes)
                rows += cold(bench, model, nodes, load, ("weightferry", *(PEERS if nodes > 1 else PEERS[-1:])))
    return rows


def connections(models: Path, counts: list[int]) -> list[Row]:
    """An origin that gives each connection 80 Mbit/s, and 2,000 to all."""
    rows = []
    for nodes in (1, max(counts)):
        with Testbed(Spec(nodes=nodes, node_mbit=NODE_MBIT, origin_mbit=2000)) as testbed:
            served, ranks = Bench(testbed, models, rate=10e6).run("weightferry", "one", nodes)
            limit = max(SIZE / 2000, SIZE / NODE_MBIT) * 8e-6
            rows.append(Row("80 Mbit each", nodes, "weightferry", served / SIZE, last(ranks, "bring"), limit))
            print(rows[-1], flush=True)  # noqa: T201
    print(f"{max(counts)} nodes against one: {rows[0].seconds / rows[1].seconds:.2f} x faster")  # noqa: T201
    return rows


def write_models(folder: Path) -> None:
    """Make one checkpoint of 268 MB, and the same bytes in twelve files with a configuration."""
    generator = torch.Generator().manual_seed(0)
    for name, files in (("one", 1), ("twelve", 11)):
        (folder / "bench" / name).mkdir(parents=True)
        for number in range(files):
            rows = SIZE // 4 // files // 1024
            state = {f"w{part}": torch.randn(rows // 8, 1024, generator=generator) for part in range(8)}
            torch.save(state, folder / "bench" / name / f"part{number}.pt")
    (folder / "bench" / "twelve" / "config.json").write_text('{"layers": 8}\n')


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="1,2,4,8")
    parser.add_argument("--only", default="one,twelve,connections")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    counts, only = [int(count) for count in given.nodes.split(",")], given.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_models(models)
        rows = side_by_side(models, counts, [model for model in ("one", "twelve") if model in only])
        rows += connections(models, counts) if "connections" in only else []
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
