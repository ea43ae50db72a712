"""How the content of Hub files is read: by links that are kept, or through Xet, and never at the cost of a secret."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants, hf_hub_download, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from tests.contract.places import meaning, point_at
from weightferry.errors import AccessDenied, OriginError, SourceNotFound
from weightferry.manifest import PinnedSource
from weightferry.origins.base import Origin, Silent, TransientOriginError, origin_for
from weightferry.origins.transport import httpx
from weightferry.settings import Settings
from weightferry.testing.hub import Fault, HubOptions, HubServer

PIECE = 10_000
WEIGHTS = os.urandom(64 * PIECE)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS}
NAME = "model.safetensors"
PIECES = [(start, start + PIECE) for start in range(0, len(WEIGHTS), PIECE)]


@dataclass
class Reading:
    """One Hub with one repository, and an origin that has resolved it."""

    hub: HubServer
    origin: Origin
    pinned: PinnedSource = field(init=False)

    def __post_init__(self) -> None:
        self.hub.add_repo("org/model", FILES)
        self.pinned = self.origin.resolve(meaning("hf://org/model"), [""])
        self.hub.reset()

    def read(self, start: int = 0, stop: int | None = None, path: str = NAME) -> bytes:
        with self.origin.read(self.pinned, path, start, stop) as chunks:
            return b"".join(chunks)

    def take(self, into: bytearray) -> None:
        with self.origin.read(self.pinned, NAME) as chunks:
            for chunk in chunks:
                into += chunk

    def asked(self) -> dict[str, int]:
        kinds = [record.kind for record in self.hub.requests]
        return {kind: kinds.count(kind) for kind in ("metadata", "redirect", "content") if kind in kinds}


Make = Callable[..., Reading]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    opened: list[Any] = []

    def start(options: HubOptions | None = None, **limits: Any) -> Reading:
        hub = HubServer(options=options)
        point_at(hub, monkeypatch)
        values = {"connect_timeout": 5, "read_timeout": 5, "retry_wait": 0.01} | limits
        origin = origin_for("hf", Settings(cache_dir=tmp_path / "cache", **values))
        opened.extend((closing(origin), closing(hub)))
        return Reading(hub, origin)

    yield start
    close_session()
    for each in opened:
        with each:
            pass


@pytest.fixture
def reading(make: Make) -> Reading:
    return make()


class TestLinks:
    def test_one_question_for_all_ranges(self, reading: Reading) -> None:
        assert b"".join(reading.read(*piece) for piece in PIECES) == WEIGHTS
        assert reading.asked() == {"redirect": 1, "content": 64}

    def test_one_question_for_all_threads(self, reading: Reading) -> None:
        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(lambda piece: reading.read(*piece), PIECES)) == WEIGHTS
        assert reading.asked() == {"redirect": 1, "content": 64}

    def test_small_files_are_where_the_hub_is(self, reading: Reading) -> None:
        assert reading.read(path="config.json") == b"{}"
        assert reading.asked() == {"redirect": 1, "content": 1}

    def test_a_link_that_is_refused_is_asked_for_again(self, reading: Reading) -> None:
        reading.read(0, 5)
        reading.hub.expire_links()
        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(lambda piece: reading.read(*piece), PIECES)) == WEIGHTS
        assert reading.asked()["redirect"] == 2

    @pytest.mark.parametrize("status", [401, 403, 404, 410])
    def test_once(self, reading: Reading, status: int) -> None:
        reading.read(0, 5)
        reading.hub.faults.add(Fault(status=status, kind="content", times=None))
        with pytest.raises(AccessDenied if status < 404 else SourceNotFound):
            reading.read(5, 9)
        assert reading.asked() == {"redirect": 2, "content": 3}
        reading.hub.faults.clear()
        assert reading.read(5, 9) == WEIGHTS[5:9]

    def test_a_link_that_is_about_to_end_is_not_used(self, make: Make) -> None:
        reading = make(HubOptions(link_lifetime=9))
        assert reading.read(0, 5) + reading.read(5, 9) == WEIGHTS[:9]
        assert {record.status for record in reading.hub.requests} == {302, 206}, "refused by none"

    def test_a_link_that_ends_while_it_is_read(self, reading: Reading) -> None:
        with reading.origin.read(reading.pinned, NAME) as chunks:
            first = next(iter(chunks))
            reading.hub.expire_links()
            assert first + b"".join(chunks) == WEIGHTS

    def test_the_token_stays_with_the_hub(self, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_planted1234")
        reading.read(0, 5)
        reading.hub.expire_links()
        reading.read(5, 9)
        assert {(record.side, record.had_authorization) for record in reading.hub.requests} == {
            ("hub", True),
            ("cdn", False),
        }

    def test_a_way_that_only_the_session_of_huggingface_hub_knows(self, make: Make) -> None:
        # The CDN has a name where nobody listens, and a program has told huggingface_hub how to get there.
        class Detour(httpx.HTTPTransport):  # type: ignore[misc]
            def handle_request(self, request: Any) -> Any:
                request.url = request.url.copy_with(host="127.0.0.1")
                return super().handle_request(request)

        reading = make(HubOptions(cdn_host="127.0.0.9"))
        set_client_factory(lambda: httpx.Client(transport=Detour(), follow_redirects=True, timeout=5))
        try:
            assert reading.read(0, 5) + reading.read(5, 9) == WEIGHTS[:9]
            assert reading.asked() == {"redirect": 1, "content": 2}
        finally:
            set_client_factory(default_client_factory)

    def test_silence_has_its_own_name(self, make: Make) -> None:
        reading = make(read_timeout=0.2)
        reading.hub.faults.add(Fault(kind="content", silent_after=5))
        got = bytearray()
        with pytest.raises(Silent):
            reading.take(got)
        assert got == WEIGHTS[:5]

    def test_a_third_of_the_patience_is_the_longest_wait(self, make: Make) -> None:
        reading = make(read_timeout=60, stall_timeout=0.6)
        reading.hub.faults.add(Fault(kind="content", silent_after=5))
        with pytest.raises(Silent):
            reading.read()


class TestReach:
    def check_access(self, reading: Reading, text: str = "hf://org/model") -> None:
        reading.origin.check_access(meaning(text))

    @pytest.mark.parametrize("text", ["", "/model.safetensors", "/gone.bin", "@gone"])
    def test_a_repository_that_may_be_read(self, reading: Reading, text: str) -> None:
        self.check_access(reading, f"hf://org/model{text}")
        assert reading.asked() == {"redirect": 1}

    @pytest.mark.parametrize("closed", [{"gated": True}, {"private": True}])
    def test_one_that_needs_a_token(self, reading: Reading, closed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        reading.hub.add_repo("org/model", FILES, allowed_tokens=["hf_good"], **closed)
        with pytest.raises(AccessDenied, match="this rank has no token"):
            self.check_access(reading)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(AccessDenied):
            self.check_access(reading)
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        self.check_access(reading)

    def test_one_that_is_not_there(self, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_any")
        with pytest.raises(SourceNotFound):
            self.check_access(reading, "hf://org/other")

    def test_offline(self, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(OriginError, match="HF_HUB_OFFLINE"):
            self.check_access(reading)

    def test_a_hub_that_says_nothing(self, make: Make) -> None:
        reading = make(read_timeout=0.2)
        reading.hub.faults.add(Fault(delay=float("inf")))
        with pytest.raises(Silent):
            self.check_access(reading)

    def test_a_hub_that_is_busy(self, reading: Reading) -> None:
        reading.hub.faults.add(Fault(status=429, times=None))
        with pytest.raises(TransientOriginError, match="429"):
            self.check_access(reading)
        assert len(reading.hub.requests) == 1


class TestXet:
    @pytest.fixture(autouse=True)
    def _on(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))

    @pytest.fixture
    def xet(self, make: Make) -> Reading:
        return make(HubOptions(xet=True))

    def by_xet(self, reading: Reading) -> set[bool]:
        return {record.path.startswith("/xet/") for record in reading.hub.requests if record.kind == "content"}

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, None), (0, 1), (1, None), (65_535, 65_537), (100_000, 500_001), (len(WEIGHTS) - 1, None), (7, 10**9)],
    )
    def test_ranges(self, xet: Reading, start: int, stop: int | None) -> None:
        assert xet.read(start, stop) == WEIGHTS[start:stop]
        assert self.by_xet(xet) == {True}

    def test_many_threads_need_one_token(self, xet: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_planted1234")
        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(lambda piece: xet.read(*piece), PIECES)) == WEIGHTS
        paths = [record.path for record in xet.hub.requests]
        assert sum("xet-read-token" in path for path in paths) == 1
        assert sum("/resolve/" in path for path in paths) == 1
        assert all(not record.had_authorization for record in xet.hub.requests if record.path.startswith("/xet/"))

    @pytest.mark.parametrize("kind", ["metadata", "content"])
    @pytest.mark.parametrize("how", [{"status": 500}, {"status": 403}, {"cut_after": 50}, {"hang_up": True}])
    def test_a_failure_is_made_good_by_links(self, xet: Reading, kind: Any, how: dict[str, Any], caplog) -> None:
        xet.read(0, 5)  # what was asked for before does not fail any more
        path = "/0" if kind == "content" else ""
        fault = Fault(kind=kind, path_suffix=path, times=None, **how)
        xet.hub.faults.add(fault)
        assert xet.read(100_000, 300_000) == WEIGHTS[100_000:300_000]
        assert "going on by plain http from byte 100000" in caplog.text
        xet.hub.reset()
        assert xet.read(300_000) == WEIGHTS[300_000:]
        assert self.by_xet(xet) == {False}, "it is not tried again"

    def test_a_failure_half_way(self, make: Make, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
        monkeypatch.setattr("weightferry.origins.xet._WINDOW", 100_000)
        xet = make(HubOptions(xet=True))
        got = bytearray()
        with xet.origin.read(xet.pinned, NAME) as chunks:
            for chunk in chunks:
                got += chunk
                if len(got) == 200_000:
                    xet.hub.faults.add(Fault(path_suffix="/0", kind="content", status=500, times=None))
        assert got == WEIGHTS
        assert "going on by plain http from byte 200000" in caplog.text

    def test_a_reader_that_goes_away(self, xet: Reading) -> None:
        with xet.origin.read(xet.pinned, NAME) as chunks:
            assert next(iter(chunks))
        assert xet.read() == WEIGHTS

    def test_switched_off(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        reading = make(HubOptions(xet=True))
        assert reading.read() == WEIGHTS
        assert self.by_xet(reading) == {False}

    # huggingface_hub before 1.19 uses what newer releases of hf_xet warn of.
    @pytest.mark.filterwarnings("ignore:hf_xet.download_files:DeprecationWarning")
    def test_the_real_client_reads_it_too(self, xet: Reading, tmp_path: Path) -> None:
        kept = hf_hub_download("org/model", NAME, endpoint=xet.hub.url, cache_dir=tmp_path, token=False)
        assert Path(kept).read_bytes() == WEIGHTS
        assert self.by_xet(xet) == {True}
