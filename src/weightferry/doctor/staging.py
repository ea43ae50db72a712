"""Stages a generated file onto every node, from a server in the task of rank 0."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from weightferry.cluster.coordinator import Coordinator
from weightferry.doctor.findings import StageResult
from weightferry.doctor.request import CheckRequest, ScratchPaths
from weightferry.errors import CollectError
from weightferry.phases.job_request import RankRequest
from weightferry.settings import Settings
from weightferry.sources import SourceRequest

_SEED = 20240501
_BLOCK = 8 << 20
_REPOSITORY, _FILE = "qualify/generated", "weights.bin"


def stage_generated(coordinator: Coordinator, request: CheckRequest, settings: Settings) -> StageResult:
    """Generate a file, serve it, stage it, and hash the staged file on every node."""
    paths = ScratchPaths(request.cache_dir, request.run)
    with contextlib.ExitStack() as serving:
        address = coordinator.run_phase("address", _address_of_rank_0, lambda addresses: addresses[max(addresses)])
        sha256, url = coordinator.run_on_rank0("serve", lambda: _serve(paths, request.size, address, serving))
        staged: StageResult = {
            "error": None,
            "bytes": request.size,
            "seconds": None,
            "sha256": sha256,
            "nodes_sha256": [],
            "nodes_origin_bytes": [],
        }
        try:
            _stage(coordinator, url, settings, staged)
        except CollectError as error:
            # Every rank gets the same error, so all ranks continue together.
            staged["error"] = str(error)
        coordinator.run_phase("served", lambda: None, lambda _: None)
    return staged


def _stage(coordinator: Coordinator, url: str, settings: Settings, staged: StageResult) -> None:
    from weightferry.staging import collect

    with _without_proxy(url):
        collected = collect(lambda: RankRequest({"": SourceRequest.of(url)}), coordinator, settings)
    staged["seconds"] = collected.report.total["seconds"]
    by_leader = {domain.leader_rank: domain.origin_bytes for domain in collected.report.domains}
    staged["nodes_origin_bytes"] = [by_leader.get(rank, 0) for rank in range(coordinator.world_size)]
    sha256 = coordinator.run_phase("compare", lambda: _sha256(collected.paths[""]), dict)
    staged["nodes_sha256"] = [sha256[rank] for rank in range(coordinator.world_size)]


def _address_of_rank_0() -> str:
    """Look up the address of rank 0 from this rank; on rank 0 itself it may be a loopback address."""
    return socket.gethostbyname(os.environ["MASTER_ADDR"])


def _serve(paths: ScratchPaths, size: int, address: str, serving: contextlib.ExitStack) -> tuple[str, str]:
    """Generate the file and serve it until `serving` closes; return its SHA-256 and its URL.

    The stage uses the URL, not a repository of the Hub: no token of the user is sent to the server, ``HF_ENDPOINT``
    stays unchanged, and ``HF_HUB_OFFLINE`` has no effect.
    """
    from weightferry.testing.hub import HubServer

    paths.origin.mkdir()
    sha256 = _generate(paths.origin / _FILE, size)
    server = serving.enter_context(HubServer(host="0.0.0.0"))  # noqa: S104 -- the other nodes connect
    server.add_repo(_REPOSITORY, paths.origin)
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
    """Exclude the URL's host from the proxy: the proxy of a cluster reaches the internet, not the nodes."""
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
