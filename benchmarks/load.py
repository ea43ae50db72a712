"""Loading a module on the CPU from the page cache: our hook beside its peers and its limit; memory, shards, four ranks.

    python benchmarks/load.py [--gb 2] [--repeat 5] [--folder DIR] [--json FILE]

Each way runs in a process of its own, in turns, into a module that is there already; seconds count from its call to its
end, and the median is told. The limit is `torch.from_file` and `copy_` of the same bytes. fastsafetensors and
runai-model-streamer are measured where they can be imported (`pip install fastsafetensors runai-model-streamer`).
Memory is what the process owns (anonymous) at its peak above the start. Four ranks load at once: their proportional set
size of the file (PSS) adds up to one copy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

PARTS, SHARDS = 24, 12

RUN = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from benchmarks.load import WAYS, empty, kilobytes
torch.set_num_threads(1)
way, path, size, ranks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
module = empty(size)
load = WAYS[way]()
start, peak, over = kilobytes("status", "RssAnon"), [0], threading.Event()
def watch():
    while not over.wait(0.005):
        peak[0] = max(peak[0], kilobytes("status", "RssAnon"))
threading.Thread(target=watch, daemon=True).start()
if ranks > 1:
    print("ready", flush=True)
    sys.stdin.readline()
cpu, began = time.process_time(), time.perf_counter()
kept = load(module, path)
seconds = time.perf_counter() - began
over.set()
told = {"seconds": seconds, "cpu": time.process_time() - cpu, "anonymous": (max(peak[0], start) - start) * 1024}
if ranks > 1:
    from weightferry.loading.readers import read_state
    state = read_state(path)
    for tensor in state.values():
        tensor.flatten()[::1024].sum()  # every page
    print("mapped", flush=True)
    sys.stdin.readline()
    told["pss"] = kilobytes("smaps", "Pss", str(path)) * 1024
print(json.dumps(told), flush=True)
if ranks > 1:
    sys.stdin.readline()
"""


def kilobytes(file: str, name: str, of: str = "") -> int:
    """Read an entry of ``/proc/self``; of ``smaps``, the sum over the mappings of one file."""
    total, counts = 0, not of
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if of and "-" in line.split(" ", 1)[0]:
            counts = line.endswith(of)
        elif counts and line.startswith(f"{name}:"):
            total += int(line.split()[1])
    return total


def shapes(size: int) -> dict[str, tuple[int, int]]:
    """Name the tensors of a module of about `size` bytes."""
    return {f"{number}.weight": (size // 4 // PARTS // 2048, 2048) for number in range(PARTS)}


def empty(size: int) -> torch.nn.Module:
    """Make the module, its memory touched: the first touch is no part of loading."""
    children = [torch.nn.Linear(width, rows, bias=False, device="meta") for rows, width in shapes(size).values()]
    module = torch.nn.Sequential(*children).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    return module


def _ours() -> Any:
    from weightferry.loading.load_object import load_object

    return lambda module, path: load_object("model", module, path)


def _limit() -> Any:
    def copy(module: torch.nn.Module, path: Path) -> None:
        file = torch.from_file(str(path), size=path.stat().st_size // 4, dtype=torch.float32)
        at = 0
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(file[at : at + parameter.numel()].view_as(parameter))
                at += parameter.numel()

    return copy


def _torch_mmap() -> Any:
    return lambda module, path: module.load_state_dict(torch.load(path, mmap=True, weights_only=True))


def _load_model() -> Any:
    return safetensors.torch.load_model


def _fastsafetensors() -> Any:
    from fastsafetensors import fastsafe_open

    def load(module: torch.nn.Module, path: Path) -> None:
        with fastsafe_open(filenames=[str(path)], nogds=True, device="cpu", debug_log=False) as file:
            module.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 -- no mapping

    return load


def _runai() -> Any:
    from runai_model_streamer import SafetensorsStreamer

    def load(module: torch.nn.Module, path: Path) -> None:
        parameters = dict(module.named_parameters())
        with SafetensorsStreamer() as streamer, torch.no_grad():
            streamer.stream_file(str(path))
            for name, tensor in streamer.get_tensors():
                parameters[name].copy_(tensor)

    return load


WAYS = {
    "from_file + copy_ (limit)": _limit,
    "weightferry, safetensors": _ours,
    "weightferry, 12 shards": _ours,
    "weightferry, torch file": _ours,
    "torch.load(mmap=True)": _torch_mmap,
    "safetensors load_model": _load_model,
    "fastsafetensors": _fastsafetensors,
    "runai-model-streamer": _runai,
}


def write(folder: Path, size: int) -> dict[str, Path]:
    """Write the same numbers in every form; by way, the file."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) for name, shape in shapes(size).items()}
    single, pickled, index = folder / "model.safetensors", folder / "model.pt", folder / "shards/model.index.json"
    safetensors.torch.save_file(state, single)
    torch.save(state, pickled)
    index.parent.mkdir()
    names = list(state)
    named = {
        name: f"model-{place * SHARDS // len(names) + 1:05}-of-{SHARDS:05}.safetensors"
        for place, name in enumerate(names)
    }
    for shard in dict.fromkeys(named.values()):
        safetensors.torch.save_file({name: state[name] for name in names if named[name] == shard}, index.parent / shard)
    index.write_text(json.dumps({"metadata": {}, "weight_map": named}))
    forms = {"weightferry, 12 shards": index, "weightferry, torch file": pickled, "torch.load(mmap=True)": pickled}
    return {way: forms.get(way, single) for way in WAYS}


def start(way: str, path: Path, size: int, ranks: int = 1) -> subprocess.Popen[str]:
    """Start one way in a process of its own."""
    here = str(Path(__file__).parents[1])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
    environ["RUNAI_STREAMER_LOG_LEVEL"] = "ERROR"
    command = [sys.executable, "-c", RUN, way, str(path), str(size), str(ranks)]
    return subprocess.Popen(command, env=environ, stdin=-1, stdout=-1, stderr=-1, text=True)


def once(way: str, path: Path, size: int) -> dict[str, float] | None:
    """Run one way; None when it cannot be imported."""
    out, said = (process := start(way, path, size)).communicate()
    if process.returncode:
        if "ModuleNotFoundError" in said:
            return None
        raise SystemExit(f"{way} failed:\n{said}")
    told: dict[str, float] = json.loads(out.splitlines()[-1])
    return told


def together(path: Path, size: int, ranks: int) -> list[dict[str, float]]:
    """Load on several ranks at once, and look at their shares of the file while all have it mapped."""
    processes = [start("weightferry, safetensors", path, size, ranks) for _ in range(ranks)]

    def each(expected: str) -> list[str]:
        lines = [process.stdout.readline() if process.stdout else "" for process in processes]
        if not all(line.startswith(expected) for line in lines):
            raise SystemExit(f"a rank failed: {lines}")
        for process in processes:
            assert process.stdin is not None  # noqa: S101 -- it was asked for
            process.stdin.write("\n")
            process.stdin.flush()
        return lines

    each("ready")
    each("mapped")
    told = [json.loads(line) for line in each("{")]
    for process in processes:
        process.communicate()
    return told


def _gpu(size: int) -> list[dict[str, Any]]:
    """From the mapped file to the first GPU, beside a copy from pinned memory, and ``copy_`` from the mapping."""
    from weightferry.loading.load_object import load_object

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), size)["weightferry, safetensors"]
        module = empty(size).to("cuda:0")
        state = safetensors.torch.load_file(path)
        pinned = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(64 << 20, dtype=torch.uint8, device="cuda:0")
        ways = {
            "pinned copy (limit)": lambda: [target.copy_(pinned, non_blocking=True) for _ in range(size >> 26)],
            "weightferry": lambda: load_object("model", module, path),
            "copy_ from the mapping": lambda: module.load_state_dict(state),
        }
        for way, run in ways.items():
            seconds = []
            for _ in range(4):
                torch.cuda.synchronize()
                began = time.perf_counter()
                run()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            rows.append({"way": f"GPU, {way}", "seconds": min(seconds)})
            print(f"GPU, {way:24} {size / 1e9 / min(seconds):6.2f} GB/s")  # noqa: T201
    return rows


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="Where to write; default: the temporary folder.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    size, rows = int(given.gb * 1e9), []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        paths = write(Path(name), size)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(given.repeat):  # in turns, so that all meet the same noise
            for way, path in paths.items():
                if (told := once(way, path, size)) is not None:
                    runs[way].append(told)
        limit = statistics.median(run["seconds"] for run in runs["from_file + copy_ (limit)"])
        for way, done in runs.items():
            if not done:
                print(f"{way:26} not installed: skipped")  # noqa: T201 -- the result
                continue
            seconds, cpu, memory = (
                statistics.median(run[key] for run in done) for key in ("seconds", "cpu", "anonymous")
            )
            rows.append({"way": way, "seconds": seconds, "cpu": cpu, "anonymous": memory, "of_limit": limit / seconds})
            print(  # noqa: T201
                f"{way:26} {given.gb / seconds:6.2f} GB/s  {limit / seconds:5.2f} x the limit  "
                f"{cpu / given.gb:5.2f} CPU s per GB  {memory / size:7.2%} more memory"
            )
        four = together(paths["weightferry, safetensors"], size, given.ranks)
        shares = sum(rank["pss"] for rank in four) / size
        most = max(rank["anonymous"] for rank in four) / size
        print(f"{given.ranks} ranks: the file is {shares:.2f} x in memory (PSS), {most:.2%} more on a rank")  # noqa: T201
        rows.append({"way": f"{given.ranks} ranks", "pss": shares, "anonymous": most})
    if torch.cuda.is_available():
        rows += _gpu(size)
    else:
        print("GPU: there is no CUDA device here: skipped")  # noqa: T201
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
