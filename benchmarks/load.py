"""Measure loading a module on the CPU from the page cache: weightferry, other loaders, and the limit; also memory.

    python benchmarks/load.py [--gb 2] [--repeat 5] [--folder DIR] [--json FILE]

Each way runs in its own process, in turns with the other ways, and loads into an existing module. The seconds count
from the call to its end; the result is the median. The limit is `torch.from_file` and `copy_` of the same bytes.
fastsafetensors and runai-model-streamer are measured if they are installed (`pip install fastsafetensors
runai-model-streamer`). Memory is the peak of anonymous memory minus that at the start. Four ranks load at once: their
proportional set sizes (PSS) of the file add up to one copy.
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

TENSORS, SHARDS = 24, 12

RUN = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from benchmarks.load import WAYS, allocated_module, kilobytes
torch.set_num_threads(1)
way, path, size, ranks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
module = allocated_module(size)
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
result = {"seconds": seconds, "cpu": time.process_time() - cpu, "anonymous": (max(peak[0], start) - start) * 1024}
if ranks > 1:
    from weightferry.loading.readers import read_state
    state = read_state(path)
    for tensor in state.values():
        tensor.flatten()[::1024].sum()  # every page
    print("mapped", flush=True)
    sys.stdin.readline()
    result["pss"] = kilobytes("smaps", "Pss", str(path)) * 1024
print(json.dumps(result), flush=True)
if ranks > 1:
    sys.stdin.readline()
"""


def kilobytes(file: str, name: str, mapped_file: str = "") -> int:
    """Return an entry of ``/proc/self`` in kB; for ``smaps``, the sum over the mappings of one file."""
    total, matches = 0, not mapped_file
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if mapped_file and "-" in line.split(" ", 1)[0]:
            matches = line.endswith(mapped_file)
        elif matches and line.startswith(f"{name}:"):
            total += int(line.split()[1])
    return total


def tensor_shapes(size: int) -> dict[str, tuple[int, int]]:
    """Return the names and shapes of the tensors of a module of about `size` bytes."""
    return {f"{number}.weight": (size // 4 // TENSORS // 2048, 2048) for number in range(TENSORS)}


def allocated_module(size: int) -> torch.nn.Module:
    """Make the module and write to its memory: page faults are not part of the load time."""
    children = [torch.nn.Linear(width, rows, bias=False, device="meta") for rows, width in tensor_shapes(size).values()]
    module = torch.nn.Sequential(*children).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    return module


def _weightferry() -> Any:
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
    "weightferry, safetensors": _weightferry,
    "weightferry, 12 shards": _weightferry,
    "weightferry, torch file": _weightferry,
    "torch.load(mmap=True)": _torch_mmap,
    "safetensors load_model": _load_model,
    "fastsafetensors": _fastsafetensors,
    "runai-model-streamer": _runai,
}


def write(folder: Path, size: int) -> dict[str, Path]:
    """Write the same tensors in every file format; return the file by way."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) for name, shape in tensor_shapes(size).items()}
    single, pickled, index = folder / "model.safetensors", folder / "model.pt", folder / "shards/model.index.json"
    safetensors.torch.save_file(state, single)
    torch.save(state, pickled)
    index.parent.mkdir()
    names = list(state)
    named = {
        name: f"model-{position * SHARDS // len(names) + 1:05}-of-{SHARDS:05}.safetensors"
        for position, name in enumerate(names)
    }
    for shard in dict.fromkeys(named.values()):
        safetensors.torch.save_file({name: state[name] for name in names if named[name] == shard}, index.parent / shard)
    index.write_text(json.dumps({"metadata": {}, "weight_map": named}))
    forms = {"weightferry, 12 shards": index, "weightferry, torch file": pickled, "torch.load(mmap=True)": pickled}
    return {way: forms.get(way, single) for way in WAYS}


def start(way: str, path: Path, size: int, ranks: int = 1) -> subprocess.Popen[str]:
    """Start one way in a new process."""
    here = str(Path(__file__).parents[1])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
    environ["RUNAI_STREAMER_LOG_LEVEL"] = "ERROR"
    command = [sys.executable, "-c", RUN, way, str(path), str(size), str(ranks)]
    return subprocess.Popen(command, env=environ, stdin=-1, stdout=-1, stderr=-1, text=True)


def run_once(way: str, path: Path, size: int) -> dict[str, float] | None:
    """Run one way; return None if its package is not installed."""
    out, errors = (process := start(way, path, size)).communicate()
    if process.returncode:
        if "ModuleNotFoundError" in errors:
            return None
        raise SystemExit(f"{way} failed:\n{errors}")
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


def load_on_ranks(path: Path, size: int, ranks: int) -> list[dict[str, float]]:
    """Load on several ranks at the same time, and measure their PSS of the file while all have it mapped."""
    processes = [start("weightferry, safetensors", path, size, ranks) for _ in range(ranks)]

    def each(expected: str) -> list[str]:
        lines = [process.stdout.readline() if process.stdout else "" for process in processes]
        if not all(line.startswith(expected) for line in lines):
            raise SystemExit(f"a rank failed: {lines}")
        for process in processes:
            assert process.stdin is not None  # noqa: S101 -- Popen made a pipe
            process.stdin.write("\n")
            process.stdin.flush()
        return lines

    each("ready")
    each("mapped")
    result = [json.loads(line) for line in each("{")]
    for process in processes:
        process.communicate()
    return result


def _gpu(size: int) -> list[dict[str, Any]]:
    """Measure the load of a mapped file to the first GPU, and copies from pinned memory and from the mapping."""
    from weightferry.loading.load_object import load_object

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), size)["weightferry, safetensors"]
        module = allocated_module(size).to("cuda:0")
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
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="Folder for the files; default: the temporary folder.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size, rows = int(options.gb * 1e9), []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        paths = write(Path(name), size)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.repeat):  # in turns, so that all ways have the same noise
            for way, path in paths.items():
                if (result := run_once(way, path, size)) is not None:
                    runs[way].append(result)
        limit = statistics.median(run["seconds"] for run in runs["from_file + copy_ (limit)"])
        for way, results_of_way in runs.items():
            if not results_of_way:
                print(f"{way:26} skipped, not installed")  # noqa: T201 -- the result
                continue
            seconds, cpu, memory = (
                statistics.median(run[key] for run in results_of_way) for key in ("seconds", "cpu", "anonymous")
            )
            rows.append({"way": way, "seconds": seconds, "cpu": cpu, "anonymous": memory, "of_limit": limit / seconds})
            print(  # noqa: T201
                f"{way:26} {options.gb / seconds:6.2f} GB/s  {limit / seconds:5.2f} x the limit  "
                f"{cpu / options.gb:5.2f} CPU s per GB  {memory / size:7.2%} more memory"
            )
        results = load_on_ranks(paths["weightferry, safetensors"], size, options.ranks)
        shares = sum(rank["pss"] for rank in results) / size
        most = max(rank["anonymous"] for rank in results) / size
        print(f"{options.ranks} ranks: the file is {shares:.2f} x in memory (PSS), {most:.2%} more on a rank")  # noqa: T201
        rows.append({"way": f"{options.ranks} ranks", "pss": shares, "anonymous": most})
    if torch.cuda.is_available():
        rows += _gpu(size)
    else:
        print("GPU: skipped, there is no CUDA device")  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
