"""One node, nothing limited: `stage` beside `hf_hub_download` and curl, from the same server; and a leader's memory.

    python benchmarks/one_node.py [--gb 1] [--repeat 3] [--memory-gb 10] [--folder DIR]

Each way runs in a process of its own and counts from its first call (imports are done) to its end; medians. curl reads
ranges over as many connections as a leader has, each to a file. Memory is that of the leader above its start: what it
owns (anonymous), and the peak of all that is resident, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from weightferry.settings import Settings

CONNECTIONS = Settings().connections

STAGE = """
import json, os, resource, sys, threading, time
import weightferry.staging, weightferry.origins.hub
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
peak, over = [0], threading.Event()
def watch():
    while not over.wait(0.02):
        peak[0] = max(peak[0], memory("RssAnon"))
start = memory("RssAnon"), memory("VmRSS")
threading.Thread(target=watch, daemon=True).start()
cpu, began = os.times(), time.monotonic()
weightferry.staging.stage(sys.argv[1], cache_dir=sys.argv[2])
seconds, now = time.monotonic() - began, os.times()
over.set()
print(json.dumps({"seconds": seconds, "cpu": now.user + now.system - cpu.user - cpu.system,
                  "anonymous": peak[0] - start[0], "resident": memory("VmHWM") - start[1]}))
"""
DOWNLOAD = """
import json, os, sys, time
from huggingface_hub import hf_hub_download
cpu, began = os.times(), time.monotonic()
hf_hub_download(sys.argv[1], "w.bin", cache_dir=sys.argv[2])
seconds, now = time.monotonic() - began, os.times()
print(json.dumps({"seconds": seconds, "cpu": now.user + now.system - cpu.user - cpu.system}))
"""


def python(code: str, url: str, repo: str, folder: Path) -> dict[str, float]:
    """Run one way in a process of its own, into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    environ = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, repo, str(folder)], env=environ, stdout=-1, check=True, text=True
    )
    told: dict[str, float] = json.loads(done.stdout)
    shutil.rmtree(folder)
    return told


def curl(url: str, repo: str, folder: Path, size: int) -> float:
    """Seconds for ranges over several connections at once."""
    folder.mkdir()
    step = -(-size // CONNECTIONS)
    began = time.monotonic()
    running = []
    for number in range(CONNECTIONS):
        span = f"{number * step}-{min(size, (number + 1) * step) - 1}"
        command = ["curl", "-sL", "-r", span, "-o", str(folder / str(number)), f"{url}/{repo}/resolve/main/w.bin"]
        running.append(subprocess.Popen(command))
    if sum(process.wait() for process in running):  # all are waited for
        raise SystemExit("curl failed")
    seconds = time.monotonic() - began
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, help="Where to write; default: the temporary folder.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        place = Path(name)
        for repo, gigabytes in (("speed", given.gb), ("memory", given.memory_gb)):
            (place / "hub/org" / repo).mkdir(parents=True)
            with (place / "hub/org" / repo / "w.bin").open("wb") as file:
                file.truncate(int(gigabytes * 1e9))
        command = [sys.executable, "-m", "weightferry.testing.hub", str(place / "hub")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hub:
            assert hub.stdout is not None  # noqa: S101 -- it was asked for
            url = hub.stdout.readline().strip()
            try:
                _compare(url, place / "out", given)
                one = python(STAGE, url, "org/memory", place / "out")
                print(  # noqa: T201 -- the result
                    f"memory above the start, {given.memory_gb:.0f} GB: {one['anonymous'] / 1e6:.0f} MB anonymous, "
                    f"{one['resident'] / 1e6:.0f} MB resident at most; limit 8 pieces of 64 MiB = 537 MB"
                )
            finally:
                hub.terminate()


def _compare(url: str, out: Path, given: argparse.Namespace) -> None:
    size = int(given.gb * 1e9)
    ours, theirs, curls = [], [], []
    for _ in range(given.repeat):  # in turns, so that all meet the same noise
        ours.append(python(STAGE, url, "org/speed", out))
        theirs.append(python(DOWNLOAD, url, "org/speed", out))
        curls.append(curl(url, "org/speed", out, size))
    rows = {"stage": ours, "hf_hub_download": theirs}
    for way, runs in rows.items():
        seconds, cpu = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu"))
        print(f"{way:18} {given.gb / seconds:5.2f} GB/s  {cpu / given.gb:5.2f} CPU s per GB")  # noqa: T201
    seconds = statistics.median(curls)
    print(f"curl x {CONNECTIONS:<11} {given.gb / seconds:5.2f} GB/s")  # noqa: T201


if __name__ == "__main__":
    main()
