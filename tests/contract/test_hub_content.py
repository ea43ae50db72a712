"""Reading the content of Hub files: through cached signed URLs or through Xet, without leaking the token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download

from tests.contract.backends import parse, use_server
from tests.contract.hub_library import close_hub_session, hub_reaches, set_endpoint
from tests.raw_server import RawServer
from weightferry.errors import AccessDenied, OriginError, SourceNotFound
from weightferry.manifest import PinnedSource
from weightferry.origins.base import Origin, Silent, TransientOriginError
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.testing.hub import Fault, HubOptions, HubServer

RANGE_SIZE = 10_000
WEIGHTS = os.urandom(64 * RANGE_SIZE)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}
NAME = "model.safetensors"
RANGES = [(start, start + RANGE_SIZE) for start in range(0, len(WEIGHTS), RANGE_SIZE)]


@dataclass
class HubReader:
    """A test Hub with one repository, and an origin that has resolved it."""

    hub: HubServer
    origin: Origin
    pinned: PinnedSource = field(init=False)

    def __post_init__(self) -> None:
        self.hub.add_repo("org/model", FILES)
        self.pinned = self.origin.resolve(parse("hf://org/model"), [""])
        self.hub.reset()

    def read(self, start: int = 0, stop: int | None = None, path: str = NAME) -> bytes:
        with self.origin.read(self.pinned, path, start, stop) as chunks:
            return b"".join(chunks)

    def read_into(self, into: bytearray) -> None:
        with self.origin.read(self.pinned, NAME) as chunks:
            for chunk in chunks:
                into += chunk

    def request_counts(self) -> dict[str, int]:
        kinds = [record.kind for record in self.hub.requests]
        return {kind: kinds.count(kind) for kind in ("metadata", "redirect", "content") if kind in kinds}


Make = Callable[..., HubReader]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    opened: list[Any] = []

    def start(options: HubOptions | None = None, **limits: Any) -> HubReader:
        hub = HubServer(options=options)
        use_server(hub, monkeypatch)
        values = {"connect_timeout": 5, "read_timeout": 5, "retry_wait": 0.01} | limits
        origin = origin_for("hf", Settings(cache_dir=tmp_path / "cache", **values))
        opened.extend((closing(origin), closing(hub)))
        return HubReader(hub, origin)

    yield start
    close_hub_session()
    for each in opened:
        with each:
            pass


@pytest.fixture
def reader(make: Make) -> HubReader:
    return make()


class TestSignedUrls:
    def test_one_request_to_the_hub_for_all_ranges(self, reader: HubReader) -> None:
        assert b"".join(reader.read(*byte_range) for byte_range in RANGES) == WEIGHTS
        assert reader.request_counts() == {"redirect": 1, "content": 64}

    def test_one_request_to_the_hub_for_all_threads(self, reader: HubReader) -> None:
        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(lambda byte_range: reader.read(*byte_range), RANGES)) == WEIGHTS
        assert reader.request_counts() == {"redirect": 1, "content": 64}

    def test_small_files_are_read_from_the_hub(self, reader: HubReader) -> None:
        assert reader.read(path="config.json") == b"{}"
        assert reader.request_counts() == {"redirect": 1, "content": 1}

    def test_a_refused_url_is_requested_again(self, reader: HubReader) -> None:
        reader.read(0, 5)
        reader.hub.expire_links()
        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(lambda byte_range: reader.read(*byte_range), RANGES)) == WEIGHTS
        assert reader.request_counts()["redirect"] == 2

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_a_refused_url_is_requested_again_only_once(self, reader: HubReader, status: int) -> None:
        reader.read(0, 5)
        reader.hub.faults.add(Fault(status=status, kind="content", times=None))
        with pytest.raises(AccessDenied if status < 404 else SourceNotFound):
            reader.read(5, 9)
        assert reader.request_counts() == {"redirect": 2, "content": 3}
        reader.hub.faults.clear()
        assert reader.read(5, 9) == WEIGHTS[5:9]

    def test_a_url_that_is_about_to_expire_is_not_used(self, make: Make) -> None:
        reader = make(HubOptions(link_lifetime=9))
        assert reader.read(0, 5) + reader.read(5, 9) == WEIGHTS[:9]
        assert {record.status for record in reader.hub.requests} == {302, 206}, "no request was refused"

    def test_a_url_that_expires_during_a_read(self, reader: HubReader) -> None:
        with reader.origin.read(reader.pinned, NAME) as chunks:
            first = next(iter(chunks))
            reader.hub.expire_links()
            assert first + b"".join(chunks) == WEIGHTS

    def test_the_token_is_sent_only_to_the_hub(self, reader: HubReader, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_planted1234")
        reader.read(0, 5)
        reader.hub.expire_links()
        reader.read(5, 9)
        assert {(record.side, record.had_authorization) for record in reader.hub.requests} == {
            ("hub", True),
            ("cdn", False),
        }

    def test_a_route_that_only_the_session_of_huggingface_hub_has(self, make: Make) -> None:
        # No server listens at the address of the CDN; the program has configured huggingface_hub to reach another one.
        reader = make(HubOptions(cdn_host="127.0.0.9"))
        with hub_reaches("127.0.0.9", at="127.0.0.1"):
            assert reader.read(0, 5) + reader.read(5, 9) == WEIGHTS[:9]
            assert reader.request_counts() == {"redirect": 1, "content": 2}

    def test_a_hub_that_only_the_session_of_huggingface_hub_reaches(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        reader = make()
        set_endpoint(monkeypatch, reader.hub.url.replace("127.0.0.1", "127.0.0.9"))
        with (
            hub_reaches("127.0.0.9", at="127.0.0.1"),
            closing(origin_for("hf", Settings(cache_dir=tmp_path, connect_timeout=5))) as reader.origin,
        ):
            reader.origin.check_access(parse("hf://org/model"))
            reader.pinned = reader.origin.resolve(parse("hf://org/model"), [""])
            assert reader.read(0, 5) + reader.read(5, 9) == WEIGHTS[:9]
            assert reader.read(path="config.json") == b"{}"

    def test_a_read_timeout_is_silent(self, make: Make) -> None:
        reader = make(read_timeout=0.2)
        reader.hub.faults.add(Fault(kind="content", silent_after=5))
        got = bytearray()
        with pytest.raises(Silent):
            reader.read_into(got)
        assert got == WEIGHTS[:5]

    def test_the_read_timeout_is_at_most_a_third_of_the_stall_timeout(self, make: Make) -> None:
        reader = make(read_timeout=60, stall_timeout=0.6)
        reader.hub.faults.add(Fault(kind="content", silent_after=5))
        with pytest.raises(Silent):
            reader.read()


class TestCheckAccess:
    def check_access(self, reader: HubReader, text: str = "hf://org/model") -> None:
        reader.origin.check_access(parse(text))

    @pytest.mark.parametrize("text", ["", "/model.safetensors", "/gone.bin", "@gone"])
    def test_a_readable_repository(self, reader: HubReader, text: str) -> None:
        self.check_access(reader, f"hf://org/model{text}")
        assert reader.request_counts() == {"redirect": 1}

    @pytest.mark.parametrize("head", ["206 P", "200 OK", "416 R"])
    def test_a_single_byte_is_requested(self, reader: HubReader, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # A mirror that sends the content itself.
        mirror = RawServer()
        set_endpoint(monkeypatch, mirror.url)
        mirror.answer("/org/model/resolve/main/model.safetensors", f"HTTP/1.1 {head}\r\nContent-Length: 1", b"x")
        self.check_access(reader, "hf://org/model/model.safetensors")
        assert mirror.headers()["range"] == "bytes=0-0"
        mirror.close()

    @pytest.mark.parametrize("closed", [{"gated": True}, {"private": True}])
    def test_a_closed_repository(self, reader: HubReader, closed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        reader.hub.add_repo("org/model", FILES, allowed_tokens=["hf_good"], **closed)
        with pytest.raises(AccessDenied, match="this rank has no token"):
            self.check_access(reader)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(AccessDenied):
            self.check_access(reader)
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        self.check_access(reader)

    def test_a_missing_repository(self, reader: HubReader, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_any")
        with pytest.raises(SourceNotFound):
            self.check_access(reader, "hf://org/other")

    def test_offline(self, reader: HubReader, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(OriginError, match="HF_HUB_OFFLINE"):
            self.check_access(reader)

    def test_a_silent_hub(self, make: Make) -> None:
        reader = make(read_timeout=0.2)
        reader.hub.faults.add(Fault(delay=float("inf")))
        with pytest.raises(Silent):
            self.check_access(reader)

    def test_a_busy_hub(self, reader: HubReader) -> None:
        reader.hub.faults.add(Fault(status=429, times=None))
        with pytest.raises(TransientOriginError, match="429"):
            self.check_access(reader)
        assert len(reader.hub.requests) == 1


class TestXet:
    @pytest.fixture(autouse=True)
    def _on(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))

    @pytest.fixture
    def xet(self, make: Make) -> HubReader:
        return make(HubOptions(xet=True))

    def read_through_xet(self, reader: HubReader) -> set[bool]:
        return {record.path.startswith("/xet/") for record in reader.hub.requests if record.kind == "content"}

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, None), (0, 1), (1, None), (65_535, 65_537), (100_000, 500_001), (len(WEIGHTS) - 1, None), (7, 10**9)],
    )
    def test_ranges(self, xet: HubReader, start: int, stop: int | None) -> None:
        assert xet.read(start, stop) == WEIGHTS[start:stop]
        assert self.read_through_xet(xet) == {True}

    def test_many_threads_need_one_token(self, xet: HubReader, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_planted1234")
        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(lambda byte_range: xet.read(*byte_range), RANGES)) == WEIGHTS
        paths = [record.path for record in xet.hub.requests]
        assert sum("xet-read-token" in path for path in paths) == 1
        assert sum("/resolve/" in path for path in paths) == 1
        assert all(not record.had_authorization for record in xet.hub.requests if record.path.startswith("/xet/"))

    @pytest.mark.parametrize("kind", ["metadata", "content"])
    @pytest.mark.parametrize("how", [{"status": 500}, {"status": 403}, {"cut_after": 50}, {"hang_up": True}])
    def test_a_failure_falls_back_to_plain_http(self, xet: HubReader, kind: Any, how: dict[str, Any], caplog) -> None:
        xet.read(0, 5)  # data requested before the fault does not fail
        path = "/0" if kind == "content" else ""
        fault = Fault(kind=kind, path_suffix=path, times=None, **how)
        xet.hub.faults.add(fault)
        assert xet.read(100_000, 300_000) == WEIGHTS[100_000:300_000]
        assert "continuing over plain HTTP from byte 100000" in caplog.text
        xet.hub.reset()
        assert xet.read(300_000) == WEIGHTS[300_000:]
        assert self.read_through_xet(xet) == {False}, "Xet is not used again"

    def test_a_failure_during_a_read(self, make: Make, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
        monkeypatch.setattr("weightferry.origins.xet._WINDOW", 100_000)
        xet = make(HubOptions(xet=True))
        got = bytearray()
        with xet.origin.read(xet.pinned, NAME) as chunks:
            for chunk in chunks:
                got += chunk
                if len(got) == 200_000:
                    xet.hub.faults.add(Fault(path_suffix="/0", kind="content", status=500, times=None))
        assert got == WEIGHTS
        assert "continuing over plain HTTP from byte 200000" in caplog.text

    def test_a_reader_that_stops_early(self, xet: HubReader) -> None:
        with xet.origin.read(xet.pinned, NAME) as chunks:
            assert next(iter(chunks))
        assert xet.read() == WEIGHTS

    def test_disabled(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        reader = make(HubOptions(xet=True))
        assert reader.read() == WEIGHTS
        assert self.read_through_xet(reader) == {False}

    # huggingface_hub before 1.19 uses functions of hf_xet that newer releases deprecate.
    @pytest.mark.filterwarnings("ignore:hf_xet.download_files:DeprecationWarning")
    def test_huggingface_hub_reads_it_too(self, xet: HubReader, tmp_path: Path) -> None:
        kept = hf_hub_download("org/model", NAME, endpoint=xet.hub.url, cache_dir=tmp_path, token=False)
        assert Path(kept).read_bytes() == WEIGHTS
        assert self.read_through_xet(xet) == {True}
