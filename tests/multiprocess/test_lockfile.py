"""A lock file: the same bytes without asking, from a cache without a network, and a quick no where they are missing."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from subprocess import run

import pytest

import weightferry
from tests.conftest import need
from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, failed_alike, sha256s, values
from weightferry.errors import BadRequest, OriginUnreachable, SourceNotFound

NOWHERE = "http://127.0.0.1:9"
FILES = {"config.json": b"{}", "w/model.bin": bytes(range(256)) * 8000, "w/other.bin": b"x" * 3_000_000}


@pytest.fixture
def locked(nodes: Nodes) -> Nodes:
    """A repository that was staged and locked, and has moved on since."""
    nodes.hub.add_repo("org/model", FILES)
    done = nodes.run(
        jobs.command,
        nodes.place,
        "prefetch",
        "org/model",
        "--lockfile",
        str(nodes.place / "weights.lock"),
        world_size=2,
    )
    assert [code for code, _, _ in done] == [0, 0], done
    nodes.hub.add_repo("org/model", {**FILES, "config.json": b"{2}"})
    return nodes


def lock(nodes: Nodes) -> str:
    return str(nodes.place / "weights.lock")


def test_what_is_locked_is_not_asked_for(locked: Nodes) -> None:
    asked, served = len(locked.hub.metadata_requests), locked.hub.content_bytes()
    (gots,) = locked.tries(partial(jobs.stage, "org/model", lockfile=lock(locked)))
    assert [files for _, files in values(gots)] == [sha256s(FILES)] * 4
    assert len(locked.hub.metadata_requests) == asked == 1
    assert locked.hub.content_bytes() == served, "the other node has it"


def test_without_a_network(locked: Nodes) -> None:
    locked.variables["HF_ENDPOINT"] = NOWHERE
    call = partial(jobs.stage, "org/model", lockfile=lock(locked))
    part = partial(jobs.collect_locked, {"m": "org/model/w/model.bin"}, lock(locked))
    gots, parts = locked.tries(call, part, world_size=2)
    assert [files for _, files in values(gots)] == [sha256s(FILES)] * 2
    assert values(parts) == [{"m": sha256s(FILES)["w/model.bin"]}] * 2


@pytest.mark.parametrize("ranks", [1, 4])
def test_what_is_neither_cached_nor_reachable_is_listed_at_once(locked: Nodes, ranks: int) -> None:
    locked.variables["HF_ENDPOINT"] = NOWHERE
    cold = partial(jobs.stage, "org/model", lockfile=lock(locked), cache_dir=locked.place / "cold")
    (gots,) = locked.tries(cold, world_size=ranks)
    text = failed_alike(gots, OriginUnreachable, "transfer", {0}, "no node has 3 files")
    assert all(name in text for name in FILES)


@pytest.mark.parametrize("endpoint", ["", NOWHERE])
def test_a_machine_without_any_network(locked: Nodes, endpoint: str) -> None:
    """Not even a loopback: a namespace of its own. The cold one is to fail in under 5 s, which is not asserted."""
    need(os.geteuid() == 0, "a network namespace needs root: run this test as root")
    command = [
        "unshare",
        "--net",
        sys.executable,
        "-m",
        "weightferry.cli",
        "stage",
        "org/model",
        "--lockfile",
        lock(locked),
    ]
    environ = {**os.environ, **locked.environ(0), "HF_ENDPOINT": endpoint, "WEIGHTFERRY_RETRY_WAIT": "0.5"}
    environ = {name: value for name, value in environ.items() if value}
    warm = run(command, env=environ, capture_output=True, text=True, check=False)
    assert warm.returncode == 0, warm.stderr
    began = time.monotonic()
    cold = run(
        [*command, "--cache-dir", str(locked.place / "cold")], env=environ, capture_output=True, text=True, check=False
    )
    print(f"a cold cache without a network fails in {time.monotonic() - began:.2f} s")
    assert cold.returncode == 1
    assert "OriginUnreachable" in cold.stderr
    assert all(name in cold.stderr for name in FILES)
    assert "Traceback" not in cold.stderr


def test_what_is_not_in_the_lock_file(locked: Nodes) -> None:
    gots, other = locked.tries(
        partial(jobs.stage, "org/model/w/modle.bin", lockfile=lock(locked)),
        partial(jobs.stage, "org/else", lockfile=lock(locked)),
    )
    failed_alike(gots, SourceNotFound, "resolve", {0}, "not in the lock file", "did you mean w/model.bin")
    failed_alike(other, SourceNotFound, "resolve", {0}, "hf://org/model")


def test_what_is_no_lock_file(nodes: Nodes) -> None:
    contents = ["", "[]", '{"version": 2, "sources": []}', '{"version": 1, "sources": [{}]}']
    paths = [nodes.place / f"{number}.lock" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    calls = [partial(jobs.stage, "org/model", lockfile=str(path)) for path in (*paths, nodes.place / "absent.lock")]
    *by_content, absent = nodes.tries(*calls, world_size=2)
    for gots in by_content:
        failed_alike(gots, BadRequest, "resolve", {0}, "lock file")
    failed_alike(absent, BadRequest, "resolve", {0}, "cannot be read")


def test_an_index_of_shards_is_read_from_the_cache(nodes: Nodes) -> None:
    shards = {"a.safetensors": b"a" * 2_000_000, "b.safetensors": b"b" * 2_000_000}
    index = json.dumps({"weight_map": {name[0]: name for name in shards}}).encode()
    nodes.hub.add_repo("org/shards", {**shards, "model.safetensors.index.json": index})
    nodes.run(jobs.command, nodes.place, "prefetch", "org/shards", "--lockfile", lock(nodes), world_size=1)
    nodes.variables["HF_ENDPOINT"] = NOWHERE
    call = partial(jobs.collect_locked, {"m": "org/shards/model.safetensors.index.json"}, lock(nodes))
    (gots,) = nodes.tries(call, world_size=1)
    assert list(values(gots)[0]) == ["m"]


def test_no_signature_is_locked(tmp_path: Path) -> None:
    from weightferry.manifest import Manifest, PinnedSource
    from weightferry.origins.lockfile import Lockfile
    from weightferry.sources import Source

    signed = PinnedSource(Source("https", "https://host/a", "m.bin", query="X-Amz-Signature=secret"), "", ())
    with pytest.raises(weightferry.BadRequest, match="signature"):
        Lockfile.text(Manifest((signed,)))
