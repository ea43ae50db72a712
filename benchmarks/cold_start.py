"""Measure a cold start with weightferry and with other ways, on a real Slurm cluster on this machine, in one run.

    python -m benchmarks.cold_start [--nodes 1,2,4,8] [--only one,twelve,connections] [--json FILE]

It needs root on Debian (slurm/testbed). The origin has 500 Mbit/s and each node 2,000 Mbit/s in each direction; a node
has two ranks. The seconds count from the moment when all ranks have joined until the last rank has loaded. The limit is
the slower of "one copy from the origin" and "one copy into a node", plus the load time of one node alone. `connections`
uses an origin with 80 Mbit/s per connection and 2,000 Mbit/s in total.
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
OTHER_WAYS = ("local rank first", "rank 0 broadcasts", "every rank downloads")


@dataclass(frozen=True)
class Row:
    """The result of one way with one number of nodes."""

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
    """A testbed and an origin that serves the models.

    Parameters
    ----------
    rate
        Bytes per second of each connection; None: no limit.
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
        """Run one way on some nodes; return the bytes from the origin, and the figures of each rank."""
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

    def clear_caches(self, nodes: int) -> None:
        """Remove all caches: the disks of the nodes are in memory."""
        self._testbed.srun(f"-N{nodes}", "--ntasks-per-node=1", "sh", "-c", "rm -rf /local/*")


def last(ranks: list[dict[str, float]], key: str = "seconds") -> float:
    """Return the figure of the slowest rank."""
    return max(rank[key] for rank in ranks)


def cold(bench: Bench, model: str, nodes: int, load: float, ways: tuple[str, ...]) -> list[Row]:
    """Run ways one after the other, each with empty caches."""
    limit = max(SIZE / ORIGIN_MBIT, SIZE / NODE_MBIT) * 8e-6 + load
    rows = []
    for way in ways:
        served, ranks = bench.run(way, model, nodes)
        rows.append(Row(model, nodes, way, served / SIZE, last(ranks), limit))
        print(rows[-1], flush=True)  # noqa: T201 -- the result
        bench.clear_caches(nodes)
    return rows


def side_by_side(models: Path, counts: list[int], selected: list[str]) -> list[Row]:
    """Measure cold starts with every number of nodes, with weightferry and the other ways."""
    rows: list[Row] = []
    for nodes in counts:
        with Testbed(Spec(nodes=nodes, node_mbit=NODE_MBIT, origin_mbit=ORIGIN_MBIT)) as testbed:
            bench = Bench(testbed, models)
            for model in selected:
                bench.run("weightferry", model, 1, "/local/warm")
                _, ranks = bench.run("weightferry", model, 1, "/local/warm")
                load = last(ranks, "load")
                bench.clear_caches(nodes)
                rows += cold(
                    bench, model, nodes, load, ("weightferry", *(OTHER_WAYS if nodes > 1 else OTHER_WAYS[-1:]))
                )
    return rows


def connections(models: Path, counts: list[int]) -> list[Row]:
    """Measure with an origin of 80 Mbit/s per connection and 2,000 Mbit/s in total."""
    rows = []
    for nodes in (1, max(counts)):
        with Testbed(Spec(nodes=nodes, node_mbit=NODE_MBIT, origin_mbit=2000)) as testbed:
            served, ranks = Bench(testbed, models, rate=10e6).run("weightferry", "one", nodes)
            limit = max(SIZE / 2000, SIZE / NODE_MBIT) * 8e-6
            rows.append(Row("80 Mbit each", nodes, "weightferry", served / SIZE, last(ranks, "bring"), limit))
            print(rows[-1], flush=True)  # noqa: T201
    print(f"{max(counts)} nodes compared to one: {rows[0].seconds / rows[1].seconds:.2f} x faster")  # noqa: T201
    return rows


def write_models(folder: Path) -> None:
    """Write one checkpoint of 268 MB, and one of the same size in twelve files."""
    generator = torch.Generator().manual_seed(0)
    for name, files in (("one", 1), ("twelve", 11)):
        (folder / "bench" / name).mkdir(parents=True)
        for number in range(files):
            rows = SIZE // 4 // files // 1024
            state = {f"w{part}": torch.randn(rows // 8, 1024, generator=generator) for part in range(8)}
            torch.save(state, folder / "bench" / name / f"part{number}.pt")
    (folder / "bench" / "twelve" / "config.json").write_text('{"layers": 8}\n')


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="1,2,4,8")
    parser.add_argument("--only", default="one,twelve,connections")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts, parts = [int(count) for count in options.nodes.split(",")], options.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_models(models)
        rows = side_by_side(models, counts, [model for model in ("one", "twelve") if model in parts])
        rows += connections(models, counts) if "connections" in parts else []
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
