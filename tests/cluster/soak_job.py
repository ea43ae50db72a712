"""One rank of a job of the soak test; a script, since srun starts it.

    soak_job.py FOLDER WANTED HOST:PORT MODEL...

Stages models one after the other, and reads them again and again until it ends. FOLDER gets ``pidR`` once this rank may
be killed, and ``endR`` with what became of it. WANTED has the SHA-256 of every file.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

from torch import distributed as dist

import weightferry

LOST, FAILED = 3, 4  # exit codes: another rank was lost; everything else
TIMES = 3


def main() -> None:
    folder, wanted, address, *models = sys.argv[1:]
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    limit = timedelta(seconds=60)
    faulthandler.dump_traceback_later(100)  # before the test gives up, to tell where it hangs
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=limit)
    write(Path(folder, f"pid{rank}"), str(os.getpid()))
    lost, why, staged = list[int](), "", 0
    try:
        staged = use(models, json.loads(Path(wanted).read_text()), random.Random(f"{folder}/{rank}"))
    except Exception as error:  # noqa: BLE001 -- the test is told
        traceback.print_exc()
        failures = error.failures if isinstance(error, weightferry.CollectError) else {}
        lost = [name for name, failure in failures.items() if failure.kind == "LeaderLost"]
        why = f"{type(error).__name__}: {error}"
    write(Path(folder, f"end{rank}"), json.dumps({"lost": lost, "why": why, "bytes": staged}))
    sys.stderr.flush()
    os._exit(LOST if lost else FAILED if why else 0)  # a rank that ends leaves at once; the others must not need it


def use(models: list[str], wanted: dict[str, dict[str, str]], rng: random.Random) -> int:
    """Stage and read; return how many bytes were staged."""
    there = {}
    for model in models:
        there[model] = weightferry.stage(model)
        staged = sum(read(folder, wanted[name]) for name, folder in there.items())
    for _ in range(TIMES):
        time.sleep(rng.uniform(1, 3) / TIMES)
        for name, folder in there.items():
            read(folder, wanted[name])
    return staged


def read(folder: Path, wanted: dict[str, str]) -> int:
    """Hash every file through the folder that `stage` returned; return their bytes."""
    size = 0
    for name, sha256 in wanted.items():
        content = (folder / name).read_bytes()
        got = hashlib.sha256(content).hexdigest()
        if got != sha256:
            raise ValueError(f"{folder / name} has {len(content)} bytes with SHA-256 {got}, {sha256} is right")
        size += len(content)
    return size


def write(path: Path, text: str) -> None:
    part = path.with_name(f"part-{path.name}")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    main()
