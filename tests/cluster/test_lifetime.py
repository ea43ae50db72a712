"""The end of a testbed: it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.testbed import Spec, Testbed, TestbedError, ensure_packages, packages
from slurm.testbed.layout import REPOSITORY, base_folder
from slurm.testbed.processes import ProcessId
from slurm.testbed.state import State

NAMESPACES = ("pid", "net", "mnt", "uts", "ipc")


class Traces:
    """The processes and the folder of a running testbed, to look for after its end."""

    def __init__(self, testbed):
        self.folder = testbed.layout.folder
        own = State.load(testbed.layout).processes
        inside = {link for process in own for link in namespaces(process.pid)} - namespaces("self")
        # Processes, not namespaces: the kernel reuses the number of a namespace.
        self.processes = [ProcessId.of(pid) for pid in all_pids() if namespaces(pid) & inside]

    def running(self):
        return [process for process in self.processes if process.is_alive()]

    def all_removed(self):
        return not self.running() and not self.folder.exists()


def namespaces(pid):
    try:
        return {str(Path(f"/proc/{pid}/ns/{name}").readlink()) for name in NAMESPACES}
    except OSError:  # it has ended
        return set()


def all_pids():
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def processes_that_mention(name):
    """The processes with the testbed's name in their command line or environment."""
    return [pid for pid in all_pids() if any(name.encode() in proc_file(pid, what) for what in ("cmdline", "environ"))]


def proc_file(pid, what):
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def machine():
    """The state of the machine as processes outside see it."""
    commands = (["ip", "netns", "list"], ["ip", "-o", "link"], ["ip", "-o", "addr"], ["tc", "qdisc"])
    output = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands]
    mounts = Path("/proc/self/mountinfo").read_text()
    files = [Path(name).read_text() for name in ("/etc/hosts", "/etc/resolv.conf", "/etc/passwd")]
    return [*output, mounts, *files, sorted(Path("/").iterdir()), sorted(Path("/dev/shm").iterdir())]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _allowed(cluster_allowed):
    """Every test in this file starts its own testbeds."""
    ensure_packages()


def test_a_busy_testbed_leaves_nothing_behind():
    before = machine()
    began = time.monotonic()
    testbed = Testbed(Spec(nodes=4, node_mbit=2000, origin_mbit=500))
    testbed.start()
    up = time.monotonic()
    # A task that left its parents, one that ignores SIGTERM, a batch job.
    testbed.srun("-N4", "sh", "-c", "setsid nohup sleep 1000 > /dev/null 2>&1 < /dev/null &")
    testbed.popen(["srun", "-N2", "sh", "-c", "trap '' TERM; sleep 1000; sleep 1000"])
    testbed.run(["sbatch", "-N4", "--output=/dev/null", "--wrap=srun sleep 1000"])
    testbed.start_origin([sys.executable, "-m", "http.server", "8000"], 8000)
    traces = Traces(testbed)
    assert len(traces.running()) > 15
    while_up = machine()

    began_stop = time.monotonic()
    testbed.stop()
    stopped = time.monotonic()

    print(f"4 nodes up in {up - began:.2f} s, down in {stopped - began_stop:.2f} s")
    assert traces.all_removed()
    assert machine() == while_up == before
    testbed.stop()  # a second time does nothing


def test_two_run_side_by_side():
    with Testbed(Spec(nodes=2)) as first, Testbed(Spec(nodes=3)) as second:
        first.run(["sh", "-c", "echo first > /local/who"], "node1")
        second.run(["sh", "-c", "echo second > /local/who"], "node1")

        assert first.srun("-N1", "cat", "/local/who").stdout == "first\n"
        assert second.srun("-N1", "cat", "/local/who").stdout == "second\n"
        traces = Traces(first)
        first.stop()
        assert traces.all_removed()
        assert len(second.srun("-N3", "hostname").stdout.split()) == 3


def test_a_name_is_unique():
    with Testbed(Spec(nodes=1)) as first:
        with pytest.raises(TestbedError, match="already up"):
            Testbed(Spec(nodes=1), first.layout.name).start()
        assert first.srun("hostname").stdout == "node1\n"


OWNER = """
import sys
from slurm.testbed import Spec, Testbed
testbed = Testbed(Spec(nodes=2), sys.argv[1])
testbed.start()
testbed.srun("-N2", "sh", "-c", "setsid nohup sleep 1000 > /dev/null 2>&1 < /dev/null &")
print("up", flush=True)
sys.stdin.read()
"""


def start_owner(name):
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, name],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,  # closed when this process ends; then the owner ends
        stdout=subprocess.PIPE,
        text=True,
    )


def test_it_ends_with_a_killed_owner():
    before = machine()
    name = f"killed-owner-{os.getpid()}"
    with start_owner(name) as owner:
        assert owner.stdout.readline() == "up\n"
        traces = Traces(Testbed.attach(name))
        assert traces.running()

        owner.kill()

    began = time.monotonic()
    wait_for(traces.all_removed, 5)
    print(f"removed {time.monotonic() - began:.2f} s after its owner was killed")
    assert machine() == before


@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.7, 1.1])
def test_it_ends_with_an_owner_that_is_killed_during_the_start(seconds):
    before = machine()
    name = f"killed-early-{os.getpid()}-{int(seconds * 100)}"
    with start_owner(name) as owner:
        time.sleep(seconds)
        owner.kill()

    # The next start removes an unfinished folder.
    wait_for(lambda: not processes_that_mention(name), 10)
    with Testbed(Spec(nodes=1)):
        assert not (base_folder() / name).exists()
    assert machine() == before


def test_the_next_start_removes_the_files_of_a_killed_supervisor():
    ended = Testbed(Spec(nodes=2))
    ended.start()
    ended.srun("-N2", "sh", "-c", "setsid nohup sleep 1000 > /dev/null 2>&1 < /dev/null &")
    traces = Traces(ended)

    os.kill(State.load(ended.layout).supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not traces.running(), 5)
    assert ended.layout.folder.exists()

    with pytest.raises(TestbedError, match="has ended"):
        Testbed.attach(ended.layout.name)
    with Testbed(Spec(nodes=1)):
        assert not ended.layout.folder.exists()
    assert traces.all_removed()
    ended.stop()


def test_a_failed_start_leaves_nothing_behind_and_says_why(monkeypatch):
    before = machine()
    monkeypatch.setattr("slurm.testbed.config_files._SLURM_CONF", "NoSuchOption=1\n")
    monkeypatch.setattr("slurm.testbed.cluster._IDLE_TIMEOUT", 1.0)
    testbed = Testbed(Spec(nodes=1))

    with pytest.raises(TestbedError, match="NoSuchOption"):
        testbed.start()

    assert not testbed.layout.folder.exists()
    assert machine() == before
    assert not processes_that_mention(testbed.layout.name)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "slurm.testbed", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_starts_uses_lists_and_stops_a_testbed():
    name, me = f"by-command-{os.getpid()}", str(os.getpid())
    # With an owner: without one, the testbed would keep running if this test is killed.
    up = command("up", "--name", name, "--nodes", "2", "--node-mbit", "1000", "--owner", me)
    assert up.returncode == 0, up.stderr
    traces = Traces(Testbed.attach(name))

    ran = command("run", "--name", name, "--", "srun", "-N2", "sh", "-c", "hostname; exit 4")
    output = command("status").stdout
    down = command("down", "--name", name)

    assert sorted(ran.stdout.split()) == ["node1", "node2"]
    assert ran.returncode == 4
    assert f"'{name}', up, nodes=node1, node2" in output
    assert "down in" in down.stdout
    assert traces.all_removed()
    assert "not up" in command("down", "--name", name).stdout


def test_without_root_the_error_names_the_missing_packages(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(packages, "missing_packages", lambda: ["munge", "slurm-wlm"])

    assert "needs root" in packages.reason_unavailable()
    assert "apt-get install --no-install-recommends munge slurm-wlm" in packages.reason_unavailable()
    with pytest.raises(TestbedError, match="apt-get install --no-install-recommends munge slurm-wlm"):
        ensure_packages()
