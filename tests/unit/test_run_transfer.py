"""What a leader does: several files at a time, each whole under its final name or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from tests.unit.doubles import FakeCoordinator, FakeMonitor, Over, manifest_of, surveyor_of
from weightferry.cache.layout import CacheLayout
from weightferry.cache.survey import DomainSurvey
from weightferry.errors import AccessDenied, IntegrityError, OriginError
from weightferry.manifest import Manifest
from weightferry.origins.base import TransientOriginError
from weightferry.phases.plan import plan
from weightferry.settings import Settings
from weightferry.testing.origin import FakeOrigin, Fault
from weightferry.transfer.incoming_file import ChecksumMismatch
from weightferry.transfer.plan import TransferTask
from weightferry.transfer.run_transfer import TransferResult, run_transfer
from weightferry.transfer.verify_results import verify_results

# The first is small, and travels in a bundle; the others are big, a piece each.
FILES = {f"part{number}.bin": bytes([number]) * ((1 << 20) * (number > 0) + 9000 + number) for number in range(6)}


class Leader:
    """One leader, its cache and its origin."""

    def __init__(self, layout: CacheLayout, settings: Settings, monitor: FakeMonitor, origin: FakeOrigin) -> None:
        self.layout, self.settings, self.monitor, self.origin = layout, settings, monitor, origin
        self.manifest = manifest_of(origin)

    def run_transfer(self) -> TransferResult:
        surveyor = surveyor_of(self.layout, self.manifest)
        try:
            held = surveyor.survey()
            lacking = tuple(index for index in self.manifest.contents() if index not in held.complete)
            task = TransferTask(plan(self.manifest, {0: held}), lacking, {0: "h"})
            return run_transfer(task, surveyor, self.settings, FakeCoordinator(self.monitor), self.origin.factory)
        finally:
            surveyor.release()

    def forget(self, *indices: int) -> None:
        files = list(self.manifest.staged())
        for index in indices:
            self.layout.blob(*files[index]).unlink()

    def published(self) -> dict[str, bytes]:
        there = {}
        for pinned, file in self.manifest.staged():
            blob = self.layout.blob(pinned, file)
            if blob.exists():
                there[file.path] = blob.read_bytes()
        return there

    def partials(self) -> list[str]:
        folder = self.layout.root / "partial"
        return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def leader(layout: CacheLayout, settings: Settings, monitor: FakeMonitor) -> Leader:
    return Leader(layout, settings, monitor, FakeOrigin(FILES))


class LonelyCoordinator(FakeCoordinator):
    """The leader of one of two domains, whose neighbour never comes."""

    def __init__(self, monitor: FakeMonitor) -> None:
        super().__init__(monitor)
        self.job_ranks = range(2)

    @contextlib.contextmanager
    def scoped_store(self, name: str) -> Iterator[Any]:
        del name

        class EmptyStore:
            def set(self, key: str, value: str) -> None: ...

            def check(self, keys: list[str]) -> bool:
                return False

        yield EmptyStore()


def test_a_failed_read_is_the_error_also_while_the_ring_is_made(leader: Leader) -> None:
    """Else the error on every rank would be that a thread was told to stop."""
    leader.origin.faults.append(Fault(error=AccessDenied("not for you"), times=None))
    surveyor = surveyor_of(leader.layout, leader.manifest)
    survey = surveyor.survey()
    made = plan(leader.manifest, {0: survey, 1: DomainSurvey()})
    task = TransferTask(made, tuple(leader.manifest.contents()), {0: "h", 1: "h"})
    with pytest.raises(AccessDenied, match="not for you"):
        run_transfer(task, surveyor, leader.settings, LonelyCoordinator(leader.monitor), leader.origin.factory)


def test_all_files_with_their_digests(leader: Leader) -> None:
    results = leader.run_transfer()
    assert leader.published() == FILES
    assert leader.partials() == []
    assert results.origin_bytes == leader.monitor.bytes == sum(map(len, FILES.values()))
    assert results.sha256 == {n: hashlib.sha256(FILES[f"part{n}.bin"]).hexdigest() for n in range(6)}
    assert surveyor_of(leader.layout, leader.manifest).survey().complete == results.sha256


def test_only_what_is_missing(leader: Leader) -> None:
    leader.run_transfer()
    leader.forget(1, 4)
    leader.origin.reads.clear()
    assert set(leader.run_transfer().sha256) == {1, 4}
    assert leader.published() == FILES
    assert {read.path for read in leader.origin.reads} == {"part1.bin", "part4.bin"}


def test_nothing_missing_reads_nothing(leader: Leader) -> None:
    leader.run_transfer()
    leader.origin.reads.clear()
    assert leader.run_transfer() == TransferResult()
    assert leader.origin.reads == []


def test_several_at_a_time_but_no_more_than_allowed(leader: Leader) -> None:
    leader.settings = replace(leader.settings, connections=3)
    gate = threading.Event()
    leader.origin.faults += [Fault(times=None, wait_for=gate)]
    thread = threading.Thread(target=leader.run_transfer)
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
    results = leader.run_transfer()
    assert results.origin_bytes == sum(map(len, FILES.values())) + len(FILES["part0.bin"]) == leader.origin.sent


class TestFailure:
    def test_the_first_failure_stops_the_others(self, leader: Leader) -> None:
        leader.settings = replace(leader.settings, connections=2)
        gate = threading.Event()
        # The others have sent nothing yet, and go on only after the failure.
        leader.origin.faults += [Fault("part0.bin", error=AccessDenied("403")), Fault(times=None, wait_for=gate)]
        threading.Timer(0.2, gate.set).start()
        with pytest.raises(AccessDenied, match="403"):
            leader.run_transfer()
        assert len(leader.origin.reads) <= 3, "files that were waiting for a connection are not begun"
        assert leader.published() == {}

    def test_it_wakes_those_that_wait_for_a_retry(self, leader: Leader) -> None:
        leader.settings = replace(leader.settings, connections=2)
        leader.origin.faults += [
            Fault("part0.bin", error=TransientOriginError("429", retry_after=100)),
            Fault("part1.bin", error=AccessDenied("403")),
        ]
        with pytest.raises(AccessDenied):
            leader.run_transfer()

    @pytest.mark.parametrize(
        ("fault", "error"),
        [
            (Fault("part0.bin", corrupt=1, times=2), IntegrityError),
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
            leader.run_transfer()
        assert fault.path not in leader.published()
        assert all(content == FILES[path] for path, content in leader.published().items())
        leader.origin.faults.clear()
        leader.run_transfer()
        assert leader.published() == FILES
        assert leader.partials() == []

    def test_what_had_come_is_not_read_again(self, leader: Leader) -> None:
        leader.origin.faults += [
            Fault("part5.bin", cut_after=700_000),
            Fault("part5.bin", error=AccessDenied("403")),
        ]
        with pytest.raises(AccessDenied):
            leader.run_transfer()
        leader.origin.reads.clear()
        leader.run_transfer()
        assert [read.start for read in leader.origin.reads if read.path == "part5.bin"] == [700_000]
        assert leader.published() == FILES

    def test_wrong_bytes_are_told_and_not_published(self, leader: Leader) -> None:
        leader.origin.faults.append(Fault("part3.bin", corrupt=500_000))
        results = leader.run_transfer()
        (wrong,) = results.mismatches.values()
        assert wrong.actual != hashlib.sha256(FILES["part3.bin"]).hexdigest()
        assert "part3.bin" not in leader.published()

    def test_it_names_the_file(self, leader: Leader) -> None:
        leader.origin.faults.append(Fault("part2.bin", error=OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output") as raised:
            leader.run_transfer()
        assert getattr(raised.value, "_weightferry_subject", "") == "s3://bucket/model/part2.bin"

    def test_the_end_of_the_operation_is_no_failure_of_ours(self, leader: Leader) -> None:
        leader.monitor.over = True
        with pytest.raises(Over):
            leader.run_transfer()
        assert leader.published() == {}


class TestSharedContent:
    @pytest.mark.parametrize("size", [999, 1 << 20])
    def test_two_names_of_one_content_are_read_once(self, layout, settings, monitor, size: int) -> None:
        leader = Leader(layout, settings, monitor, FakeOrigin({"a.bin": b"same" * size, "b.bin": b"same" * size}))
        results = leader.run_transfer()
        assert leader.origin.sent == 4 * size
        assert list(results.sha256) == [0]
        assert leader.published() == leader.origin.files

    @pytest.mark.parametrize("index", [0, 1])
    def test_a_file_of_the_wrong_size_is_replaced(self, leader: Leader, index: int) -> None:
        leader.run_transfer()
        pinned, file = list(leader.manifest.staged())[index]
        leader.layout.blob(pinned, file).write_bytes(b"torn")
        assert leader.run_transfer().origin_bytes == file.size
        assert leader.published() == FILES


class TestOriginsOfOtherKinds:
    def test_without_ranges_a_file_is_read_once_in_order(self, layout, settings, monitor) -> None:
        content = random.Random(1).randbytes(9_000_000)
        leader = Leader(layout, settings, monitor, FakeOrigin({"m.bin": content}))
        (pinned,) = leader.manifest.sources
        leader.manifest = Manifest((replace(pinned, files=(replace(pinned.files[0], ranges=False),)),))
        leader.run_transfer()
        assert [(read.start, read.stop) for read in leader.origin.reads] == [(0, None)]
        assert leader.published() == {"m.bin": content}

    def test_a_file_whose_size_nobody_knows(self, layout, settings, monitor) -> None:
        content = random.Random(2).randbytes(9_000_000)
        leader = Leader(layout, settings, monitor, FakeOrigin({"m.bin": content}, publishes=None, sizes=False))
        leader.origin.faults.append(Fault(cut_after=5_000_000))
        leader.run_transfer()
        assert leader.published() == {"m.bin": content}

    def test_big_files_are_read_in_pieces_over_several_connections(self, layout, settings, monitor) -> None:
        content = random.Random(3).randbytes(9_000_000)
        leader = Leader(layout, settings, monitor, FakeOrigin({"m.bin": content}))
        leader.run_transfer()
        assert sorted(read.start for read in leader.origin.reads) == [0, 4 << 20, 8 << 20]
        assert leader.published() == {"m.bin": content}


class TestVerifyResults:
    WHO = MappingProxyType({0: "rank 0 (h0)", 2: "rank 2 (h2)"})

    def verify_results(self, surveys, results, *, publishes=None, final=True) -> tuple[int, ...]:
        manifest = manifest_of(FakeOrigin({"m.bin": b"x"}, publishes=publishes))
        return verify_results(manifest, surveys, results, self.WHO, final=final)

    def test_different_bytes_where_nothing_was_promised(self) -> None:
        surveys = {0: DomainSurvey(), 2: DomainSurvey()}
        results = {0: TransferResult(sha256={0: "aa"}), 2: TransferResult(sha256={0: "bb"})}
        assert self.verify_results(surveys, results, final=False) == (0,)
        with pytest.raises(IntegrityError, match=r"rank 0 \(h0\) sha256 aa, rank 2 \(h2\) sha256 bb"):
            self.verify_results(surveys, results)

    def test_a_cached_copy_counts(self) -> None:
        with pytest.raises(IntegrityError, match="sha256 aa, rank 2"):
            self.verify_results(
                {0: DomainSurvey({0: "aa"}), 2: DomainSurvey()},
                {0: TransferResult(), 2: TransferResult(sha256={0: "bb"})},
            )

    def test_equal_or_unknown(self) -> None:
        results = {0: TransferResult(sha256={0: "aa"}), 2: TransferResult()}
        assert self.verify_results({0: DomainSurvey(), 2: DomainSurvey({0: ""})}, results) == ()

    def test_the_origin_is_to_blame_when_all_got_the_same(self) -> None:
        wrong = ChecksumMismatch("aa", (1, 2))
        results = {0: TransferResult(mismatches={0: wrong}), 2: TransferResult(mismatches={0: wrong})}
        assert self.verify_results({}, results, publishes="sha256", final=False) == (0,)
        with pytest.raises(IntegrityError, match=r"checksum mismatch after a second download: .* got aa"):
            self.verify_results({}, results, publishes="sha256")

    def test_a_domain_is_to_blame_when_others_are_right(self) -> None:
        results = {0: TransferResult(sha256={0: ""}), 2: TransferResult(mismatches={0: ChecksumMismatch("bb", (1, 2))})}
        with pytest.raises(IntegrityError, match=r"rank 2 \(h2\) has bb"):
            self.verify_results({}, results, publishes="sha256")

    def test_where_they_differ(self) -> None:
        results = {
            0: TransferResult(mismatches={0: ChecksumMismatch("aa", (1, 2))}),
            2: TransferResult(mismatches={0: ChecksumMismatch("bb", (1, 3))}),
        }
        with pytest.raises(IntegrityError, match="different from others in bytes 4194304-8388608"):
            self.verify_results({}, results, publishes="sha256")


def test_two_jobs_that_are_in_each_others_way_take_their_nodes_in_one_order(
    settings: Settings, monitor: FakeMonitor
) -> None:
    """Each got the lock of another node first: both must then wait in the same order, or they wait for ever."""
    manifest = manifest_of(FakeOrigin({"m.bin": b"x" * (3 << 20)}))
    layouts = [CacheLayout(settings.cache_dir / name) for name in ("node0", "node1")]
    one, other = ([surveyor_of(layout, manifest) for layout in layouts] for _ in range(2))
    first, second = one[0].survey(), other[1].survey()
    surveys = [(first, one[1].survey()), (other[0].survey(), second)]
    assert [[survey.locked_elsewhere for survey in job] for job in surveys] == [[False, True], [True, False]]
    task = [sorted(range(2), key=lambda node: job[node].cache_id) for job in surveys]
    assert task[0] == task[1]
    assert len({survey.cache_id for job in surveys for survey in job}) == 2
