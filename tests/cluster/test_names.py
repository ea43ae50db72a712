"""Nodes whose host names are of no use, as in pods and cloud images: no other node resolves them, or all are equal."""

from __future__ import annotations

import json
import sys

import pytest

from slurm.testbed import Testbed
from tests.cluster.origin import REPO, SIZES, Served
from tests.cluster.test_stage import check_every_node

NODES = 2


# Without a number of the node from the launcher, as with variables that are set by hand.
EQUAL = "hostname node && export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS && "


@pytest.mark.parametrize("prepare", ["", EQUAL], ids=["unknown", "equal"])
def test_leaders_find_each_other_by_their_addresses(hub: Served, testbed: Testbed, prepare: str) -> None:
    hosts, report = testbed.shared / "hosts", testbed.shared / "report-names.json"
    hosts.write_text("127.0.0.1 localhost\n")
    cache = testbed.local / f"cache-names{len(prepare)}"
    stage = [sys.executable, "-m", "weightferry.cli", "stage", REPO, "--cache-dir", str(cache), "--report", str(report)]
    # In namespaces of its own each task has other names than its node.
    script = f"mount --bind {hosts} /etc/hosts && {prepare}exec {' '.join(stage)}"
    command = ["srun", "--kill-on-bad-exit=1", f"-N{NODES}", "--ntasks-per-node=2", "unshare", "--mount", "--uts"]
    first = testbed.addresses[testbed.nodes[0]]
    environ = {**hub.environ, "MASTER_ADDR": first, "MASTER_PORT": "20123"}
    testbed.run([*command, "sh", "-c", script], env=environ, timeout=120)
    found = json.loads(report.read_text())
    assert [domain["ranks"] for domain in found["domains"]] == [[0, 1], [2, 3]]
    assert found["nodes"] == NODES
    assert found["total"]["origin_bytes"] == sum(SIZES.values())
    check_every_node(hub, cache, testbed.nodes[:NODES])
