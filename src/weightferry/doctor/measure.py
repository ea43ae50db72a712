"""The measurement from start to end; every rank of the job, one on each node, runs it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from weightferry.cluster.connect import process_group_coordinator
from weightferry.cluster.machine import boot_id
from weightferry.doctor.disk import check_cache_folder, local_disks
from weightferry.doctor.findings import Findings, Node
from weightferry.doctor.folders import cleaned_up, compare_folders, remove_scratch
from weightferry.doctor.network import measure_origin, measure_peers
from weightferry.doctor.request import CheckRequest, ScratchPaths
from weightferry.doctor.staging import stage_generated
from weightferry.settings import Settings


def measure(request: CheckRequest) -> Findings:
    """Check the folders, measure the network and the origin, stage a file; leave no file behind.

    Raises
    ------
    CollectError
        The same on every rank: a rank died, or failed for a reason that is no property of a folder.
    """
    settings = Settings.from_environ(cache_dir=ScratchPaths(Path(request.cache_dir), request.run).cache)
    with cleaned_up(request), process_group_coordinator(settings, "qualify") as coordinator:
        nodes: Mapping[int, Node] = coordinator.run_phase("look", lambda: _check_node(request, coordinator.rank), dict)
        hosts = {rank: node["host"] for rank, node in nodes.items()}
        usable = not any(node["cache"]["problem"] for node in nodes.values())
        findings: Findings = {
            "cache_dir": str(request.cache_dir),
            "nodes": [nodes[rank] for rank in sorted(nodes)],
            "folders": compare_folders(coordinator, request, hosts),
            "peers": measure_peers(coordinator),
            "origin": measure_origin(coordinator, request.origin, request.size, settings),
            "stage": stage_generated(coordinator, request, settings) if usable else None,
        }
        # First: no rank removes a file that another rank still reads. Second: all shared folders are empty before the
        # ranks leave `cleaned_up`, which removes a cache folder that this run created only if it is empty.
        coordinator.run_phase("done", lambda: None, lambda _: None)
        coordinator.run_phase("clean", lambda: remove_scratch(request), lambda _: None)
    return findings


def _check_node(request: CheckRequest, rank: int) -> Node:
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "boot_id": boot_id()[:8],
        "interface": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "cache": check_cache_folder(request, rank),
        "candidates": local_disks(),
    }
