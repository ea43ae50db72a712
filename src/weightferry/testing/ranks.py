"""Real ranks on this machine: processes in one gloo group that start within milliseconds.

::

    def work(folder):
        return weightferry.stage("org/model", cache_dir=folder)

    outcomes = run_ranks(work, 4, environ=lambda rank: {"WEIGHTFERRY_CACHE_DIR": f"{tmp}/node{rank // 2}"})

A server process imports torch once and forks the ranks. So `work` must be a function of a module, and its arguments and
its value must pickle. Name the other modules that the ranks need in `preload`: otherwise each rank imports them itself.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

_PRELOAD = (
    "torch.distributed",
    "torch._dynamo",  # each optimizer and each DDP imports it, which takes seconds
    "weightferry.testing.ranks",
    "weightferry.staging",
    "weightferry.pretrainer",
    "weightferry.transfer.relay.ring",
    "weightferry.cluster.distributed",
    "weightferry.loading.load_all",
    "weightferry.origins.hub",
)


@dataclass(frozen=True)
class RankOutcome:
    """The end of one rank.

    Attributes
    ----------
    value : object
        The return value of the function.
    error : BaseException or None
        The error that the function raised.
    exitcode : int or None
        0, or the negative number of the signal that killed the process before it sent a result.
    seconds : float
        Seconds from the start of all ranks to the end of this rank.
    """

    value: Any = None
    error: BaseException | None = None
    exitcode: int | None = 0
    seconds: float = 0.0

    def get(self) -> Any:
        """Return the value, or raise the error of the rank."""
        if self.error is not None:
            raise self.error
        if self.exitcode:
            raise RuntimeError(f"signal {-self.exitcode} killed the rank")
        return self.value


def run_ranks(
    work: Callable[..., Any],
    world_size: int,
    *args: Any,
    environ: Callable[[int], Mapping[str, str]] | None = None,
    timeout: float = 60.0,
    preload: Sequence[str] = (),
) -> list[RankOutcome]:
    """Run ``work(*args)`` on every rank of a gloo process group, and wait for all ranks.

    Parameters
    ----------
    work
        A function of a module.
    world_size
        Number of ranks.
    environ
        Returns the environment variables of a rank, to set before the process group is made.
    timeout
        Seconds until all ranks are killed.
    preload
        Names of modules that the server process imports when it starts, which is in the first call of a process.

    Raises
    ------
    TimeoutError
        It names the ranks that did not end.
    """
    with Ranks(work, world_size, *args, environ=environ, preload=preload) as ranks:
        return ranks.outcomes(timeout)


class Ranks:
    """Running ranks; the end of the context kills the remaining ranks. Arguments as for `run_ranks`."""

    def __init__(
        self,
        work: Callable[..., Any],
        world_size: int,
        *args: Any,
        environ: Callable[[int], Mapping[str, str]] | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_PRELOAD, *preload])
        self._began = time.monotonic()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            parent_end, child_end = context.Pipe()
            variables = dict(environ(rank)) if environ else {}
            process = context.Process(
                target=_main, args=(child_end, rank, world_size, variables, work, args), name=f"rank{rank}", daemon=True
            )
            process.start()
            child_end.close()
            self._connections.append(parent_end)
            self._processes.append(process)
        self._send_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in range(len(self._processes)):
            self.signal(rank, signal.SIGKILL)
        for connection, process in zip(self._connections, self._processes, strict=True):
            process.join()
            process.close()
            connection.close()

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank, if it still runs."""
        if self._processes[rank].is_alive():
            pid = self._processes[rank].pid
            assert pid is not None  # noqa: S101 -- it was started
            # The forkserver reaps its children: the process may end between the check and the signal.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def outcomes(self, timeout: float) -> list[RankOutcome]:
        """Wait for all ranks to end; see `run_ranks`."""
        return self.outcomes_of(range(len(self._connections)), timeout)

    def outcomes_of(self, ranks: Collection[int], timeout: float) -> list[RankOutcome]:
        """Wait for some ranks to end."""
        outcomes: dict[int, RankOutcome] = {}
        deadline = time.monotonic() + timeout
        while len(outcomes) < len(ranks):
            running = {self._connections[rank]: rank for rank in ranks if rank not in outcomes}
            ready = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(running.values())} did not end within {timeout:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)  # noqa: S101 -- `running` has only connections
                outcomes[running[connection]] = self._outcome(running[connection], connection)
        return [outcomes[rank] for rank in ranks]

    def _outcome(self, rank: int, connection: Connection) -> RankOutcome:
        try:
            value, error = connection.recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            return RankOutcome(exitcode=self._processes[rank].exitcode, seconds=time.monotonic() - self._began)
        return RankOutcome(value, error, seconds=time.monotonic() - self._began)

    def _send_port(self) -> None:
        """Send the port of the store, which rank 0 opened on a free port, to the other ranks."""
        port = self._connections[0].recv()
        for connection in self._connections[1:]:
            connection.send(port)


def _main(
    connection: Connection,
    rank: int,
    world_size: int,
    environ: Mapping[str, str],
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environ)
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"})
    # This module reads the environment when it is imported, and the server process has imported it.
    importlib.reload(sys.modules["huggingface_hub.constants"])
    from torch import distributed as dist

    timeout = timedelta(seconds=60)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        connection.send(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", connection.recv(), world_size, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        connection.send((work(*args), None))
    except BaseException as error:  # noqa: BLE001 -- the test gets every error
        connection.send((None, error))
    finally:
        if rank == 0:
            connection.poll(timeout.total_seconds())  # this process holds the store: stay until the other ranks end
        connection.close()
