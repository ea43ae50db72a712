"""A running testbed: hosts, Slurm, network, origin."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import submitit

from slurm.testbed import Spec, Testbed, TestbedError

PYTHON = sys.executable


def test_every_node_answers_with_its_own_name(testbed):
    names = testbed.srun("-N4", "hostname").stdout.split()

    assert sorted(names) == list(testbed.nodes) == ["node1", "node2", "node3", "node4"]


def test_tasks_are_spread_over_the_nodes(testbed):
    lines = testbed.srun("-N4", "--ntasks-per-node=2", "sh", "-c", "echo $SLURM_PROCID $(hostname) $SLURM_LOCALID")

    tasks = sorted(line.split() for line in lines.stdout.splitlines())
    assert tasks == [[str(rank), f"node{rank // 2 + 1}", str(rank % 2)] for rank in range(8)]


def test_local_is_each_nodes_own_and_shared_is_shared(testbed):
    testbed.srun("-N4", "sh", "-c", f"hostname > /local/mine; hostname > {testbed.shared}/$(hostname)")

    local = testbed.srun("-N4", "sh", "-c", "echo $(hostname) $(cat /local/mine)").stdout.splitlines()
    assert all(line.split()[0] == line.split()[1] for line in local)
    assert {(testbed.shared / node).read_text().strip() for node in testbed.nodes} == set(testbed.nodes)
    shared = testbed.run(["ls", testbed.shared], "node3").stdout.split()
    assert set(testbed.nodes) <= set(shared)


def test_a_host_sees_its_own_processes_interfaces_and_shared_memory(testbed):
    testbed.run(["touch", "/dev/shm/mine"], "node1")

    assert not Path("/dev/shm/mine").exists()
    assert testbed.run(["ls", "/dev/shm"], "node2").stdout.split() == []
    assert sorted(testbed.run(["ls", "/sys/class/net"], "node1").stdout.split()) == ["eth0", "lo"]
    assert testbed.run(["cat", "/proc/1/cmdline"], "node1").stdout.split("\0")[-3] == "node1"


def test_every_name_resolves_on_every_host_and_the_machines_file_is_as_it_was(testbed):
    script = f"import socket; print([socket.gethostbyname(n) for n in {list(testbed.addresses)!r}])"

    for host in testbed.addresses:
        assert testbed.run([PYTHON, "-c", script], host).stdout.strip() == str(list(testbed.addresses.values()))
    assert "node1" not in Path("/etc/hosts").read_text()


def test_hostnames_are_listed_on_the_nodes(testbed):
    shown = testbed.srun("-N2", "--ntasks-per-node=2", "scontrol", "show", "hostnames").stdout.split()

    assert sorted(shown) == ["node1"] * 4 + ["node2"] * 4


def test_run_returns_output_and_status_and_popen_forwards_a_signal(testbed):
    done = testbed.run(["sh", "-c", "echo out; echo err >&2; exit 3"], "node2", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)
    with pytest.raises(TestbedError, match="exit status 3"):
        testbed.run(["sh", "-c", "exit 3"])

    with testbed.popen(
        ["sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"], "node1", stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 5


def test_an_unknown_host_is_named(testbed):
    with pytest.raises(TestbedError, match="no host 'node9': there are head, origin, node1"):
        testbed.run(["true"], "node9")


def test_a_batch_job_passes_its_exit_code_on(testbed):
    done = testbed.run(["sbatch", "--wait", "--parsable", "--output=/dev/null", "--wrap=exit 7"], check=False)

    assert done.returncode == 7
    job = done.stdout.strip()
    shown = testbed.run(["sacct", "-o", "JobID,State,ExitCode", "--parsable2", "-j", job]).stdout
    assert shown.splitlines() == ["JobID|State|ExitCode", f"{job}|FAILED|7:0"]


def test_a_signal_reaches_a_job(testbed):
    output = testbed.shared / "signalled"
    script = testbed.shared / "signalled.sh"
    script.write_text("#!/bin/sh\ntrap 'exit 9' USR1\necho up\nwhile :; do sleep 0.1; done\n")
    job = testbed.run(["sbatch", "--parsable", f"--output={output}", script]).stdout.strip()
    wait_for(lambda: output.exists() and output.read_text(), 10)

    testbed.run(["scancel", "--signal=USR1", "--batch", job])

    wait_for(lambda: "FAILED|9:0" in testbed.run(["sacct", "-P", "-o", "State,ExitCode", "-j", job]).stdout, 10)


def test_submitit_in_this_process_gets_results_from_two_nodes(outside):
    executor = submitit.AutoExecutor(folder=outside.shared / "submitit", cluster="slurm")
    executor.update_parameters(nodes=2, tasks_per_node=1, timeout_min=2)

    job = executor.submit(subprocess.check_output, ["hostname"], text=True)

    assert [name.strip() for name in job.results()] == ["node1", "node2"]
    assert job.watcher.get_state(job.job_id, mode="force") in {"COMPLETED", "COMPLETING"}


def test_submitit_learns_of_a_failed_job_from_sacct(outside):
    executor = submitit.AutoExecutor(folder=outside.shared / "submitit", cluster="slurm")
    executor.update_parameters(nodes=1, tasks_per_node=1, timeout_min=2)

    # The job writes no result file: only its state shows the end.
    job = executor.submit(subprocess.check_output, ["sh", "-c", "kill -9 $PPID"])
    wait_for(lambda: job.watcher.is_done(job.job_id, mode="force"), 20)

    assert job.watcher.get_state(job.job_id) == "FAILED"


def test_nodes_read_from_the_origin_and_this_machine_cannot(testbed):
    (testbed.shared / "weights").write_bytes(bytes(1000))
    server = [PYTHON, "-m", "http.server", "8000", "--directory", testbed.shared]
    origin = testbed.start_origin(server, 8000)

    script = f"import urllib.request; print(len(urllib.request.urlopen('{origin.url}/weights').read()))"
    assert testbed.srun("-N4", PYTHON, "-c", script).stdout.split() == ["1000"] * 4
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{origin.url}/weights", timeout=0.3)
    with pytest.raises(TestbedError, match="port 8000 already"):
        testbed.start_origin(server, 8000)
    origin.process.terminate()
    origin.process.wait()


def test_the_error_of_a_failed_origin_has_its_output(testbed):
    with pytest.raises(TestbedError, match="cannot serve"):
        testbed.start_origin(["sh", "-c", "echo cannot serve; exit 1"], 8001)


def test_the_links_are_limited_in_both_directions(testbed):
    rates = {host: testbed.run(["tc", "qdisc", "show", "dev", "eth0"], host).stdout for host in testbed.addresses}

    assert "tbf" not in rates["head"]
    assert "rate 500Mbit" in rates["origin"]
    assert all("rate 2Gbit" in rates[node] for node in testbed.nodes)


SEND = """
import socket, sys, time
listener = socket.create_server(("", 9000))
connection, _ = listener.accept()
began = time.monotonic()
connection.sendall(bytes({size}))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print({size} * 8 / 1e6 / (time.monotonic() - began))
"""
RECEIVE = """
import socket
connection = socket.create_connection(("{host}", 9000))
while connection.recv(1 << 20):
    pass
"""


@pytest.mark.parametrize(("sender", "receiver"), [("origin", "node1"), ("head", "node1")])
def test_a_transfer_runs_at_the_rate_of_its_slowest_link(cluster_allowed, sender, receiver):
    # From the origin, the origin's link is the limit; from the head, whose link has no limit, the node's link is.
    with (
        Testbed(Spec(nodes=1, node_mbit=200, origin_mbit=100)) as testbed,
        testbed.popen([PYTHON, "-c", SEND.format(size=10**7)], sender, stdout=subprocess.PIPE) as process,
    ):
        wait_for(lambda: ":9000" in testbed.run(["ss", "-Hltn"], sender).stdout, 5)
        testbed.run([PYTHON, "-c", RECEIVE.format(host=sender)], receiver)
        reached = float(process.communicate()[0])

    limit = {"origin": 100, "head": 200}[sender]
    print(f"{sender} to {receiver}: {reached:.0f} Mbit/s of {limit}")
    assert reached < limit * 1.2


def test_the_end_of_a_node_ends_the_job_and_names_the_node(cluster_allowed):
    with Testbed(Spec(nodes=2)) as testbed:
        process = testbed.popen(
            ["srun", "-N2", "sh", "-c", "hostname > /local/up; sleep 300"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        wait_for(lambda: not testbed.run(["test", "-e", "/local/up"], "node2", check=False).returncode, 10)

        began = time.monotonic()
        testbed.kill_host("node2")
        _, errors = process.communicate(timeout=60)

        print(f"detected the end of a node after {time.monotonic() - began:.0f} s")
        assert process.returncode
        assert "Node failure on node2" in errors


def test_a_cluster_without_accounting_with_loopback_names_and_a_small_disk(cluster_allowed):
    with Testbed(Spec(nodes=1, accounting=False, loopback_names=True, disk_mb=10)) as testbed:
        assert "accounting storage is disabled" in testbed.run(["sacct"], check=False).stderr
        assert testbed.run(["getent", "hosts", "node1"], "node1").stdout.split()[0] == "127.0.1.1"
        assert testbed.run(["getent", "hosts", "node1"]).stdout.split()[0] == testbed.addresses["node1"]
        full = testbed.run(["dd", "if=/dev/zero", "of=/local/file", "bs=1M", "count=20"], "node1", check=False)
        assert "No space left" in full.stderr


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.05)
