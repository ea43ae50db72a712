"""How a testbed ends, and that nothing is left of it then."""

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
    """What there is of a testbed, taken down while it is up, to look for afterwards."""

    def __init__(self, testbed):
        self.folder = testbed.layout.folder
        its_own = State.load(testbed.layout).processes
        inside = {link for process in its_own for link in namespaces(process.pid)} - namespaces("self")
        # As processes, not as namespaces: the kernel gives a namespace's number to the next one.
        self.processes = [ProcessId.of(pid) for pid in all_pids() if namespaces(pid) & inside]

    def living(self):
        return [process for process in self.processes if process.alive()]

    def are_gone(self):
        return not self.living() and not self.folder.exists()


def namespaces(pid):
    try:
        return {str(Path(f"/proc/{pid}/ns/{name}").readlink()) for name in NAMESPACES}
    except OSError:  # gone, or only waiting to be reaped
        return set()


def all_pids():
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def those_of(name):
    """The processes that have something to do with the testbed of that name."""
    return [pid for pid in all_pids() if any(name.encode() in about(pid, what) for what in ("cmdline", "environ"))]


def about(pid, what):
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def machine():
    """What the machine shows to those outside."""
    commands = (["ip", "netns", "list"], ["ip", "-o", "link"], ["ip", "-o", "addr"], ["tc", "qdisc"])
    shown = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands]
    mounts = Path("/proc/self/mountinfo").read_text()
    files = [Path(name).read_text() for name in ("/etc/hosts", "/etc/resolv.conf", "/etc/passwd")]
    return [*shown, mounts, *files, sorted(Path("/").iterdir()), sorted(Path("/dev/shm").iterdir())]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _allowed(cluster_allowed):
    """Every test here makes testbeds of its own."""
    ensure_packages()


def test_nothing_is_left_of_a_busy_testbed_and_both_ways_are_quick():
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
    assert len(traces.living()) > 15
    while_up = machine()

    began_stop = time.monotonic()
    testbed.stop()
    stopped = time.monotonic()

    print(f"4 nodes up in {up - began:.2f} s, down in {stopped - began_stop:.2f} s")
    assert traces.are_gone()
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
        assert traces.are_gone()
        assert len(second.srun("-N3", "hostname").stdout.split()) == 3


def test_a_name_is_taken_once():
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
        stdin=subprocess.PIPE,  # closed when this process ends, and with that the owner ends
        stdout=subprocess.PIPE,
        text=True,
    )


def test_it_ends_with_an_owner_that_was_killed():
    before = machine()
    name = f"killed-owner-{os.getpid()}"
    with start_owner(name) as owner:
        assert owner.stdout.readline() == "up\n"
        traces = Traces(Testbed.attach(name))
        assert traces.living()

        owner.kill()

    began = time.monotonic()
    wait_for(traces.are_gone, 5)
    print(f"gone {time.monotonic() - began:.2f} s after its owner was killed")
    assert machine() == before


@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.7, 1.1])
def test_it_ends_with_an_owner_that_was_killed_while_starting(seconds):
    before = machine()
    name = f"killed-early-{os.getpid()}-{int(seconds * 100)}"
    with start_owner(name) as owner:
        time.sleep(seconds)
        owner.kill()

    # A claim that nobody had the time to fill is cleared by the next start.
    wait_for(lambda: not those_of(name), 10)
    with Testbed(Spec(nodes=1)):
        assert not (base_folder() / name).exists()
    assert machine() == before


def test_the_next_start_removes_what_a_killed_supervisor_left():
    dead = Testbed(Spec(nodes=2))
    dead.start()
    dead.srun("-N2", "sh", "-c", "setsid nohup sleep 1000 > /dev/null 2>&1 < /dev/null &")
    traces = Traces(dead)

    os.kill(State.load(dead.layout).supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not traces.living(), 5)
    assert dead.layout.folder.exists()

    with pytest.raises(TestbedError, match="has died"):
        Testbed.attach(dead.layout.name)
    with Testbed(Spec(nodes=1)):
        assert not dead.layout.folder.exists()
    assert traces.are_gone()
    dead.stop()


def test_a_start_that_fails_leaves_nothing_and_says_why(monkeypatch):
    before = machine()
    monkeypatch.setattr("slurm.testbed.files._SLURM_CONF", "NoSuchOption=1\n")
    monkeypatch.setattr("slurm.testbed.cluster._IDLE_PATIENCE", 1.0)
    testbed = Testbed(Spec(nodes=1))

    with pytest.raises(TestbedError, match="NoSuchOption"):
        testbed.start()

    assert not testbed.layout.folder.exists()
    assert machine() == before
    assert not those_of(testbed.layout.name)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "slurm.testbed", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_starts_uses_shows_and_stops_one():
    name, me = f"by-command-{os.getpid()}", str(os.getpid())
    # With an owner: were this run killed here, a testbed that stays would stay.
    up = command("up", "--name", name, "--nodes", "2", "--node-mbit", "1000", "--owner", me)
    assert up.returncode == 0, up.stderr
    traces = Traces(Testbed.attach(name))

    ran = command("run", "--name", name, "--", "srun", "-N2", "sh", "-c", "hostname; exit 4")
    shown = command("status").stdout
    down = command("down", "--name", name)

    assert sorted(ran.stdout.split()) == ["node1", "node2"]
    assert ran.returncode == 4
    assert f"'{name}', up, nodes=node1, node2" in shown
    assert "down in" in down.stdout
    assert traces.are_gone()
    assert "not up" in command("down", "--name", name).stdout


def test_whoever_is_not_root_is_told_what_is_missing(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(packages, "missing_packages", lambda: ["munge", "slurm-wlm"])

    assert "needs root" in packages.obstacle()
    assert "apt-get install --no-install-recommends munge slurm-wlm" in packages.obstacle()
    with pytest.raises(TestbedError, match="apt-get install --no-install-recommends munge slurm-wlm"):
        ensure_packages()
