"""Count the requests of an operation to the job's store, and measure its seconds, with 8 to 2,048 ranks.

    python benchmarks/store_scale.py [--ranks 8,64,512,2048]

Each rank is a thread with its own TCPStore clients; a process has up to 256 ranks. The operation has the first two
phases of every call: one on all ranks and one on rank 0. Rank 0 reads the results of all ranks together, so its count
grows slowly.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from collections import Counter
from typing import Any

from torch import distributed as dist

from weightferry.cluster.distributed import DistributedCoordinator
from weightferry.cluster.launchers import Topology
from weightferry.cluster.store import StoreCaller
from weightferry.settings import Settings

RANKS_PER_PROCESS = 256


class CountingStore(dist.Store):
    """A store that counts the requests made through it."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store, self.requests = store, Counter[str]()

    def _counted(self, name: str, *args: Any) -> Any:
        self.requests[name] += 1
        return getattr(self._store, name)(*args)

    def set(self, key: str, value: Any) -> None:
        """Count the request and forward it, as all methods below."""
        self._counted("set", key, value)

    def get(self, key: str) -> Any:
        """See `set`."""
        return self._counted("get", key)

    def add(self, key: str, value: int) -> Any:
        """See `set`."""
        return self._counted("add", key, value)

    def check(self, keys: list[str]) -> Any:
        """See `set`."""
        return self._counted("check", keys)

    def wait(self, keys: list[str], *limit: Any) -> None:
        """See `set`."""
        self._counted("wait", keys, *limit)

    def multi_get(self, keys: list[str]) -> Any:
        """See `set`."""
        return self._counted("multi_get", keys)

    def delete_key(self, key: str) -> Any:
        """See `set`."""
        return self._counted("delete_key", key)

    deleteKey = delete_key  # noqa: N815 -- torch 2.13 calls it by this name


class StoreClients:
    """Like `weightferry.cluster.store.StoreClients`, but counts requests."""

    def __init__(self, port: int) -> None:
        self.waiting, self.side = (CountingStore(dist.TCPStore("127.0.0.1", port, is_master=False)) for _ in range(2))
        self.store, self.caller, self.lost = self.waiting, StoreCaller(), False

    @property
    def requests(self) -> int:
        """The number of requests so far."""
        return sum(self.waiting.requests.values()) + sum(self.side.requests.values())


def rank_main(rank: int, size: int, port: int, ready: Any, results: list[tuple[int, int, float]]) -> None:
    """Run two phases on one rank."""
    clients = StoreClients(port)
    ready.wait()
    began = time.monotonic()
    coordinator = DistributedCoordinator(clients, "scale", rank, range(size), Topology(rank, size), Settings())  # type: ignore[arg-type]
    coordinator.run_phase("agree", lambda: ("w", rank // 8), lambda values: len(values))
    coordinator.run_on_rank0("resolve", lambda: "manifest")
    seconds = time.monotonic() - began
    coordinator.close()
    results.append((rank, clients.requests, seconds))


def process_main(first: int, last: int, size: int, port: int, ready: Any, out: Any) -> None:
    """Run some ranks as threads."""
    results: list[tuple[int, int, float]] = []
    threads = [threading.Thread(target=rank_main, args=(r, size, port, ready, results)) for r in range(first, last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.put(results)


def measure(size: int) -> tuple[int, int, float]:
    """Return the requests of rank 0, the largest number of another rank, and the median seconds."""
    context = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ready, out = context.Barrier(size), context.Queue()
    spans = [(first, min(size, first + RANKS_PER_PROCESS)) for first in range(0, size, RANKS_PER_PROCESS)]
    processes = [context.Process(target=process_main, args=(*span, size, store.port, ready, out)) for span in spans]
    for process in processes:
        process.start()
    results = [one for _ in processes for one in out.get()]
    for process in processes:
        process.join()
    others = [requests for rank, requests, _ in results if rank]
    return next(n for rank, n, _ in results if rank == 0), max(others), statistics.median(s for _, _, s in results)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8,64,512,2048")
    for size in map(int, parser.parse_args().ranks.split(",")):
        rank0, largest, seconds = measure(size)
        print(  # noqa: T201 -- the result
            f"{size:5} ranks: {largest:4} requests of a rank at most, {rank0:5} of rank 0, median {seconds:6.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
