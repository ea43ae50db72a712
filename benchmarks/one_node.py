"""Measure `stage`, `hf_hub_download` and curl on one node without limits, from the same server; and a leader's memory.

    python benchmarks/one_node.py [--gb 1] [--repeat 3] [--memory-gb 10] [--folder DIR]

Each way runs in its own process. The time counts from the first call, after the imports, to its end; the results are
medians. curl reads ranges over as many connections as a leader, each into its own file. The memory of the leader is
measured above its start: anonymous memory, and the peak of resident memory with mapped files.
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
    """Run one way in a new process, into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    environ = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, repo, str(folder)], env=environ, stdout=-1, check=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    shutil.rmtree(folder)
    return result


def curl(url: str, repo: str, folder: Path, size: int) -> float:
    """Return the seconds for ranges over several connections at the same time."""
    folder.mkdir()
    step = -(-size // CONNECTIONS)
    began = time.monotonic()
    running = []
    for number in range(CONNECTIONS):
        byte_range = f"{number * step}-{min(size, (number + 1) * step) - 1}"
        command = ["curl", "-sL", "-r", byte_range, "-o", str(folder / str(number)), f"{url}/{repo}/resolve/main/w.bin"]
        running.append(subprocess.Popen(command))
    if sum(process.wait() for process in running):  # sum() waits for all of them
        raise SystemExit("curl failed")
    seconds = time.monotonic() - began
    shutil.rmtree(folder)
    return seconds


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory-gb", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, help="Folder for the files; default: the temporary folder.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for repo, gigabytes in (("speed", options.gb), ("memory", options.memory_gb)):
            (folder / "hub/org" / repo).mkdir(parents=True)
            with (folder / "hub/org" / repo / "w.bin").open("wb") as file:
                file.truncate(int(gigabytes * 1e9))
        command = [sys.executable, "-m", "weightferry.testing.hub", str(folder / "hub")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hub:
            assert hub.stdout is not None  # noqa: S101 -- Popen made a pipe
            url = hub.stdout.readline().strip()
            try:
                _compare(url, folder / "out", options)
                memory = python(STAGE, url, "org/memory", folder / "out")
                anonymous, resident = memory["anonymous"] / 1e6, memory["resident"] / 1e6
                print(  # noqa: T201 -- the result
                    f"memory above the start, {options.memory_gb:.0f} GB: {anonymous:.0f} MB anonymous, "
                    f"{resident:.0f} MB resident at most; limit 8 pieces of 64 MiB = 537 MB"
                )
            finally:
                hub.terminate()


def _compare(url: str, out: Path, options: argparse.Namespace) -> None:
    size = int(options.gb * 1e9)
    stage_runs, download_runs, curl_seconds = [], [], []
    for _ in range(options.repeat):  # in turns, so that all ways have the same noise
        stage_runs.append(python(STAGE, url, "org/speed", out))
        download_runs.append(python(DOWNLOAD, url, "org/speed", out))
        curl_seconds.append(curl(url, "org/speed", out, size))
    rows = {"stage": stage_runs, "hf_hub_download": download_runs}
    for way, runs in rows.items():
        seconds, cpu = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu"))
        print(f"{way:18} {options.gb / seconds:5.2f} GB/s  {cpu / options.gb:5.2f} CPU s per GB")  # noqa: T201
    seconds = statistics.median(curl_seconds)
    print(f"curl x {CONNECTIONS:<11} {options.gb / seconds:5.2f} GB/s")  # noqa: T201


if __name__ == "__main__":
    main()
