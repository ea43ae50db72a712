"""One rank of a job of the soak test; a script, since srun starts it.

    soak_job.py FOLDER CHECKSUMS HOST:PORT MODEL...

Stages models one after the other, and reads them repeatedly until it ends. It writes ``pidR`` into FOLDER when the test
may kill this rank, and ``endR`` with its result. CHECKSUMS has the SHA-256 of every file.
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

LOST, FAILED = 3, 4  # exit codes: another rank was lost; another error
READS = 3


def main() -> None:
    folder, checksums, address, *models = sys.argv[1:]
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    limit = timedelta(seconds=60)
    faulthandler.dump_traceback_later(100)  # before the timeout of the test, to show where it hangs
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=limit)
    write(Path(folder, f"pid{rank}"), str(os.getpid()))
    lost, why, staged = list[int](), "", 0
    try:
        staged = stage_and_read(models, json.loads(Path(checksums).read_text()), random.Random(f"{folder}/{rank}"))
    except Exception as error:  # noqa: BLE001 -- the test gets the error
        traceback.print_exc()
        failures = error.failures if isinstance(error, weightferry.CollectError) else {}
        lost = [name for name, failure in failures.items() if failure.kind == "LeaderLost"]
        why = f"{type(error).__name__}: {error}"
    write(Path(folder, f"end{rank}"), json.dumps({"lost": lost, "why": why, "bytes": staged}))
    sys.stderr.flush()
    os._exit(LOST if lost else FAILED if why else 0)  # end at once: the other ranks must not need this process


def stage_and_read(models: list[str], checksums: dict[str, dict[str, str]], rng: random.Random) -> int:
    """Stage the models and read them; return the staged bytes."""
    folders = {}
    for model in models:
        folders[model] = weightferry.stage(model)
        staged = sum(read(folder, checksums[name]) for name, folder in folders.items())
    for _ in range(READS):
        time.sleep(rng.uniform(1, 3) / READS)
        for name, folder in folders.items():
            read(folder, checksums[name])
    return staged


def read(folder: Path, checksums: dict[str, str]) -> int:
    """Check the SHA-256 of every file in the folder that `stage` returned; return their bytes."""
    size = 0
    for name, sha256 in checksums.items():
        content = (folder / name).read_bytes()
        got = hashlib.sha256(content).hexdigest()
        if got != sha256:
            raise ValueError(f"{folder / name} has {len(content)} bytes with SHA-256 {got}, expected {sha256}")
        size += len(content)
    return size


def write(path: Path, text: str) -> None:
    part = path.with_name(f"part-{path.name}")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    main()
