"""Measure `weightferry cache ls` and the survey of one model, in a cache of one model and of many models.

    python benchmarks/many_models.py [--models 1000] [--repeat 9]

It prints medians. It measures the survey with the model in the cache and with the model missing, without a limit and
with `max_size`, where a leader with missing files adds up the size of the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from weightferry.cache.layout import CacheLayout
from weightferry.cache.locks import FileLocks, LockTimeouts
from weightferry.cache.publish import link_snapshot, publish
from weightferry.cache.space import make_room
from weightferry.cache.survey import CacheSurveyor
from weightferry.hashing import Checksum
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.settings import Settings
from weightferry.sources import Source

FILES = 10


def model(name: str) -> tuple[PinnedSource, dict[str, bytes]]:
    """Generate a model of some small files and one file that is hashed only when it changes."""
    content = {f"part{number}": f"{name}/{number}".encode() * 50 for number in range(FILES - 1)}
    content["weights"] = name.encode() * (3_000_000 // len(name))
    files = tuple(
        File(path, len(data), Checksum("sha256", hashlib.sha256(data).hexdigest())) for path, data in content.items()
    )
    return PinnedSource(Source("hf", f"org/{name}"), hashlib.sha1(name.encode()).hexdigest(), files), content  # noqa: S324


def fill(layout: CacheLayout, models: int) -> PinnedSource:
    """Stage models as a leader does; return the last one. The large file of the other models is empty."""
    for number in range(models):
        pinned, content = model(f"m{number}")
        for file in pinned.files:
            partial = layout.new_partial(pinned, file)
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content[file.path] if number == models - 1 or file.path != "weights" else b"")
            publish(layout, pinned, file, partial, file.key, sync=False)
        link_snapshot(layout, pinned)
    return pinned


def survey(layout: CacheLayout, pinned: PinnedSource, settings: Settings) -> None:
    """Do the work of a leader between resolve and transfer."""
    surveyor = CacheSurveyor(layout, Manifest((pinned,)), FileLocks(LockTimeouts(5), lambda: None))
    result = surveyor.survey()
    lacking = [entry for index, entry in enumerate(surveyor.files) if index not in result.complete]
    make_room(surveyor, lacking, settings, lambda: None)
    surveyor.release()


def median(work: Callable[[], object], repeat: int) -> float:
    """Return the median time of `work` in milliseconds."""
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    missing, _ = model("missing")
    for models in (1, options.models):
        with tempfile.TemporaryDirectory() as folder:
            layout = CacheLayout(Path(folder) / "cache")
            layout.root.mkdir()
            last = fill(layout, models)
            os.sync()
            command = [sys.executable, "-m", "weightferry.cli", "cache", "ls", "--cache-dir", str(layout.root)]
            ls = median(lambda: subprocess.run(command, check=True, capture_output=True), options.repeat)  # noqa: B023
            parts = [f"{models} models: ls {ls:.0f} ms"]
            for limit in (0, 1 << 50):
                settings = Settings(max_size=limit)
                warm, cold = (
                    median(lambda: survey(layout, source, settings), options.repeat)  # noqa: B023
                    for source in (last, missing)
                )
                parts.append(f"survey{' with max_size' * bool(limit)} warm {warm:.1f} ms, missing {cold:.1f} ms")
            print("; ".join(parts))  # noqa: T201 -- the result


if __name__ == "__main__":
    main()
