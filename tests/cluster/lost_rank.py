"""One rank of a job that loses a rank; a script, since srun starts it.

    lost_rank.py SOURCE CACHE FOLDER PORT LATE

It writes its pid, then the result and the time of its call. Rank LATE never calls.
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
        result = {"kind": "", "text": ""}
    except weightferry.CollectError as error:
        result = {"kind": type(error).__name__, "text": str(error)}
    part = folder / f"part{rank}"
    part.write_text(json.dumps({**result, "at": time.time()}))
    part.replace(folder / f"end{rank}")
    os._exit(1)  # end at once: the other ranks must not need this process


if __name__ == "__main__":
    main()
