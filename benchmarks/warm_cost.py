"""Measure a warm `collect_files`, with all files in the cache, and a bare gloo barrier, in one run.

    python benchmarks/warm_cost.py [--ranks 8] [--files 10] [--repeat 20]

It prints medians in milliseconds and their difference. One origin answers the one metadata request of each call.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from torch import distributed as dist

import weightferry
from weightferry.testing.hub import HubServer
from weightferry.testing.ranks import run_ranks


def measure(files: int, repeat: int) -> tuple[float, float]:
    """Return the medians of (warm collect, barrier) on this rank, in seconds."""
    pretrainer = weightferry.Pretrainer(
        collect_in=None,
        loadables={f"part{number}": object() for number in range(files)},
    )
    pretrainer.collect_files("org/model")
    return median(lambda: pretrainer.collect_files("org/model"), repeat), median(dist.barrier, repeat)


def median(call: Callable[[], object], repeat: int) -> float:
    """Return the median time of `call` in seconds, on ranks that start together."""
    seconds = []
    for _ in range(repeat):
        dist.barrier()
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, HubServer() as hub:
        hub.add_repo("org/model", {f"part{number}.ckpt": b"x" * 1000 for number in range(options.files)})
        environ = {"HF_ENDPOINT": hub.url, "WEIGHTFERRY_CACHE_DIR": folder}
        outcomes = run_ranks(
            measure, options.ranks, options.files, options.repeat, environ=lambda rank: environ, timeout=600
        )
    collect, barrier = (statistics.median(column) for column in zip(*(each.get() for each in outcomes), strict=True))
    print(  # noqa: T201 -- the result
        f"{options.ranks} ranks, {options.files} files, warm: collect_files {1000 * collect:.1f} ms, "
        f"barrier {1000 * barrier:.1f} ms, added {1000 * (collect - barrier):.1f} ms"
    )


if __name__ == "__main__":
    main()
