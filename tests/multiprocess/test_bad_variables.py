"""Ranks that cannot meet: variables that contradict each other, and a port where something else listens."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from torch import distributed as dist

import weightferry
from tests.multiprocess.launched import WEIGHTFERRY, clean_environ, meeting_point, together
from tests.multiprocess.nodes import Nodes, check_cache
from weightferry.cluster.launchers import Topology
from weightferry.cluster.rendezvous import StoreAddress, address_beside_process_group, join_job
from weightferry.errors import BadRequest, CollectError, NotDistributed

AGREE = 1.5  # seconds
LATE = 15.0  # seconds that a busy machine may need on top
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(100_000)}
STAGE = "import weightferry; weightferry.stage('org/model')"


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", FILES)
    return nodes


@pytest.fixture
def rank(model: Nodes, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give this process the environment of a rank that some launcher started."""

    def become(**variables: object) -> None:
        for name in set(os.environ) - set(environ := clean_environ(model)):
            monkeypatch.delenv(name)
        for name, value in {**environ, "WEIGHTFERRY_AGREE_TIMEOUT": AGREE, **variables}.items():
            monkeypatch.setenv(name, str(value))

    return become


def fails(model: Nodes, kind: type[CollectError]) -> str:
    """Stage, and return the error; nothing was read, nothing was written, and it did not take long."""
    began = time.monotonic()
    with pytest.raises(CollectError) as caught:
        weightferry.stage("org/model")
    assert time.monotonic() - began < AGREE + LATE
    assert type(caught.value) is kind
    assert model.hub.requests == []
    assert not model.cache(0).exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": 4, "WORLD_SIZE": 4}, "RANK=4 is not a rank of WORLD_SIZE=4: ranks are numbered from 0"),
        ({"RANK": "one", "WORLD_SIZE": 4}, "RANK must be a whole number, it is 'one'. Correct them, or start"),
        ({"RANK": 0, "WORLD_SIZE": "$N"}, "WORLD_SIZE must be a whole number, it is '$N'"),
        ({"RANK": 1}, "RANK=1 is set, and WORLD_SIZE is not. Set both"),
        ({"WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE=4 is set, and RANK is not. Set both"),
        ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 2}, "LOCAL_WORLD_SIZE=2 ranks on one node are more than"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT must be a number from 1"),
        ({"SLURM_PROCID": 3, "SLURM_STEP_NUM_TASKS": 2}, "SLURM_PROCID=3 is not a rank of SLURM_STEP_NUM_TASKS=2"),
    ],
)
def test_variables_that_make_no_sense(
    model: Nodes, rank: Callable[..., None], tmp_path: Path, variables: dict[str, object], text: str
) -> None:
    rank(**variables)
    assert text in fails(model, BadRequest)
    # Such variables are no reason to refuse what does not need them.
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    assert weightferry.stage(folder, coordinate=False) == folder


def test_a_size_of_one_under_torchrun(model: Nodes, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    (done,) = together([([*run, "-m", "weightferry", "stage", "org/model"], clean_environ(model))], tmp_path / "ranks")
    assert done.code == 0, done
    assert "staged 2 files" in done.out
    assert len(check_cache(model.cache(0))) == 2


def is_silent(client: socket.socket) -> None:
    """Say nothing until the client leaves."""
    while client.recv(4096):
        pass


def hangs_up(client: socket.socket) -> None:
    """Close the connection at once."""


def sends_garbage(client: socket.socket) -> None:
    """Send random bytes for as long as the client reads."""
    while True:
        client.sendall(os.urandom(4096))


def sends_zeros(client: socket.socket) -> None:
    """Send what a store would send for empty values."""
    while True:
        client.sendall(bytes(4096))


def echoes(client: socket.socket) -> None:
    """Answer with the question."""
    while data := client.recv(4096):
        client.sendall(data)


def speaks_http(client: socket.socket) -> None:
    """Answer as a web server does to what is no request of a browser."""
    client.recv(4096)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def greets(client: socket.socket) -> None:
    """Speak first, as an SSH server does."""
    client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
    is_silent(client)


KINDS = (is_silent, hangs_up, sends_garbage, sends_zeros, echoes, speaks_http, greets)


@contextmanager
def serve(listener: socket.socket, talk: Callable[[socket.socket], None]) -> Iterator[None]:
    """Accept connections, and talk to each in a thread."""

    def answer(client: socket.socket) -> None:
        with client, suppress(OSError):
            talk(client)

    def accept() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=answer, args=(client,), daemon=True).start()

    listener.listen()
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def occupy(listener: socket.socket, topology: Topology) -> str:
    """Bind the port that ranks without a process group choose, and return their `MASTER_PORT`."""
    for port in map(str, range(1 + os.getpid() % 50_000, 2**16)):  # other workers of pytest choose other ports
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with suppress(OSError):
            listener.bind(("127.0.0.1", address_beside_process_group(topology, environ).port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize("talk", KINDS)
def test_a_port_where_something_else_listens(
    model: Nodes, rank: Callable[..., None], talk: Callable[[socket.socket], None]
) -> None:
    """For rank 0, which cannot hold the store; for a rank that takes it for the store; and for one of torchrun."""
    with socket.socket() as listener:
        rank()
        port = occupy(listener, Topology(0, 2))
        given = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        where = f"127.0.0.1:{listener.getsockname()[1]} within {AGREE} s: {{}}"
        with serve(listener, talk):
            rank(RANK=0, **given)
            assert where.format("another program uses this port") in fails(model, NotDistributed)
            rank(RANK=1, **given)
            assert where.format("a program that is no store of this job") in fails(model, NotDistributed)
            given |= {"MASTER_PORT": listener.getsockname()[1], "TORCHELASTIC_USE_AGENT_STORE": "True"}
            rank(RANK=0, **given)
            assert where.format("a program that is no store of this job") in fails(model, NotDistributed)


def test_nothing_listens(model: Nodes, rank: Callable[..., None]) -> None:
    with socket.socket() as listener:
        rank()
        given = {"WORLD_SIZE": 2, "MASTER_PORT": occupy(listener, Topology(0, 2))}
        rank(RANK=1, MASTER_ADDR="127.0.0.1", **given)
        assert f"within {AGREE} s: nothing answers there. Rank 0 must make the same call" in fails(
            model, NotDistributed
        )
        rank(RANK=1, MASTER_ADDR="no-such-host.invalid", **given)
        assert "this host cannot resolve no-such-host.invalid. Set MASTER_ADDR" in fails(model, NotDistributed)


def test_rank_0_is_on_another_node(model: Nodes, rank: Callable[..., None]) -> None:
    rank()
    with socket.socket() as listener:
        port = occupy(listener, Topology(0, 2))
    # An address of documentation, RFC 5737, which no machine has.
    rank(RANK=0, WORLD_SIZE=2, MASTER_ADDR="192.0.2.1", MASTER_PORT=port)
    assert "this node has no such address. Set MASTER_ADDR to an address of the node" in fails(model, NotDistributed)


def test_a_store_of_another_program(model: Nodes, rank: Callable[..., None]) -> None:
    """A store of torch, such as that of a process group, which knows nothing of ranks that meet."""
    with meeting_point() as port, serve_at(port) as given:
        rank(RANK=1, **given)
        assert "a program that is no store of this job listens there" in fails(model, NotDistributed)


@contextmanager
def serve_at(port: int) -> Iterator[dict[str, object]]:
    """The variables of ranks whose store is at a port, found by passing on what they send."""
    with socket.socket() as listener:
        given = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": occupy(listener, Topology(0, 2))}
        with serve(listener, lambda client: pass_on(client, port)):
            yield given


def pass_on(client: socket.socket, port: int) -> None:
    """Connect a client to a port of this machine."""
    with socket.create_connection(("127.0.0.1", port)) as server:

        def back() -> None:
            with suppress(OSError):
                while data := server.recv(4096):
                    client.sendall(data)

        threading.Thread(target=back, daemon=True).start()
        while data := client.recv(4096):
            server.sendall(data)


class TestJoin:
    """Whose store it is."""

    @pytest.fixture
    def address(self, rank: Callable[..., None]) -> StoreAddress:
        rank()
        return StoreAddress("127.0.0.1", 1)

    def test_jobs_of_different_size_or_number(self, address: StoreAddress, rank: Callable[..., None]) -> None:
        store = dist.HashStore()
        rank(SLURM_JOB_ID=7)
        join_job(store, Topology(0, 2, launcher="slurm"), address)
        join_job(store, Topology(1, 2, launcher="slurm"), address)
        with pytest.raises(NotDistributed, match=r"of 2 ranks under slurm SLURM_JOB_ID=7, and this rank of 3 ranks"):
            join_job(store, Topology(1, 3, launcher="slurm"), address)
        rank(SLURM_JOB_ID=8)
        with pytest.raises(NotDistributed, match=r"Set MASTER_PORT to a port that no other job uses, and WORLD_SIZE"):
            join_job(store, Topology(1, 2, launcher="slurm"), address)

    def test_two_processes_with_one_rank(self, address: StoreAddress) -> None:
        store = dist.HashStore()
        join_job(store, Topology(0, 2, host="w1"), address)
        join_job(store, Topology(0, 2, host="w1"), address)  # the same process again, after an error
        with pytest.raises(BadRequest, match=r"on w2 and process \d+ on w1 both are rank 0 .* RANK=\$SLURM_PROCID"):
            join_job(store, Topology(0, 2, host="w2"), address)

    def test_the_store_of_an_agent(self, address: StoreAddress, rank: Callable[..., None]) -> None:
        store = dist.HashStore()
        rank(TORCHELASTIC_USE_AGENT_STORE="True")
        join_job(store, Topology(1, 2), address)
        join_job(store, Topology(1, 2, host="later"), address)
        with pytest.raises(NotDistributed, match="WORLD_SIZE"):
            join_job(store, Topology(0, 4), address)
        rank(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="1")
        join_job(store, Topology(0, 4), address)


def test_every_rank_ends_when_one_has_wrong_variables(model: Nodes, tmp_path: Path) -> None:
    """Two jobs of two ranks at a time."""
    agree = 12  # seconds; the ranks start at different times on a busy machine
    model.variables["WEIGHTFERRY_AGREE_TIMEOUT"] = str(agree)
    cases = [
        ({"RANK": "0"}, "another process of this node has rank 0 too", "did not call within"),
        ({"RANK": "1", "WORLD_SIZE": "3"}, "found the store of another job", "did not call within"),
    ]
    with ExitStack() as stack:  # so that each job has a port of its own
        ports = [occupy(stack.enter_context(socket.socket()), Topology(0, 2)) for _ in cases]
    commands = []
    for port, (wrong, *_) in zip(ports, cases, strict=True):
        right = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for variables in ({"RANK": "0"}, wrong):
            commands.append(([sys.executable, "-c", STAGE], {**clean_environ(model), **right, **variables}))
    done = together(commands, tmp_path / "ranks")
    for number, (_, at_wrong, at_right) in enumerate(cases):
        first, second = done[2 * number], done[2 * number + 1]
        assert first.code == second.code == 1
        said = sorted((first.err.splitlines()[-1], second.err.splitlines()[-1]), key=lambda text: at_wrong not in text)
        assert at_wrong in said[0]
        assert at_right in said[1]
    assert model.hub.requests == []
    assert check_cache(model.cache(0)) == []


def test_the_command_says_it_in_one_line(model: Nodes, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with serve(listener, is_silent):
            given = {"WEIGHTFERRY_AGREE_TIMEOUT": "2", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            environ = {**clean_environ(model), **given, "MASTER_PORT": str(listener.getsockname()[1])}
            (done,) = together([([*WEIGHTFERRY, "stage", "org/model"], environ)], tmp_path / "ranks")
    assert done.code == 1
    assert "could not connect to the other 1 ranks at 127.0.0.1:" in done.err
    assert "a program that is no store of this job listens there" in done.err
    assert "Traceback" not in done.err
