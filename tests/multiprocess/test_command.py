"""The command `weightferry`, started by torchrun, by mpirun, and alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess import jobs
from tests.multiprocess.launched import WEIGHTFERRY, Done, clean_environ, together, torchrun
from tests.multiprocess.nodes import HOST, Nodes, check_cache
from weightferry.testing.hub import Fault

FILES = {"config.json": b"{}", "model.safetensors": os.urandom(1_000_000)}
TOTAL = sum(map(len, FILES.values()))


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", FILES)
    return nodes


def alone(nodes: Nodes, *arguments: str, **variables: str) -> Done:
    (done,) = together([((*WEIGHTFERRY, *arguments), {**clean_environ(nodes), **variables})], nodes.place / "alone")
    return done


def check_report(report: dict[str, Any], commit: str) -> None:
    """By the keys of issue 2, for a first run on two nodes with two ranks each."""
    assert set(report) == {"schema", "operation", "ranks", "nodes", "total", "domains", "manifest"}
    assert (report["schema"], report["operation"], report["ranks"], report["nodes"]) == (1, "stage", 4, 2)
    total = report["total"]
    assert total.pop("seconds") > 0
    moved = {"origin_bytes": TOTAL, "copied_bytes": 0, "peer_bytes": TOTAL, "cached_bytes": 0}
    assert total == {"bytes": TOTAL, "files": 2, **moved}
    for domain, ranks in zip(report["domains"], ([0, 1], [2, 3]), strict=True):
        seconds = domain.pop("seconds")
        assert {"agree", "resolve", "survey", "transfer", "link"} <= set(seconds)
        assert min(seconds.values()) >= 0
        assert domain.pop("origin_bytes") + domain["peer_bytes_in"] == TOTAL
        assert domain.pop("peer_bytes_in") + domain.pop("peer_bytes_out") == TOTAL
        assert domain == {
            "host": HOST,
            "leader_rank": ranks[0],
            "ranks": ranks,
            "cached_bytes": 0,
            "copied_bytes": 0,
            "locks": "flock",
        }
    manifest = report["manifest"]
    assert (manifest["source"], manifest["commit"]) == ("hf://org/model", commit)
    said = {file["path"]: (file["size"], file["sha256"]) for file in manifest["files"]}
    assert said == {path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in FILES.items()}


def test_under_torchrun(model: Nodes) -> None:
    report = model.place / "report.json"
    first, second = torchrun(model, "stage", "org/model", "--report", str(report))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    said = first.out + second.out
    assert said.count("staged 2 files, 1 MB, for 4 ranks on 2 nodes in ") == 1
    assert said.count("1 MB from the origin, 1 MB from peers, 0 B already on disk") == 1
    assert "Traceback" not in first.err + second.err
    check_report(json.loads(report.read_text()), model.hub.commit("org/model"))
    assert model.hub.content_bytes() == TOTAL
    assert len(model.hub.metadata_requests) == 1
    for rank in (0, 2):
        assert len(check_cache(model.cache(rank))) == 2


def test_a_failure_under_torchrun(model: Nodes) -> None:
    model.hub.faults.add(Fault(status=403, kind="content", times=None))
    agents = torchrun(model, "stage", "org/model", ranks_an_agent=1)
    assert [agent.code for agent in agents] == [1, 1]
    err = "".join(agent.err for agent in agents)
    full = re.findall(r"^weightferry: (\w+): (transfer on .*)$", err, re.MULTILINE)
    assert len(full) == 1, err
    assert full[0][0] in ("OriginError", "AccessDenied")
    # torchrun's agents have tracebacks of their own; ours show none.
    assert "weightferry/cli" not in err
    assert "weightferry/staging.py" not in err
    assert model.hub.content_bytes() == 0


def test_under_mpirun(model: Nodes) -> None:
    job = secrets.token_hex(8)  # the port is derived from it
    commands = []
    for rank in range(2):
        mpi = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
        environ = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in mpi.items()}
        environ |= {"OMPI_MCA_ess_base_jobid": job, **clean_environ(model)}
        commands.append(((*WEIGHTFERRY, "stage", "org/model"), environ))
    done = together(commands, model.place / "mpi")
    assert [one.code for one in done] == [0, 0], [one.err for one in done]
    assert ["for 2 ranks on 1 node in" in one.out for one in done] == [True, False]
    assert model.hub.content_bytes() == TOTAL


@pytest.mark.parametrize("node", [0, 1])
def test_one_rank_tells_all_and_the_others_a_line(model: Nodes, node: int) -> None:
    if node:
        model.cache(2 * node).write_text("not a folder")
    else:
        model.variables["HF_TOKEN"] = "hf_notatokenofthishub"
    model.hub.add_repo("org/gated", FILES, gated=bool(1 - node), allowed_tokens=["good"])
    done = model.run(jobs.command, model.place, "stage", "org/gated")
    assert [code for code, _, _ in done] == [1] * 4
    assert all(out == "" for _, out, _ in done)
    (first, *others) = [err for _, _, err in done]
    assert re.match(r"weightferry: \w+: (resolve|transfer) on ", first), first
    assert f"(rank {2 * node}" in first
    for rank, err in enumerate(others, start=1):
        told = [line for line in err.splitlines() if "weightferry.cache.locks: continuing without" not in line]
        assert len(told) == 1
        assert told[0].startswith(f"weightferry: rank {rank} stops: ")


def test_alone(model: Nodes) -> None:
    done = alone(model, "stage", "org/model", "--report", "report.json")
    assert done.code == 0, done.err
    summary, path = done.out.splitlines()
    assert summary.startswith("staged 2 files, 1 MB, for 1 rank on 1 node in ")
    assert (Path(path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert json.loads((model.place / "alone/report.json").read_text())["total"]["origin_bytes"] == TOTAL
    assert done.err == ""


def test_patterns_links_and_a_cache_folder(model: Nodes) -> None:
    options = ("--include", "*.json", "--cache-dir", "here", "--to", "links")
    assert alone(model, "stage", "org/model", *options).code == 0
    here = model.place / "alone"
    assert [path.name for path in (here / "links").iterdir()] == ["config.json"]
    assert (here / "links/config.json").resolve().is_relative_to(here / "here")
    assert alone(model, "stage", "org/model", "--exclude", "*.json", "--to", "others").code == 0
    assert [path.name for path in (here / "others").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("stage", "org/nothing"), 1, "weightferry: SourceNotFound: resolve on "),
        (("stage", "org/model", "--revision", "v9"), 1, "no revision 'v9'"),
        (
            ("stage", "org/model", "--report", "no/such/folder/report.json"),
            1,
            "the folder for the report does not exist",
        ),
        (("stage",), 2, "Missing argument 'SOURCE'"),
        (("stage", "org/model", "--nonsense"), 2, "No such option"),
        (("fetch", "org/model"), 2, "No such command"),
    ],
)
def test_exit_codes(model: Nodes, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = alone(model, *arguments)
    assert done.code == code
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.mark.parametrize("variables", [{"WEIGHTFERRY_RETRIES": "many"}, {"RANK": "5", "WORLD_SIZE": "2"}])
def test_an_environment_that_makes_no_sense(model: Nodes, variables: dict[str, str]) -> None:
    done = alone(model, "stage", "org/model", **variables)
    assert done.code == 1
    assert done.err.startswith("weightferry: BadRequest: ")
    assert done.err.count("\n") == 1


def test_ranks_that_cannot_meet(model: Nodes) -> None:
    model.variables["WEIGHTFERRY_AGREE_TIMEOUT"] = "0.5"
    done = alone(model, "stage", "org/model", RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    assert done.code == 1
    assert "weightferry: NotDistributed: rank 1 on " in done.err
    assert "could not connect to the other 1 ranks at 127.0.0.1:9 within 0.5 s: nothing answers there" in done.err
    assert "Traceback" not in done.err


def test_the_installed_command_is_this_one(model: Nodes) -> None:
    command = Path(sys.executable).with_name("weightferry")
    (done,) = together([((str(command), "--version"), clean_environ(model))], model.place / "version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("weightferry, version ")


def test_a_cache_is_verified_and_repaired_on_all_nodes(model: Nodes) -> None:
    model.run(jobs.command, model.place, "stage", "org/model")
    served = model.hub.content_bytes()
    damaged = max(model.cache(2).glob("hub/*/blobs/*"), key=lambda path: path.stat().st_size)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"?")
    by_call = cache_commands(model, ("verify",), ("verify", "--repair"), ("verify",))
    for done in by_call:
        assert all(out == "" for _, out, _ in done[1:]), "one table, of one rank"
    assert [[code for code, _, _ in done] for done in by_call] == [[1] * 4, [0] * 4, [0] * 4]
    first = by_call[0][0][1]
    assert first.count("1 damaged") == 1
    assert first.count("0 damaged") == 1
    assert f"expected sha256 {damaged.name}" in first
    assert damaged.read_bytes() == content
    assert model.hub.content_bytes() == served, "the other node has the right bytes"


def cache_commands(model: Nodes, *calls: tuple[str, ...]) -> list[list[tuple[int, str, str]]]:
    """Run commands of `weightferry cache` in one job; by call, by rank, exit code, standard output and error."""
    by_rank = model.run(jobs.commands, model.place, *(("cache", *arguments) for arguments in calls))
    return [list(done) for done in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("node", [0, 1])
def test_repair_needs_no_origin_where_a_node_has_the_right_bytes(model: Nodes, node: int) -> None:
    model.run(jobs.command, model.place, "stage", "org/model")
    damaged, gone = sorted(model.cache(2 * node).glob("hub/*/blobs/*"))[:2]
    content = damaged.read_bytes()
    damaged.write_bytes(b"?" * (len(content) + 1))
    gone.unlink()
    model.variables["HF_ENDPOINT"] = "http://127.0.0.1:9"
    asked = len(model.hub.requests)
    before, repaired, after = cache_commands(model, ("verify",), ("verify", "--repair", "--json"), ("verify",))
    assert [code for code, _, _ in before] == [1] * 4
    assert "the content is missing" in before[0][1]
    assert [code for code, _, _ in repaired] == [0] * 4, repaired
    told = [one["repaired"] for said in json.loads(repaired[0][1]) for one in said["damaged"]]
    assert told == [True, True]
    assert [code for code, _, _ in after] == [0] * 4
    assert damaged.read_bytes() == content
    assert len(model.hub.requests) == asked


def test_a_repair_that_fails_hides_nothing(model: Nodes) -> None:
    model.run(jobs.command, model.place, "stage", "org/model")
    for rank in (0, 2):
        next(model.cache(rank).glob("hub/*/blobs/*")).write_bytes(b"?")
    model.variables["HF_ENDPOINT"] = "http://127.0.0.1:9"
    repaired, after = cache_commands(model, ("verify", "--repair"), ("verify",))
    assert [code for code, _, _ in repaired] == [1] * 4
    assert [code for code, _, _ in after] == [1] * 4
    assert after[0][1].count("1 damaged") == 2


def test_a_source_that_one_node_has_is_verified_there(model: Nodes) -> None:
    (model.cache(2) / "hub/models--org--alone/blobs").mkdir(parents=True)
    found, misspelt = cache_commands(model, ("verify", "org/alone"), ("verify", "org/aloen"))
    assert [code for code, _, _ in found] == [0] * 4, found
    assert found[0][1].count("0 damaged") == 1
    assert [code for code, _, _ in misspelt] == [1] * 4
    assert "org/aloen is not in" in misspelt[0][2]
