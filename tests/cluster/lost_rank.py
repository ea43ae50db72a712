"""One rank of a job that loses another one; a script, since srun starts it.

    lost_rank.py SOURCE CACHE FOLDER PORT LATE

Writes its pid, then what became of its call and when; LATE is a rank that never calls.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from torch import distributed as dist

import weightferry


def main() -> None:
    source, cache, folder, port, late = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    dist.init_process_group("gloo", init_method=f"tcp://node1:{port}", rank=rank, world_size=size)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if rank == late:
        time.sleep(600)
    try:
        weightferry.stage(source, cache_dir=cache)
        told = {"kind": "", "text": ""}
    except weightferry.CollectError as error:
        told = {"kind": type(error).__name__, "text": str(error)}
    part = folder / f"part{rank}"
    part.write_text(json.dumps({**told, "at": time.time()}))
    part.replace(folder / f"end{rank}")
    os._exit(1)  # a rank that fails leaves at once; the others must not need it


if __name__ == "__main__":
    main()
