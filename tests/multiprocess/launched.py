"""Commands as a launcher starts them: processes of the operating system, all ended when the test ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.multiprocess.nodes import Nodes

LIMIT = 110.0  # seconds; four processes import torch on a busy machine
WEIGHTFERRY = (sys.executable, "-m", "weightferry")


@dataclass(frozen=True)
class Done:
    """How a process ended."""

    code: int
    out: str
    err: str


def together(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], folder: Path, limit: float = LIMIT
) -> list[Done]:
    """Run commands at the same time, each with its environment, and wait for all."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        running = []
        for number, (command, environ) in enumerate(commands):
            files = [folder / f"{number}.{name}" for name in ("out", "err")]
            out, err = (stack.enter_context(file.open("wb")) for file in files)
            process = subprocess.Popen(command, env=environ, stdout=out, stderr=err, cwd=folder)
            stack.callback(_end, process)
            running.append((process, files))
        return [Done(process.wait(limit), *(file.read_text() for file in files)) for process, files in running]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()  # torchrun's agent ends its ranks
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def clean_environ(nodes: Nodes, rank: int = 0) -> dict[str, str]:
    """The environment of a rank, without what a launcher above these tests may have set."""
    launchers = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "GROUP_",
        "MASTER_",
        "TORCHELASTIC",
        "SLURM_",
        "OMPI_",
        "PMI",
        "SUBMITIT",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith((*launchers, "WEIGHTFERRY_"))}
    return {**kept, **nodes.environ(rank), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def torchrun(nodes: Nodes, *arguments: str, ranks_an_agent: int = 2) -> list[Done]:
    """Run the command on two agents, as on two nodes; how the agents ended."""
    with meeting_point() as port:
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        run += ["--nproc-per-node", str(ranks_an_agent)]
        run += ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        run += ["--rdzv-conf", "is_host=0", "--local-addr", "127.0.0.1", "-m", "weightferry", *arguments]
        return together([(run, clean_environ(nodes, rank)) for rank in (0, 2)], nodes.place / "agents")


@contextmanager
def meeting_point() -> Iterator[int]:
    """Hold a store where processes meet, so that its port is ours before anybody hears of it."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store  # it served until here
