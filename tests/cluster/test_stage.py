"""The command and the launchers on four nodes: right files on all of them, one leader a storage domain."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slurm.testbed import Testbed
from tests.cluster.origin import REPO, SIZES, Served

REPOSITORY = Path(__file__).parents[2]
SIZE = sum(SIZES.values())


def check_every_node(hub: Served, cache: Path, nodes: Iterable[str] = ()) -> None:
    """Hash the files on these nodes, or on all, by the path that each node uses."""
    for node in nodes or hub.testbed.nodes:
        for path, digest in hub.sha256.items():
            command = f"sha256sum {cache}/hub/models--org--model/snapshots/*/{path}"
            output = hub.testbed.run(["sh", "-c", command], node).stdout
            assert output.split()[0] == digest, f"{path} on {node}"


def test_node_local_caches_have_a_leader_each(
    hub: Served, testbed: Testbed, first_stage: tuple[Path, dict[str, Any]]
) -> None:
    cache, report = first_stage
    assert [domain["host"] for domain in report["domains"]] == list(testbed.nodes)
    assert [domain["ranks"] for domain in report["domains"]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert report["total"]["origin_bytes"] == SIZE
    assert {domain["origin_bytes"] + domain["peer_bytes_in"] for domain in report["domains"]} == {SIZE}
    assert report["nodes"] == 4
    check_every_node(hub, cache)


def test_two_nodes_share_and_two_do_not(hub: Served, testbed: Testbed) -> None:
    """The same path on all nodes; the middle two nodes share the folder."""
    cache, shared = testbed.local / "cache-mixed", testbed.shared / "cache-mixed"
    shared.mkdir()
    for node in testbed.nodes:
        testbed.run(["mkdir", str(cache)], node)
    for node in testbed.nodes[1:3]:
        testbed.run(["mount", "--bind", str(shared), str(cache)], node)
    report = hub.stage("--cache-dir", cache)
    assert [domain["ranks"] for domain in report["domains"]] == [[0], [1, 2], [3]]
    assert [domain["leader_rank"] for domain in report["domains"]] == [0, 1, 3]
    assert report["total"]["origin_bytes"] == SIZE
    check_every_node(hub, cache)


def test_torchrun_under_sbatch(hub: Served, testbed: Testbed, tmp_path: Path) -> None:
    """`train_torchrun.sbatch` as a user runs it: stage on every node, then one torchrun agent on each node."""
    cache = testbed.local / "cache-sbatch"
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, weightferry, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        f"folder = weightferry.stage({REPO!r})\n"
        "size = (folder / 'config.json').stat().st_size\n"
        # One write for the whole line: the ranks of a node share a log.
        "sys.stdout.write(f'rank {dist.get_rank()} of {dist.get_world_size()} has {size}\\n')\n"
        "dist.destroy_process_group()\n"
    )
    log = testbed.shared / "sbatch.log"
    before = hub.content_bytes()
    environ = hub.environ | {
        "WEIGHTFERRY_CACHE_DIR": str(cache),
        "RANKS_PER_NODE": "2",
        "GLOO_SOCKET_IFNAME": "eth0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["sbatch", "--wait", "--nodes=2", f"--output={log}", str(REPOSITORY / "slurm/train_torchrun.sbatch")]
    testbed.run([*command, REPO, str(script)], env=environ, timeout=110, check=False)
    output = log.read_text()
    assert {f"rank {rank} of 4 has 40" for rank in range(4)} <= set(output.splitlines()), output
    assert hub.content_bytes() - before == SIZE


def test_stage_sbatch_runs_a_command(hub: Served, testbed: Testbed) -> None:
    log = testbed.shared / "stage.log"
    environ = hub.environ | {
        "WEIGHTFERRY_CACHE_DIR": str(testbed.local / "cache-hand-over"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["sbatch", "--wait", "--nodes=2", f"--output={log}", str(REPOSITORY / "slurm/stage.sbatch"), REPO]
    testbed.run([*command, "srun", "sh", "-c", "echo handed over to $(hostname)"], env=environ, timeout=90)
    output = log.read_text()
    assert "staged 3 files" in output
    assert "handed over to node1" in output


def test_an_error_is_printed_once_and_ends_the_step(hub: Served, testbed: Testbed) -> None:
    command = ["srun", "-N2", "--ntasks-per-node=2", sys.executable, "-m", "weightferry.cli", "stage", "org/nothing"]
    done = testbed.run(command, env=hub.environ, check=False, timeout=90)
    assert done.returncode == 1
    assert done.stderr.count("weightferry: SourceNotFound: resolve on node1 (rank 0)") == 1
    assert "Traceback" not in done.stderr
