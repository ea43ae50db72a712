"""What a leader does: several files at a time, each whole under its final name or not there at all."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace

import pytest

from tests.unit.doubles import FakeWatch, Over, manifest_of
from weightferry.cache.layout import CacheLayout
from weightferry.cache.survey import Survey, survey
from weightferry.errors import AccessDenied, IntegrityError, OriginError
from weightferry.manifest import Manifest
from weightferry.origins.base import TransientOriginError
from weightferry.settings import Settings
from weightferry.testing.origin import FakeOrigin, Fault
from weightferry.transfer.bring import Brought, agree_on_bytes, bring
from weightferry.transfer.plan import plan

FILES = {f"part{number}.bin": bytes([number]) * (10_000 + number) for number in range(6)}


class Leader:
    """One leader, its cache and its origin."""

    def __init__(self, layout: CacheLayout, settings: Settings, watch: FakeWatch, origin: FakeOrigin) -> None:
        self.layout, self.settings, self.watch, self.origin = layout, settings, watch, origin
        self.manifest = manifest_of(origin)

    def bring(self, *missing: int) -> Brought:
        wanted = missing or range(len(self.origin.files))
        return bring(self.layout, self.manifest, wanted, self.settings, self.watch, self.origin.factory)

    def published(self) -> dict[str, bytes]:
        there = {}
        for pinned, file in self.manifest.staged():
            blob = self.layout.blob(pinned, file)
            if blob.exists():
                there[file.path] = blob.read_bytes()
        return there

    def partials(self) -> list[str]:
        folder = self.layout.root / "partial"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def leader(layout: CacheLayout, settings: Settings, watch: FakeWatch) -> Leader:
    return Leader(layout, settings, watch, FakeOrigin(FILES))


def test_all_files_with_their_digests(leader: Leader) -> None:
    brought = leader.bring()
    assert leader.published() == FILES
    assert leader.partials() == []
    assert brought.origin_bytes == leader.watch.bytes == sum(map(len, FILES.values()))
    assert brought.sha256 == {n: hashlib.sha256(FILES[f"part{n}.bin"]).hexdigest() for n in range(6)}
    assert survey(leader.layout, leader.manifest).whole == brought.sha256


def test_only_what_is_missing(leader: Leader) -> None:
    leader.bring(1, 4)
    assert set(leader.published()) == {"part1.bin", "part4.bin"}
    assert {read.path for read in leader.origin.reads} == {"part1.bin", "part4.bin"}


def test_nothing_missing_makes_no_origin(leader: Leader) -> None:
    def never(scheme: str, _: Settings) -> FakeOrigin:
        raise AssertionError(scheme)

    assert bring(leader.layout, leader.manifest, [], leader.settings, leader.watch, never) == Brought()


def test_several_at_a_time_but_no_more_than_allowed(leader: Leader) -> None:
    leader.settings = replace(leader.settings, connections=3)
    gate = threading.Event()
    leader.origin.faults += [Fault(times=None, wait_for=gate)]
    thread = threading.Thread(target=leader.bring)
    thread.start()
    try:
        for _ in range(500):
            if len(leader.origin.reads) == 3:
                break
            threading.Event().wait(0.01)
        threading.Event().wait(0.05)
        assert len(leader.origin.reads) == 3
    finally:
        gate.set()
        thread.join()
    assert leader.published() == FILES


def test_broken_attempts_are_counted(leader: Leader) -> None:
    leader.origin.faults.append(Fault("part0.bin", corrupt=0))
    brought = leader.bring()
    assert brought.origin_bytes == sum(map(len, FILES.values())) + len(FILES["part0.bin"]) == leader.origin.sent


class TestFailure:
    def test_the_first_failure_stops_the_others(self, leader: Leader) -> None:
        leader.settings = replace(leader.settings, connections=2)
        gate = threading.Event()
        # The others have sent nothing yet, and go on only after the failure.
        leader.origin.faults += [Fault("part0.bin", error=AccessDenied("403")), Fault(times=None, wait_for=gate)]
        threading.Timer(0.2, gate.set).start()
        with pytest.raises(AccessDenied, match="403"):
            leader.bring()
        assert len(leader.origin.reads) <= 3, "files that were waiting for a connection are not begun"
        assert leader.published() == {}
        assert leader.partials() == []

    def test_it_wakes_those_that_wait_for_a_retry(self, leader: Leader) -> None:
        leader.settings = replace(leader.settings, connections=2)
        leader.origin.faults += [
            Fault("part0.bin", error=TransientOriginError("429", retry_after=100)),
            Fault("part1.bin", error=AccessDenied("403")),
        ]
        with pytest.raises(AccessDenied):
            leader.bring(0, 1)

    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            (Fault("part3.bin", corrupt=1, times=2), IntegrityError),
            (Fault("part3.bin", end_after=0, times=None), OriginError),
            (Fault("part3.bin", error=TransientOriginError("503"), times=None), OriginError),
            (Fault("part3.bin", extra=b"more"), OriginError),
            (Fault("part3.bin", error=OSError(28, "No space left on device")), OSError),
        ],
    )
    def test_nothing_half_written_has_a_final_name(self, leader: Leader, fault: Fault, error: type[Exception]) -> None:
        # A fresh value each time: a fault counts down.
        leader.origin.faults.append(replace(fault))
        with pytest.raises(error):
            leader.bring()
        assert "part3.bin" not in leader.published()
        assert all(content == FILES[path] for path, content in leader.published().items())
        assert leader.partials() == []

    def test_it_names_the_file(self, leader: Leader) -> None:
        leader.origin.faults.append(Fault("part2.bin", error=OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output") as raised:
            leader.bring()
        assert getattr(raised.value, "_weightferry_subject", "") == "s3://bucket/model/part2.bin"

    def test_the_end_of_the_operation_is_no_failure_of_ours(self, leader: Leader) -> None:
        leader.watch.over = True
        with pytest.raises(Over):
            leader.bring()
        assert leader.published() == {}


class TestSharedContent:
    def test_two_names_of_one_content_are_read_once(self, layout, settings, watch) -> None:
        leader = Leader(layout, settings, watch, FakeOrigin({"a.bin": b"same" * 999, "b.bin": b"same" * 999}))
        brought = leader.bring()
        assert leader.origin.sent == 4 * 999
        assert len(brought.cached) == len(brought.sha256) == 1

    def test_what_another_job_brought_meanwhile(self, leader: Leader) -> None:
        leader.bring()
        again = leader.bring()
        assert again == Brought(0, {}, tuple(range(6)))

    def test_a_file_of_the_wrong_size_is_replaced(self, leader: Leader) -> None:
        leader.bring()
        pinned, file = next(leader.manifest.staged())
        leader.layout.blob(pinned, file).write_bytes(b"torn")
        assert leader.bring().origin_bytes == len(FILES["part0.bin"])
        assert leader.published() == FILES


class TestAgreeOnBytes:
    # Origins without checksums: only the ranks together can notice that they got different bytes.
    def manifest(self, publishes=None) -> Manifest:
        return manifest_of(FakeOrigin({"m.bin": b"x"}, publishes=publishes))

    def test_different_bytes(self) -> None:
        surveys = {0: Survey(), 2: Survey()}
        with pytest.raises(IntegrityError, match="rank 0 sha256 aa, rank 2 sha256 bb"):
            agree_on_bytes(self.manifest(), surveys, {0: Brought(1, {0: "aa"}), 2: Brought(1, {0: "bb"})})

    def test_a_cached_copy_counts(self) -> None:
        held, brought = {0: Survey({0: "aa"}), 1: Survey()}, {0: Brought(), 1: Brought(1, {0: "bb"})}
        with pytest.raises(IntegrityError, match="rank 0 sha256 aa, rank 1 sha256 bb"):
            agree_on_bytes(self.manifest(), held, brought)

    def test_equal_or_unknown(self) -> None:
        brought = {0: Brought(1, {0: "aa"}), 1: Brought(1, {0: "aa"}), 2: Brought()}
        assert agree_on_bytes(self.manifest(), {0: Survey(), 1: Survey(), 2: Survey({0: ""})}, brought) == brought

    def test_published_checksums_were_compared_already(self) -> None:
        brought = {0: Brought(1, {0: "aa"}), 1: Brought(1, {0: "bb"})}
        assert agree_on_bytes(self.manifest("sha256"), {0: Survey(), 1: Survey()}, brought) == brought


def test_plan_gives_each_leader_what_its_domain_lacks() -> None:
    assert plan(3, {0: Survey({0: "", 2: "ab"}), 4: Survey()}) == {0: (1,), 4: (0, 1, 2)}
