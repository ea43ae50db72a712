"""What an operation costs the job's store: requests of each rank, counted, and seconds, at 8 to 2,048 ranks.

    python benchmarks/store_scale.py [--ranks 8,64,512,2048]

Each rank is a thread with real TCPStore clients of its own, in processes of up to 256; the operation is the one that
every call begins with: a round of all ranks and one of rank 0. Rank 0 reads what all say, so its count grows by few.
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

A_PROCESS = 256


class Counting(dist.Store):
    """A store that counts the requests made through it."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store, self.requests = store, Counter[str]()

    def _counted(self, name: str, *args: Any) -> Any:
        self.requests[name] += 1
        return getattr(self._store, name)(*args)

    def set(self, key: str, value: Any) -> None:
        """Count and pass on, as all below."""
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

    deleteKey = delete_key  # noqa: N815 -- the name by which torch 2.13 calls it


class StoreClients:
    """As `weightferry.cluster.store.StoreClients`, counting."""

    def __init__(self, port: int) -> None:
        self.waiting, self.side = (Counting(dist.TCPStore("127.0.0.1", port, is_master=False)) for _ in range(2))
        self.caller, self.lost = StoreCaller(), False

    @property
    def requests(self) -> int:
        """All so far."""
        return sum(self.waiting.requests.values()) + sum(self.side.requests.values())


def rank_main(rank: int, size: int, port: int, ready: Any, told: list[tuple[int, int, float]]) -> None:
    """Run two rounds on one rank."""
    clients = StoreClients(port)
    ready.wait()
    began = time.monotonic()
    coordinator = DistributedCoordinator(clients, "scale", rank, range(size), Topology(rank, size), Settings())  # type: ignore[arg-type]
    coordinator.round("agree", lambda: ("w", rank // 8), lambda values: len(values))
    coordinator.once("resolve", lambda: "manifest")
    seconds = time.monotonic() - began
    coordinator.close()
    told.append((rank, clients.requests, seconds))


def process_main(first: int, last: int, size: int, port: int, ready: Any, out: Any) -> None:
    """Run some ranks as threads."""
    told: list[tuple[int, int, float]] = []
    threads = [threading.Thread(target=rank_main, args=(r, size, port, ready, told)) for r in range(first, last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.put(told)


def measure(size: int) -> tuple[int, int, float]:
    """Requests of rank 0, the most of any other rank, and the median of seconds."""
    context = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ready, out = context.Barrier(size), context.Queue()
    spans = [(first, min(size, first + A_PROCESS)) for first in range(0, size, A_PROCESS)]
    processes = [context.Process(target=process_main, args=(*span, size, store.port, ready, out)) for span in spans]
    for process in processes:
        process.start()
    told = [one for _ in processes for one in out.get()]
    for process in processes:
        process.join()
    others = [requests for rank, requests, _ in told if rank]
    return next(n for rank, n, _ in told if rank == 0), max(others), statistics.median(s for _, _, s in told)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8,64,512,2048")
    for size in map(int, parser.parse_args().ranks.split(",")):
        first, most, seconds = measure(size)
        print(  # noqa: T201 -- the result
            f"{size:5} ranks: {most:4} requests of a rank at most, {first:5} of rank 0, {seconds:6.2f} s in the median",
            flush=True,
        )


if __name__ == "__main__":
    main()
