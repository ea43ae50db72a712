"""The measurement in its order; every rank of the job, one a node, runs all of this."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from slurm._qualify.disk import candidates, look_at_cache
from slurm._qualify.folders import compare_folders, remove, removed_at_the_end
from slurm._qualify.network import origin_rate, peer_rates
from slurm._qualify.staging import stage_generated
from slurm._qualify.values import Findings, Node, Question, Work
from weightferry.cluster.connect import operation
from weightferry.cluster.topology import boot_id
from weightferry.settings import Settings


def measure(question: Question) -> Findings:
    """Look, compare, send, read, stage; nothing of it is left.

    Raises
    ------
    CollectError
        The same on every rank, when a rank died or something went wrong that is no property of a folder.
    """
    settings = Settings.from_environ(cache_dir=Work(Path(question.cache_dir), question.run).cache)
    with removed_at_the_end(question), operation(settings, "qualify") as coordinator:
        nodes: Mapping[int, Node] = coordinator.round("look", lambda: _look(question, coordinator.rank), dict)
        hosts = {rank: node["host"] for rank, node in nodes.items()}
        usable = not any(node["cache"]["problem"] for node in nodes.values())
        findings: Findings = {
            "cache_dir": str(question.cache_dir),
            "nodes": [nodes[rank] for rank in sorted(nodes)],
            "folders": compare_folders(coordinator, question, hosts),
            "peers": peer_rates(coordinator),
            "origin": origin_rate(coordinator, question.origin, question.size, settings),
            "stage": stage_generated(coordinator, question, settings) if usable else None,
        }
        # Nobody removes what another one still reads, and folders are left empty before one that was made is removed.
        coordinator.round("done", lambda: None, lambda _: None)
        coordinator.round("clean", lambda: remove(question), lambda _: None)
    return findings


def _look(question: Question, rank: int) -> Node:
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "boot_id": boot_id()[:8],
        "interface": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "cache": look_at_cache(question, rank),
        "candidates": candidates(),
    }
