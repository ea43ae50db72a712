"""What ranks run in these tests. A rank imports this by name; arguments and values travel as pickles."""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import weightferry
from tests.store_answers import answer


def saved(obj: object) -> bytes:
    """Return the content of a torch file with the object."""
    import torch

    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Got:
    """What became of one call on one rank."""

    value: Any = None
    error: BaseException | None = None
    seconds: float = 0.0


def each(*calls: Callable[[], Any]) -> list[Got]:
    """Make the calls one after the other, whatever became of the one before."""
    gots = []
    for call in calls:
        began = time.monotonic()
        try:
            value, error = call(), None
        except Exception as caught:  # noqa: BLE001 -- the test looks at it
            value, error = None, caught
        gots.append(Got(value, error, time.monotonic() - began))
    return gots


def in_own_cache(name: str, call: Callable[[], Any]) -> Any:
    """Make the call with a cache folder of its own, beside the cache folder of this rank's node."""
    cache = os.environ["WEIGHTFERRY_CACHE_DIR"]
    os.environ["WEIGHTFERRY_CACHE_DIR"] = f"{cache}-{name}"
    try:
        return call()
    finally:
        os.environ["WEIGHTFERRY_CACHE_DIR"] = cache


def by_rank(calls: Mapping[int, Callable[[], Any]], other: Callable[[], Any]) -> Any:
    """Make the call of this rank, or the one of all others."""
    return calls.get(rank(), other)()


def rank() -> int:
    """The rank of this process."""
    from torch import distributed as dist

    return dist.get_rank()


def wait(seconds: float) -> None:
    """Let the other ranks go on."""
    import time

    time.sleep(seconds)


def record_warnings() -> list[str]:
    """Return a list to which every warning of the package is added from now on."""
    import logging

    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("weightferry").addHandler(Handler(logging.WARNING))
    return messages


def stage(source: str, **options: Any) -> tuple[Path, dict[str, str]]:
    """Stage a source; the path, and by relative path the SHA-256 of what this rank reads there."""
    path = weightferry.stage(source, **options)
    return path, _sha256s(path)


def stage_below(folder: Path, source: str) -> tuple[Path, dict[str, str]]:
    """Stage a source with a cache folder for each rank, below a folder."""
    return stage(source, cache_dir=folder / f"node{rank()}")


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Make the call; its value, and the warnings of weightferry that this rank logged meanwhile."""
    handler, texts = logging.Handler(logging.WARNING), list[str]()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("weightferry")
    logger.addHandler(handler)
    try:
        return call(), texts
    finally:
        logger.removeHandler(handler)


def report(source: str) -> dict[str, Any]:
    """Stage a source and return the run report."""
    from weightferry.cluster.connect import process_group_coordinator
    from weightferry.phases.job_request import RankRequest
    from weightferry.settings import Settings
    from weightferry.sources import SourceRequest
    from weightferry.staging import collect

    settings = Settings.from_environ()
    with process_group_coordinator(settings, "stage") as coordinator:
        return collect(lambda: RankRequest({"": SourceRequest.of(source)}), coordinator, settings).report.to_dict()


def collect(
    paths: Mapping[str, Any], collect_in: Path | None = None, default_source: Any = None, *, internal: bool = True
) -> dict[str, tuple[Path, str]]:
    """Collect files of loadables that nobody loads; by name, path and SHA-256."""
    names = dict.fromkeys(paths, None)
    given = {name: path for name, path in paths.items() if path is not None}
    pretrainer = weightferry.Pretrainer(collect_in, names, given)
    found = pretrainer.collect_files(default_source, internal_ddp_handling=internal)
    return {name: (path, _sha256(path)) for name, path in found.items()}


def collect_locked(paths: Mapping[str, Any], lockfile: str) -> dict[str, str]:
    """Collect from a lock file; by name, the SHA-256."""
    pretrainer = weightferry.Pretrainer(None, dict.fromkeys(paths), paths, lockfile=lockfile)
    return {name: _sha256(path) for name, path in pretrainer.collect_files().items()}


def load(
    paths: Mapping[str, Any],
    make: Callable[[], Mapping[str, Any]],
    collect_in: Path | None = None,
    *,
    verify: Any = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect and load, and return the state of every loadable as plain numbers."""
    loadables = make()
    pretrainer = weightferry.Pretrainer(collect_in, loadables, paths, options=options)
    pretrainer.collect_files()
    pretrainer.load_collected(verify=verify)
    return {name: _plain(loadable.state_dict()) for name, loadable in loadables.items()}


def network() -> Any:
    """A small module with other weights on every rank."""
    import torch

    torch.manual_seed(1000 + rank())
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def plain_module() -> dict[str, Any]:
    """A module and its optimizer."""
    import torch

    model = network()
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)}


def ddp_module() -> dict[str, Any]:
    """A module in DDP, which by itself would spread rank 0's weights at once."""
    from torch.nn.parallel import DistributedDataParallel

    return {"model": DistributedDataParallel(network())}


def no_hook() -> dict[str, Any]:
    """Something that nobody can load."""
    return {"model": object()}


def no_hook_on_rank_1() -> dict[str, Any]:
    """The same on one rank alone."""
    return no_hook() if rank() == 1 else {"model": network()}


def only_model() -> dict[str, Any]:
    """A module alone."""
    return {"model": network()}


def regroup(seconds: float) -> None:
    """Destroy the process group and make another one, on the same store, with another time-out."""
    from torch import distributed as dist

    store, me, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    limit = timedelta(seconds=seconds)
    again = dist.PrefixStore("again", store)
    again.set_timeout(limit)
    dist.init_process_group("gloo", store=again, rank=me, world_size=size, timeout=limit)


def as_nobody(call: Callable[[], Any]) -> Any:
    """Make the call without root's right to read and write everything; for others nothing changes."""
    if os.geteuid() == 0:
        # struct __user_cap_header_struct {version 3, pid 0}; two structs {effective, permitted, inheritable} of zeros
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")
    return call()


def as_user(call: Callable[[], Any], uid: int, gid: int, *groups: int, umask: int = 0o077) -> Any:
    """Make the call as another user, for good."""
    # That user may not be able to enter Python's own folders: what is imported on the way is imported before.
    with tempfile.TemporaryDirectory() as warm:
        stage("org/warm", cache_dir=warm)
    os.umask(umask)
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)
    return call()


def answered(call: Callable[[], Any], system_call: str, errno: int, ranks: Sequence[int] = range(1024)) -> Any:
    """Make the call while the kernel answers a system call so, on these ranks."""
    if rank() in ranks:
        answer(system_call, errno)
    return call()


def command(out: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command as torchrun would start it on this rank; exit code, standard output, standard error."""
    from torch import distributed as dist

    from weightferry.cli import main

    me, store = rank(), dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)
    os.environ.update(
        RANK=str(me),
        WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    texts = [out / f"rank{me}.{name}" for name in ("out", "err")]
    for number, path in enumerate(texts, start=1):
        to = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(to, number)
        os.close(to)
    try:
        main(list(arguments), standalone_mode=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    return code, texts[0].read_text(), texts[1].read_text()


def commands(out: Path, *calls: Sequence[str]) -> list[tuple[int, str, str]]:
    """Run the command several times, each as `command` does it, with folders 0, 1, ... for its output."""
    done = []
    for number, arguments in enumerate(calls):
        folder = out / str(number)
        folder.mkdir(exist_ok=True)
        done.append(command(folder, *arguments))
    return done


def _plain(state: Any) -> Any:
    import torch

    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    return [_plain(value) for value in state] if isinstance(state, list | tuple) else state


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"


def _sha256s(path: Path) -> dict[str, str]:
    if path.is_file():
        return {path.name: _sha256(path)}
    return {file.relative_to(path).as_posix(): _sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
