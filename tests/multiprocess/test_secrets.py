"""A token goes to the origin and nowhere else: not into logs, errors, reports, links, caches, or pickles."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes
from weightferry.testing.hub import Fault, HubServer

# One as huggingface.co makes them, one as a private Hub may.
TOKENS = ["hf_QwErTyUiOpAsDfGhJkLzXcVbNm", "s3same-Open+sesame.0815"]
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(200_000)}


@pytest.fixture(params=TOKENS)
def token(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def private(tmp_path: Path, token: str) -> Iterator[Nodes]:
    with HubServer(tokens=[token]) as hub:
        hub.add_repo("org/model", FILES, private=True, allowed_tokens=[token])
        hub.add_repo("org/public", FILES)
        nodes = Nodes(hub, tmp_path / "work")
        nodes.place.mkdir()
        nodes.variables["HF_TOKEN"] = token
        yield nodes


def run_commands(nodes: Nodes, *calls: Sequence[str]) -> list[tuple[set[int], str]]:
    """Run the command on all ranks, as loud as it gets; by call, exit codes, and all that was written."""
    by_rank = nodes.run(jobs.commands, nodes.place, *(("-vv", "stage", *arguments) for arguments in calls))
    return [
        ({code for code, _, _ in done}, "".join(out + err for _, out, err in done))
        for done in zip(*by_rank, strict=True)
    ]


def run_command(nodes: Nodes, *arguments: str) -> tuple[set[int], str]:
    """Run the command once."""
    return run_commands(nodes, arguments)[0]


def check_hidden(nodes: Nodes, secret: str) -> None:
    """Look at the content and the names of everything, links too; standard output and error are among the files."""
    seen = 0
    for folder, folders, names in os.walk(nodes.place):
        for name in (*folders, *names):
            path = Path(folder) / name
            assert secret not in str(path)
            if path.is_symlink():
                assert secret not in os.readlink(path)
            elif path.is_file():
                seen += 1
                assert secret.encode() not in path.read_bytes(), path
    assert seen


def test_a_success(private: Nodes, token: str) -> None:
    report, links = private.place / "report.json", private.place / "links"
    codes, said = run_command(private, "org/model", "--report", str(report), "--to", str(links))
    assert codes == {0}
    assert "published hf://org/model@" in said  # it was as loud as asked
    assert any(request.had_authorization for request in private.hub.requests)  # it was used
    assert report.exists()
    check_hidden(private, token)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=403, times=None, kind="content"),
        Fault(status=503, times=None, kind="content"),
        Fault(hang_up=True, times=None, kind="metadata"),
        Fault(corrupt_at=3, times=None, path_suffix="model.safetensors"),
    ],
    ids=["denied", "unavailable", "hang up", "corrupt"],
)
def test_a_failure(private: Nodes, token: str, fault: Fault) -> None:
    private.hub.faults.add(fault)
    codes, said = run_command(private, "org/model")
    assert codes == {1}
    assert "failed" in said or "weightferry: " in said
    check_hidden(private, token)


def test_a_token_that_nobody_knows(private: Nodes, token: str) -> None:
    private.variables["HF_TOKEN"] = wrong = token[::-1].replace("_fh", "") + "x"
    private.hub.add_repo("org/model", FILES, private=True, allowed_tokens=[token])
    assert run_command(private, "org/model")[0] == {1}
    check_hidden(private, wrong)


def test_a_source_that_holds_the_token(private: Nodes, token: str) -> None:
    """Pasted into the wrong place: as the name, as the revision, as a file."""
    calls = ("org/model", "--revision", token), (f"hf://org/model/{token}",), (f"org/{token}",)
    assert [codes for codes, _ in run_commands(private, *calls)] == [{1}] * 3
    check_hidden(private, token)


@pytest.mark.parametrize("token", TOKENS[:1], indirect=True)  # none is used here
def test_a_secret_in_a_url(private: Nodes) -> None:
    private.variables["HF_TOKEN"] = ""
    secret = "0pen-sesame"
    urls = {}
    for path in ("org/public/resolve/main/model.safetensors", "org/public/resolve/main/none.bin"):
        url = f"{private.hub.url}/{path}"
        urls[url.replace("://", f"://user:{secret}@")] = {1}  # the Hub of these tests takes no password
        urls[f"{url}?access_token={secret}&a=b"] = {0} if "model" in path else {1}
    folder = private.place
    options = [("--to", f"{folder}/links{n}", "--report", f"{folder}/report{n}.json") for n in range(len(urls))]
    done = run_commands(private, *((url, *more) for url, more in zip(urls, options, strict=True)))
    assert [codes for codes, _ in done] == list(urls.values()), done
    check_hidden(private, secret)


def test_errors_and_their_pickles(private: Nodes, token: str) -> None:
    private.hub.faults.add(Fault(status=403, times=None, kind="content"))
    secret_url = f"{private.hub.url.replace('://', f'://user:{token}@')}/x.bin?token={token}"
    by_call = private.tries(
        partial(jobs.stage, "org/model"),
        partial(jobs.stage, secret_url),
        partial(jobs.collect, {"a": secret_url}, private.place / "links"),
        partial(jobs.stage, f"hf://org/model/{token}"),
    )
    for gots in by_call:
        for got in gots:
            assert got.error is not None
            assert token not in str(got.error)
            assert token not in repr(got.error)
            assert token.encode() not in pickle.dumps(got.error)


def test_what_followers_get_holds_no_token(private: Nodes, token: str) -> None:
    """The store is seen by all ranks: the leaders' token has no business there."""
    for rank in (1, 3):
        private.by_rank[rank] = {"HF_TOKEN": ""}
    done = private.run(record_store, partial(jobs.stage, "org/model"))
    assert all(keys for keys, _ in done)
    for _, traffic in done:
        assert token.encode() not in traffic


def record_store(call: partial[object]) -> tuple[int, bytes]:
    """Make the call and return what this rank wrote into the store."""
    from weightferry.cluster import barrier, distributed, heartbeat
    from weightferry.cluster.store import put

    written: list[bytes] = []

    def noted(store: Any, key: str, value: bytes) -> None:
        written.append(value)
        put(store, key, value)

    for module in (barrier, distributed, heartbeat):
        assert vars(module)["put"] is put
        vars(module)["put"] = noted
    call()
    return len(written), b"".join(written)
