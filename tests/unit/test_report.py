"""The run report: the documented JSON, and its text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import weightferry
from weightferry.cluster.coordinator import LocalCoordinator
from weightferry.phases.job_request import RankRequest
from weightferry.report.report_text import format_size, summary, table
from weightferry.report.run_report import DomainReport, RunReport
from weightferry.settings import Settings
from weightferry.sources import SourceRequest
from weightferry.staging import collect

TOTAL = {"bytes": 2000, "files": 2, "origin_bytes": 4000, "peer_bytes": 0, "cached_bytes": 500, "seconds": 1.25}
DOMAINS = [
    DomainReport("h0", 0, [0, 1], origin_bytes=2000, seconds={"agree": 0.1, "transfer": 1.0}),
    DomainReport("h1", 2, [2, 3], origin_bytes=2000, cached_bytes=500, seconds={"agree": 0.1, "load": 2.0}),
]
REPORT = RunReport("collect", 4, 2, TOTAL, DOMAINS, {"source": None, "commit": None, "files": []})


def test_keys() -> None:
    report = REPORT.to_dict()
    assert list(report) == ["schema", "operation", "ranks", "nodes", "total", "domains", "manifest"]
    assert report["schema"] == 1
    for domain in report["domains"]:
        assert set(domain) == {
            *("host", "leader_rank", "ranks", "origin_bytes", "peer_bytes_in", "peer_bytes_out", "cached_bytes"),
            *("copied_bytes", "locks", "seconds"),
        }


def test_json_round_trip(tmp_path: Path) -> None:
    REPORT.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_real_report_has_all_keys(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"abc")
    settings = Settings(cache_dir=tmp_path / "cache")
    coordinator = LocalCoordinator("h")
    coordinator.operation = "stage"
    collected = collect(lambda: RankRequest({"": SourceRequest.of(tmp_path / "m.bin")}), coordinator, settings)
    report = collected.report.to_dict()
    assert (report["operation"], report["ranks"], report["nodes"]) == ("stage", 1, 1)
    assert report["total"] | {"seconds": 0} == {
        "bytes": 3,
        "files": 1,
        "origin_bytes": 0,
        "copied_bytes": 0,
        "peer_bytes": 0,
        "cached_bytes": 3,
        "seconds": 0,
    }
    (domain,) = report["domains"]
    assert (domain["host"], domain["leader_rank"], domain["ranks"]) == ("h", 0, [0])
    assert {"agree", "resolve", "survey", "transfer", "link"} <= domain["seconds"].keys()
    assert report["manifest"].keys() == {"source", "commit", "files"}
    (file,) = report["manifest"]["files"]
    assert file | {"source": ""} == {"path": "m.bin", "size": 3, "sha256": None, "source": "", "commit": None}
    json.dumps(report)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1500, "1.5 kB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (90_868_376, "90.9 MB"),
        (10**15, "1 PB"),
    ],
)
def test_format_size(count: int, text: str) -> None:
    assert format_size(count) == text


def test_summary() -> None:
    text, path = summary(REPORT, Path("/cache/x")).splitlines()
    moved, came = text.split(": ")
    assert moved == "staged 2 files, 2 kB, for 4 ranks on 2 nodes in 1.2 s"
    assert came == "4 kB from the origin, 0 B from peers, 500 B already on disk"
    assert path == "/cache/x"


def test_the_columns_of_the_table_are_aligned() -> None:
    lines = table(REPORT).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-3:] == ["agree", "transfer", "load"]
    assert "1 (h1)" in lines[2]
    assert lines[2].endswith("0.10 s    0.00 s  2.00 s")


def test_public_names_exist() -> None:
    for name in weightferry.__all__:
        assert getattr(weightferry, name) is not None
    assert set(weightferry.__all__) <= set(dir(weightferry))
    with pytest.raises(AttributeError):
        _ = weightferry.nothing
