"""The stage of a generated file onto every node, from a server in the task of rank 0."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from slurm._qualify.values import Question, Staged, Work
from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import CollectError
from weightferry.phases.agree import RankRequest
from weightferry.settings import Settings
from weightferry.sources import SourceRequest

_SEED = 20240501
_BLOCK = 8 << 20
_REPOSITORY, _FILE = "qualify/generated", "weights.bin"


def stage_generated(coordinator: Coordinator, question: Question, settings: Settings) -> Staged:
    """Generate, serve, stage, and hash what arrived on every node."""
    work = Work(question.cache_dir, question.run)
    with contextlib.ExitStack() as serving:
        address = coordinator.round("address", _address_of_rank_0, lambda seen: seen[max(seen)])
        sha256, url = coordinator.once("serve", lambda: _serve(work, question.size, address, serving))
        staged: Staged = {
            "error": None,
            "bytes": question.size,
            "seconds": None,
            "sha256": sha256,
            "nodes_sha256": [],
            "nodes_origin_bytes": [],
        }
        try:
            _stage(coordinator, url, settings, staged)
        except CollectError as error:
            # The same on every rank: all go on together.
            staged["error"] = str(error)
        coordinator.round("served", lambda: None, lambda _: None)
    return staged


def _stage(coordinator: Coordinator, url: str, settings: Settings, staged: Staged) -> None:
    from weightferry.staging import collect

    with _without_proxy(url):
        collected = collect(lambda: RankRequest({"": SourceRequest.of(url)}), coordinator, settings)
    staged["seconds"] = collected.report.total["seconds"]
    by_leader = {domain.leader_rank: domain.origin_bytes for domain in collected.report.domains}
    staged["nodes_origin_bytes"] = [by_leader.get(rank, 0) for rank in range(coordinator.world_size)]
    hashes = coordinator.round("compare", lambda: _sha256(collected.paths[""]), dict)
    staged["nodes_sha256"] = [hashes[rank] for rank in range(coordinator.world_size)]


def _address_of_rank_0() -> str:
    """Look up where this rank finds rank 0; on rank 0 itself that may be a loopback address."""
    return socket.gethostbyname(os.environ["MASTER_ADDR"])


def _serve(work: Work, size: int, address: str, serving: contextlib.ExitStack) -> tuple[str, str]:
    """Generate the file and serve it until `serving` ends; its SHA-256 and its URL.

    By its URL, not as a repository of the Hub: that way no token of the user is sent to it, ``HF_ENDPOINT`` stays as it
    is, and ``HF_HUB_OFFLINE`` does not matter.
    """
    from weightferry.testing.hub import HubServer

    work.origin.mkdir()
    sha256 = _generate(work.origin / _FILE, size)
    server = serving.enter_context(HubServer(host="0.0.0.0"))  # noqa: S104 -- for the other nodes
    server.add_repo(_REPOSITORY, work.origin)
    server.hash_all()
    port = server.url.rpartition(":")[2]
    return sha256, f"http://{address}:{port}/{_REPOSITORY}/resolve/main/{_FILE}"


def _generate(path: Path, size: int) -> str:
    import numpy

    random, digest, left = numpy.random.default_rng(_SEED), hashlib.sha256(), size
    with path.open("wb") as file:
        while left:
            block = random.bytes(min(_BLOCK, left))
            file.write(block)
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _without_proxy(url: str) -> Iterator[None]:
    """Let the URL's host be asked directly: the proxy that leads out of a cluster knows no way to its nodes."""
    host = url.split("/")[2].partition(":")[0]
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    os.environ.update({name: f"{value},{host}" if value else host for name, value in before.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
