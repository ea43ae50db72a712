"""Nodes whose host names are of no use, as in pods and cloud images: no other node resolves them, or all are equal."""

from __future__ import annotations

import json
import sys

import pytest

from slurm.testbed import Testbed
from tests.cluster.origin import REPO, SIZES, Served
from tests.cluster.test_stage import check_every_node

NODES = 2


@pytest.mark.parametrize("rename", ["", "hostname node; "], ids=["unknown", "equal"])
def test_leaders_find_each_other_by_their_addresses(hub: Served, testbed: Testbed, rename: str) -> None:
    hosts, report = testbed.shared / "hosts", testbed.shared / "report-names.json"
    hosts.write_text("127.0.0.1 localhost\n")
    cache = testbed.local / f"cache-names{len(rename)}"
    stage = [sys.executable, "-m", "weightferry.cli", "stage", REPO, "--cache-dir", str(cache), "--report", str(report)]
    # In namespaces of its own each task has other names than its node.
    script = f"mount --bind {hosts} /etc/hosts && {rename}exec {' '.join(stage)}"
    command = ["srun", "--kill-on-bad-exit=1", f"-N{NODES}", "--ntasks-per-node=2", "unshare", "--mount", "--uts"]
    first = testbed.addresses[testbed.nodes[0]]
    environ = {**hub.environ, "MASTER_ADDR": first, "MASTER_PORT": "20123"}
    testbed.run([*command, "sh", "-c", script], env=environ, timeout=120)
    found = json.loads(report.read_text())
    assert [domain["ranks"] for domain in found["domains"]] == [[0, 1], [2, 3]]
    assert found["nodes"] == NODES
    assert found["total"]["origin_bytes"] == sum(SIZES.values())
    check_every_node(hub, cache, testbed.nodes[:NODES])
