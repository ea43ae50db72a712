"""Real ranks on this machine: processes in one gloo group, started in milliseconds, killed at will.

::

    def work(folder):
        return weightferry.stage("org/model", cache_dir=folder)

    outcomes = run_ranks(work, 4, environ=lambda rank: {"WEIGHTFERRY_CACHE_DIR": f"{tmp}/node{rank // 2}"})

Ranks are forked from a server process that has imported torch once, so `work` must be importable by name (a function of
a module), and its arguments and value must pickle.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

_PRELOAD = ("torch.distributed", "weightferry.testing.ranks", "weightferry.staging", "weightferry.loading.registry")


@dataclass(frozen=True)
class RankOutcome:
    """How one rank ended.

    Attributes
    ----------
    value : object
        What the function returned.
    error : BaseException or None
        What it raised.
    exitcode : int or None
        0, or the negative number of the signal that ended it before it could say anything.
    seconds : float
        From the start of all ranks to this rank's end.
    """

    value: Any = None
    error: BaseException | None = None
    exitcode: int | None = 0
    seconds: float = 0.0

    def get(self) -> Any:
        """Return the value, or raise what the rank raised."""
        if self.error is not None:
            raise self.error
        if self.exitcode:
            raise RuntimeError(f"the rank was ended by signal {-self.exitcode}")
        return self.value


def run_ranks(
    work: Callable[..., Any],
    world_size: int,
    *args: Any,
    environ: Callable[[int], Mapping[str, str]] | None = None,
    timeout: float = 60.0,
) -> list[RankOutcome]:
    """Run ``work(*args)`` on every rank of a gloo process group, and wait for all.

    Parameters
    ----------
    work
        A function of a module.
    world_size
        How many ranks.
    environ
        By rank, variables to set before the group is made.
    timeout
        Seconds; then every rank is killed.

    Raises
    ------
    TimeoutError
        Naming the ranks that did not end.
    """
    with Ranks(work, world_size, *args, environ=environ) as ranks:
        return ranks.outcomes(timeout)


class Ranks:
    """Running ranks; leaving the context kills those that are left. Arguments as for `run_ranks`."""

    def __init__(
        self,
        work: Callable[..., Any],
        world_size: int,
        *args: Any,
        environ: Callable[[int], Mapping[str, str]] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        self._began = time.monotonic()
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            variables = dict(environ(rank)) if environ else {}
            process = context.Process(
                target=_main, args=(theirs, rank, world_size, variables, work, args), name=f"rank{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        self._introduce()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in range(len(self._processes)):
            self.signal(rank, signal.SIGKILL)
        for end, process in zip(self._ends, self._processes, strict=True):
            process.join()
            process.close()
            end.close()

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank, if it still runs."""
        if self._processes[rank].is_alive():
            pid = self._processes[rank].pid
            assert pid is not None  # noqa: S101 -- it was started
            # The forkserver reaps its children: one may end between the question and the signal.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def outcomes(self, timeout: float) -> list[RankOutcome]:
        """Wait for all ranks to end; see `run_ranks`."""
        return self.outcomes_of(range(len(self._ends)), timeout)

    def outcomes_of(self, ranks: Collection[int], timeout: float) -> list[RankOutcome]:
        """Wait for some ranks to end."""
        outcomes: dict[int, RankOutcome] = {}
        until = time.monotonic() + timeout
        while len(outcomes) < len(ranks):
            running = {self._ends[rank]: rank for rank in ranks if rank not in outcomes}
            ready = wait(list(running), max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(running.values())} did not end within {timeout:.0f} s")
            for end in ready:
                assert isinstance(end, Connection)  # noqa: S101 -- only those are waited for
                outcomes[running[end]] = self._outcome(running[end], end)
        return [outcomes[rank] for rank in ranks]

    def _outcome(self, rank: int, end: Connection) -> RankOutcome:
        try:
            value, error = end.recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            return RankOutcome(exitcode=self._processes[rank].exitcode, seconds=time.monotonic() - self._began)
        return RankOutcome(value, error, seconds=time.monotonic() - self._began)

    def _introduce(self) -> None:
        """Rank 0 opens the store on a port that is free at that moment, and the others are told."""
        port = self._ends[0].recv()
        for end in self._ends[1:]:
            end.send(port)


def _main(
    end: Connection,
    rank: int,
    world_size: int,
    environ: Mapping[str, str],
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environ)
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"})
    from torch import distributed as dist

    limit = timedelta(seconds=60)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, timeout=limit, wait_for_workers=False)
        end.send(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", end.recv(), world_size, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    try:
        end.send((work(*args), None))
    except BaseException as error:  # noqa: BLE001 -- whatever it was, the test wants to see it
        end.send((None, error))
    finally:
        if rank == 0:
            end.poll(limit.total_seconds())  # the store lives here: stay until the others are done
        end.close()
