"""What an origin may do wrong, or a caller ask of it: the same error on every rank, nothing half-written, go on."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, check_cache, failed_alike, sha256s, values
from weightferry.errors import (
    AccessDenied,
    BadRequest,
    CollectError,
    IntegrityError,
    OriginError,
    OriginUnreachable,
    SourceNotFound,
)
from weightferry.testing.hub import Fault, HubServer

FILES = {"a.ckpt": os.urandom(70_000), "model.safetensors": os.urandom(300_000)}
GOOD, WRONG = "token-of-a-friend", "token-of-a-stranger"
LEADERS, ALL = {0, 2}, {0, 1, 2, 3}


@contextmanager
def nodes_beside_a_hub(place: Path) -> Iterator[Nodes]:
    with HubServer(tokens=[GOOD]) as hub:
        hub.add_repo("org/model", FILES)
        hub.add_repo("org/gated", FILES, gated=True, allowed_tokens=[GOOD])
        hub.add_repo("org/private", FILES, private=True, allowed_tokens=[GOOD])
        yield Nodes(hub, place)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Nodes]:
    with nodes_beside_a_hub(tmp_path) as nodes:
        yield nodes


def check_nothing_half_done_and_going_on(nodes: Nodes, after: list[jobs.Got], case: int | None = None) -> None:
    assert [files for _, files in values(after)] == [sha256s(FILES)] * 4
    for rank in (0, 2):
        check_cache(nodes.cache(rank, case))


REFUSED: list[tuple[Any, type[CollectError], str]] = [
    (partial(jobs.stage, "org/nothing"), SourceNotFound, "hf://org/nothing: no such model on http"),
    (partial(jobs.stage, "org/model", revision="v9"), SourceNotFound, "hf://org/model@v9: no revision 'v9'"),
    (partial(jobs.stage, "hf://org/model@v9/a.ckpt"), SourceNotFound, "no revision 'v9'"),
    (partial(jobs.stage, "org/model", revision="../../x"), CollectError, "../../x"),
    (partial(jobs.stage, "hf://org/model/b.ckpt"), SourceNotFound, "no file or folder 'b.ckpt' in the repository"),
    (partial(jobs.stage, "org/model", allow_patterns="*.bin"), BadRequest, "none of its 2 files matches"),
    (partial(jobs.stage, "hf://org/model/../../x"), BadRequest, "must be a relative path"),
    (partial(jobs.stage, "org/../x"), BadRequest, "nor a Hub repository id"),
    (partial(jobs.collect, {"a": "org/model/../../x"}), BadRequest, "must be a relative path"),
    (partial(jobs.collect, {"b": None}, None, "org/model"), SourceNotFound, "did you mean a.ckpt?"),
    (partial(jobs.stage, "org/gated"), AccessDenied, "this rank has no token: set HF_TOKEN"),
    (partial(jobs.stage, "org/private"), SourceNotFound, "no such model"),
    (partial(jobs.stage, "file:///no/such/folder"), SourceNotFound, "/no/such/folder: no such local file"),
    (partial(jobs.stage, "nonsense://x/y"), BadRequest, "nonsense"),
    (partial(jobs.stage, "http://127.0.0.1:9/x.bin"), OriginUnreachable, "(3 attempts in a row)"),
]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nodes, list[list[list[jobs.Got]]]]]:
    """All refused calls in one job, each followed by a good call."""
    with nodes_beside_a_hub(tmp_path_factory.mktemp("refused")) as nodes:
        yield nodes, nodes.cases(*((call, partial(jobs.stage, "org/model")) for call, _, _ in REFUSED))


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=[text for _, _, text in REFUSED])
def test_the_rank_that_resolves_fails_and_all_say_so(
    refused: tuple[Nodes, list[list[list[jobs.Got]]]], case: int
) -> None:
    nodes, by_case = refused
    call, kind, text = REFUSED[case]
    gots, after = by_case[case]
    # A gated repository shows its metadata to everybody: its leaders are refused.
    phase, ranks = ("transfer", LEADERS) if "org/gated" in str(call) else ("resolve", {0})
    failed_alike(gots, kind, phase, ranks, text)
    check_nothing_half_done_and_going_on(nodes, after, case)


def test_a_wrong_token(model: Nodes) -> None:
    model.variables["HF_TOKEN"] = WRONG
    (gots,) = model.tries(partial(jobs.stage, "org/private"))
    text = failed_alike(gots, AccessDenied, "resolve", {0}, "the token of this rank", "has no access")
    assert WRONG not in text


def test_one_node_with_a_token_reads_for_all(model: Nodes) -> None:
    model.variables["HF_TOKEN"] = WRONG
    model.by_rank[0] = {"HF_TOKEN": GOOD}
    check_nothing_half_done_and_going_on(model, model.tries(partial(jobs.stage, "org/private"))[0])
    assert model.hub.content_bytes() == sum(map(len, FILES.values()))


def test_followers_need_no_token(model: Nodes) -> None:
    for rank in (0, 2):
        model.by_rank[rank] = {"HF_TOKEN": GOOD}
    check_nothing_half_done_and_going_on(model, model.tries(partial(jobs.stage, "org/private"))[0])


@pytest.mark.parametrize(
    ("fault", "kind", "phase", "text"),
    [
        (Fault(status=503, times=None), OriginError, "resolve", "HTTP 503"),
        (Fault(status=429, times=None, kind="metadata"), OriginError, "resolve", "HTTP 429"),
        (Fault(status=503, times=None, path_suffix="model.safetensors"), OriginError, "transfer", "HTTP 503"),
        (Fault(hang_up=True, times=None, kind="content"), OriginError, "transfer", "(3 attempts in a row)"),
        (Fault(hang_up=True, times=None, kind="metadata", reset=True), OriginError, "resolve", "3 attempts"),
        (Fault(status=403, times=None, kind="content"), CollectError, "transfer", "HTTP 403"),
        (Fault(status=404, times=None, path_suffix="a.ckpt"), SourceNotFound, "transfer", "a.ckpt"),
        (Fault(corrupt_at=5, times=None), IntegrityError, "transfer", "checksum mismatch after a second download"),
    ],
    ids=str,
)
def test_an_origin_that_never_recovers(
    model: Nodes, fault: Fault, kind: type[CollectError], phase: str, text: str
) -> None:
    model.hub.faults.add(fault)
    gots, after = model.tries(partial(jobs.stage, "org/model"), partial(failed_then_good, model.hub.url))
    failed_alike(gots, kind, phase, {0} if phase == "resolve" else LEADERS, text)
    assert [got.error for got in after] == [None] * 4
    for rank in (0, 2):
        check_cache(model.cache(rank))
    model.hub.faults.clear()
    check_nothing_half_done_and_going_on(model, model.tries(partial(jobs.stage, "org/model"))[0])


def failed_then_good(_: str) -> object:
    """A call that asks nobody, after one that failed."""
    return jobs.stage("/etc/hostname" if Path("/etc/hostname").exists() else __file__)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_after=100_000, times=2, path_suffix="model.safetensors"),
        Fault(cut_after=1_000, times=2, kind="content", reset=True),
        Fault(status=503, times=2),
        Fault(corrupt_at=5, times=1),
        Fault(ignore_range=True, cut_after=100_000, times=1, path_suffix="model.safetensors"),
        Fault(chunked=True, times=None),
    ],
    ids=str,
)
def test_an_origin_that_recovers(model: Nodes, fault: Fault) -> None:
    model.hub.faults.add(fault)
    (gots,) = model.tries(partial(jobs.stage, "org/model"))
    check_nothing_half_done_and_going_on(model, gots)
    assert [left for left in model.hub.faults.left if left.times] == []


def test_the_report_counts_the_bytes_of_broken_attempts(model: Nodes) -> None:
    model.hub.faults.add(Fault(corrupt_at=5, times=1, path_suffix="model.safetensors"))
    report = model.run(jobs.report, "org/model")[0]
    extra = len(FILES["model.safetensors"])
    assert report["total"]["origin_bytes"] == sum(map(len, FILES.values())) + extra == model.hub.content_bytes()


EVIL = [
    {"sha": "1" * 40, "siblings": [{"rfilename": "../../../x"}]},
    {"sha": "1" * 40, "siblings": [{"rfilename": "/x"}]},
    {"sha": "1" * 40, "siblings": [{"rfilename": "a/../../x"}]},
    {"sha": "1" * 40, "siblings": [{"rfilename": "x", "blobId": "../../../../x"}]},
    {"sha": "1" * 40, "siblings": [{"rfilename": "x", "lfs": {"sha256": "../x", "size": 3, "pointerSize": 1}}]},
    {"sha": "../../../../../x", "siblings": [{"rfilename": "x"}]},
    {"sha": "/x", "siblings": [{"rfilename": "x"}]},
]


def test_a_listing_that_climbs_out(model: Nodes) -> None:
    with evil_hub(EVIL) as url:
        model.variables["HF_ENDPOINT"] = url
        calls = [partial(jobs.stage, f"org/evil{n}", to=model.place / f"links{n}") for n in range(len(EVIL))]
        by_case = model.cases(*([call] for call in calls))
    for case, (info, (gots,)) in enumerate(zip(EVIL, by_case, strict=True)):
        for got in gots:
            assert isinstance(got.error, CollectError), (info, got)
            assert set(got.error.failures) == {0}, info
        for rank in (0, 2):
            check_cache(model.cache(rank, case))
    outside = [path for path in model.place.rglob("*") if path.name == "x"]
    assert outside == []


@contextmanager
def evil_hub(infos: list[dict[str, Any]]) -> Iterator[str]:
    """A Hub that describes the repository org/evil3 by item 3 of the list, and sends three bytes for all else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"abc"
            if described := re.match(r"/api/models/(org/evil(\d+))", self.path):
                info = infos[int(described[2])]
                siblings = [{"size": 3, **sibling} for sibling in info["siblings"]]
                body = json.dumps({"id": described[1], "tags": [], **info, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
