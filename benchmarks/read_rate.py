"""Measure the read rate of one process from one server: weightferry's origin, huggingface_hub and curl, in one run.

    python benchmarks/read_rate.py [--size 1.0] [--connections 4] [--piece 16] [--repeat 3]

The test server runs in its own process and serves a sparse file, so that it reads no disk. The network has no limit.
Each way writes the file to the temporary folder. It prints medians: GB/s, and CPU seconds of the readers per GB.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

NAME = "weights.bin"


@contextmanager
def serving(root: Path, size: int) -> Iterator[str]:
    """Serve ``org/model`` with one sparse file of `size` bytes from another process; yield the URL."""
    (root / "org/model").mkdir(parents=True)
    with (root / "org/model" / NAME).open("wb") as file:
        file.truncate(size)
    command = [sys.executable, "-m", "weightferry.testing.hub", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()  # type: ignore[union-attr]
        finally:
            server.terminate()


def by_origin(folder: Path, connections: int, piece: int) -> None:
    """Read ranges on several threads, and write each at its offset into a preallocated file."""
    from weightferry.origins.registry import origin_for  # reads HF_ENDPOINT
    from weightferry.settings import Settings
    from weightferry.sources import Source

    with closing(origin_for("hf", Settings())) as origin, (folder / NAME).open("wb") as out:
        pinned = origin.resolve(Source("hf", "org/model"), [NAME])
        size = pinned.file(NAME).size or 0
        os.posix_fallocate(out.fileno(), 0, size)
        starts, lock = iter(range(0, size, piece)), threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    offset = next(starts, None)
                if offset is None:
                    return
                with origin.read(pinned, NAME, offset, min(offset + piece, size)) as chunks:
                    for chunk in chunks:
                        offset += os.pwrite(out.fileno(), chunk, offset)

        threads = [threading.Thread(target=work) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def by_huggingface_hub(folder: Path) -> None:
    """Download with huggingface_hub, without Xet: the server does not offer it."""
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/model", NAME, cache_dir=folder)


def by_curl(folder: Path, url: str, size: int, connections: int) -> None:
    """Read with several curl processes, one range each."""
    ends = [size * number // connections for number in range(connections + 1)]
    file_url = f"{url}/org/model/resolve/main/{NAME}"
    curls = [
        subprocess.Popen(["curl", "-sSfL", "-r", f"{start}-{stop - 1}", "-o", str(folder / f"part{start}"), file_url])
        for start, stop in itertools.pairwise(ends)
    ]
    codes = [curl.wait() for curl in curls]
    if any(codes):
        raise SystemExit("curl failed")


def measure(way: Callable[[Path], None], size: int, repeat: int) -> tuple[float, float]:
    """Return the medians of (bytes per second, CPU seconds per byte), with the children that have ended."""
    rates, costs = [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            began, used = time.perf_counter(), sum(os.times()[:4])
            way(Path(folder))
            rates.append(size / (time.perf_counter() - began))
            costs.append((sum(os.times()[:4]) - used) / size)
            if sum(path.stat().st_size for path in Path(folder).rglob("*") if _is_content(path)) != size:
                raise SystemExit("the file is not complete")
    return statistics.median(rates), statistics.median(costs)


def _is_content(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size > 1000


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="GB (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--piece", type=int, default=16, help="MiB (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    size = int(options.size * 1e9)
    if not shutil.which("curl"):
        parser.error("this benchmark needs curl")
    with tempfile.TemporaryDirectory() as root, serving(Path(root), size) as url:
        os.environ |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        ways: dict[str, Callable[[Path], None]] = {
            f"HubOrigin, {options.connections} threads": lambda to: by_origin(
                to, options.connections, options.piece << 20
            ),
            "hf_hub_download": by_huggingface_hub,
            f"curl x {options.connections}": lambda to: by_curl(to, url, size, options.connections),
        }
        for name, way in ways.items():
            rate, cost = measure(way, size, options.repeat)
            print(f"{name:24} {rate / 1e9:6.2f} GB/s {cost * 1e9:6.2f} CPU s/GB", flush=True)  # noqa: T201 -- the result


if __name__ == "__main__":
    main()
