"""Reading from an origin: what is repaired, what ends it, and that nothing wrong gets through."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import replace

import pytest

from tests.unit.doubles import FakeMonitor, Over, pin
from weightferry.errors import AccessDenied, IntegrityError, OriginError, SourceChanged
from weightferry.origins.base import TransientOriginError
from weightferry.settings import Settings
from weightferry.testing.origin import FakeOrigin, Fault
from weightferry.transfer.connection_limiter import ConnectionLimiter
from weightferry.transfer.range_reader import RangeReader

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Fetching:
    """One origin with one file, and where it goes."""

    def __init__(self, origin: FakeOrigin, settings: Settings, monitor: FakeMonitor) -> None:
        self.origin, self.settings, self.monitor, self.content = origin, settings, monitor, b""
        self.pinned = pin(origin)

    def run(self, *faults: Fault) -> str:
        self.origin.faults += faults
        (file,) = self.pinned.files
        reader = RangeReader(self.origin, self.settings, self.monitor, ConnectionLimiter(4))
        self.content, sha256 = reader.read_whole(self.pinned, file)
        return sha256

    def starts(self) -> list[int]:
        return [read.start for read in self.origin.reads]


@pytest.fixture
def fetching(settings: Settings, monitor: FakeMonitor) -> Fetching:
    return Fetching(FakeOrigin({"m.bin": CONTENT}), settings, monitor)


@pytest.fixture
def unsized(settings: Settings, monitor: FakeMonitor) -> Fetching:
    origin = FakeOrigin({"m.bin": CONTENT}, publishes=None, sizes=False)
    return Fetching(origin, settings, monitor)


def test_content_and_digest(fetching: Fetching) -> None:
    assert fetching.run() == SHA256
    assert fetching.content == CONTENT
    assert fetching.monitor.bytes == len(CONTENT)
    assert fetching.starts() == [0]


@pytest.mark.parametrize("publishes", ["sha256", "git-sha1", None])
def test_an_empty_file_is_a_file(settings: Settings, monitor: FakeMonitor, publishes) -> None:
    fetching = Fetching(FakeOrigin({"m.bin": b""}, publishes=publishes), settings, monitor)
    assert fetching.run() == hashlib.sha256(b"").hexdigest()
    assert fetching.content == b""


class TestBrokenConnections:
    def test_a_cut_body_goes_on_where_it_was(self, fetching: Fetching) -> None:
        assert fetching.run(Fault(cut_after=100_000), Fault(cut_after=50_000)) == SHA256
        assert fetching.content == CONTENT
        assert fetching.starts() == [0, 100_000, 150_000]
        assert fetching.monitor.bytes == len(CONTENT)

    def test_a_body_that_ends_early_goes_on(self, fetching: Fetching) -> None:
        assert fetching.run(Fault(end_after=7)) == SHA256
        assert fetching.starts() == [0, 7]

    def test_a_transient_error_before_any_byte(self, fetching: Fetching) -> None:
        assert fetching.run(Fault(error=TransientOriginError("503"), times=2)) == SHA256
        assert fetching.starts() == [0, 0, 0]

    def test_a_cut_after_the_last_byte_is_no_loss(self, fetching: Fetching) -> None:
        # A range that begins at the end cannot be asked for: it is answered 416.
        assert fetching.run(Fault(cut_after=len(CONTENT))) == SHA256
        assert fetching.starts() == [0]

    def test_attempts_without_a_byte_are_limited(self, fetching: Fetching) -> None:
        with pytest.raises(OriginError, match=r"503 .*4 attempts in a row") as raised:
            fetching.run(Fault(error=TransientOriginError("503"), times=None))
        assert type(raised.value) is OriginError, "another layer would try a transient one again"
        assert len(fetching.origin.reads) == 1 + fetching.settings.retries

    def test_any_progress_starts_the_count_again(self, fetching: Fetching) -> None:
        many = [Fault(cut_after=1000) for _ in range(5 * fetching.settings.retries)]
        assert fetching.run(*many) == SHA256

    def test_final_errors_are_not_tried_again(self, fetching: Fetching) -> None:
        with pytest.raises(AccessDenied):
            fetching.run(Fault(error=AccessDenied("403")))
        assert len(fetching.origin.reads) == 1

    def test_retry_after_is_waited_for(self, fetching: Fetching) -> None:
        began = time.monotonic()
        fetching.run(Fault(error=TransientOriginError("429", retry_after=0.3)))
        assert 0.3 <= time.monotonic() - began < 5

    def test_an_origin_that_wants_too_much_patience(self, fetching: Fetching) -> None:
        with pytest.raises(OriginError, match="asks to wait 7200 s"):
            fetching.run(Fault(error=TransientOriginError("429", retry_after=7200)))

    def test_a_wait_ends_with_the_operation(self, fetching: Fetching) -> None:
        fetching.monitor.over = True
        began = time.monotonic()
        with pytest.raises(Over):
            fetching.run(Fault(error=TransientOriginError("429", retry_after=60)))
        assert time.monotonic() - began < 5

    def test_reading_ends_with_the_operation(self, fetching: Fetching) -> None:
        fetching.monitor.over = True
        with pytest.raises(Over):
            fetching.run()


class TestIgnoredRanges:
    def test_it_starts_again(self, fetching: Fetching) -> None:
        assert fetching.run(Fault(cut_after=100_000), Fault(ignore_range=True)) == SHA256
        assert fetching.content == CONTENT
        assert fetching.starts() == [0, 100_000, 0]
        assert fetching.monitor.bytes == 100_000 + len(CONTENT), "what came twice is counted twice"

    def test_a_server_that_always_cuts_there_is_given_up(self, fetching: Fetching) -> None:
        with pytest.raises(OriginError, match="attempts in a row"):
            fetching.run(Fault(ignore_range=True, times=None), Fault(cut_after=100_000, times=None))


class TestWrongBytes:
    def test_once_is_repaired(self, fetching: Fetching) -> None:
        assert fetching.run(Fault(corrupt=123)) == SHA256
        assert fetching.content == CONTENT

    def test_twice_is_an_error_with_both_checksums(self, fetching: Fetching) -> None:
        with pytest.raises(IntegrityError, match="after a second download") as raised:
            fetching.run(Fault(corrupt=123, times=2))
        assert SHA256 in str(raised.value)
        assert raised.value.subject == "s3://bucket/model/m.bin"
        assert len(fetching.origin.reads) == 2

    def test_in_the_resumed_part(self, fetching: Fetching) -> None:
        assert fetching.run(Fault(cut_after=1000), Fault(corrupt=2000)) == SHA256

    def test_git_blobs_are_compared_too(self, settings: Settings, monitor: FakeMonitor) -> None:
        fetching = Fetching(FakeOrigin({"m.bin": b"{}"}, publishes="git-sha1"), settings, monitor)
        with pytest.raises(IntegrityError):
            fetching.run(Fault(corrupt=0, times=2))

    def test_more_bytes_than_promised(self, fetching: Fetching) -> None:
        with pytest.raises(SourceChanged, match=str(len(CONTENT))):
            fetching.run(Fault(extra=b"x"))

    def test_an_endless_body_is_not_read_to_its_end(self, fetching: Fetching) -> None:
        with pytest.raises(SourceChanged):
            fetching.run(Fault(extra=bytes(3_000_000)))
        assert fetching.origin.sent < len(CONTENT) + 100_000


class TestUnknownSize:
    def test_whole(self, unsized: Fetching) -> None:
        assert unsized.run() == SHA256
        assert unsized.content == CONTENT

    def test_cut(self, unsized: Fetching) -> None:
        assert unsized.run(Fault(cut_after=1000)) == SHA256


def test_what_was_promised_is_what_counts_not_what_is_there(fetching: Fetching) -> None:
    (file,) = fetching.pinned.files
    fetching.pinned = replace(fetching.pinned, files=(replace(file, size=file.size and file.size - 1),))
    with pytest.raises(SourceChanged):
        fetching.run()
